"""Sampling from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.finch import Finch

PROMPT_CHUNK_TOKENS = 1024


@torch.no_grad()
def sample_tokens(
    model: Finch,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    usable_ids: int | None = None,
    stop_id: int = 0,
) -> Iterator[int]:
    """Yield up to max_tokens ids that follow the prompt.

    Args:
        prompt: ids, at least one; read in chunks, so that its length costs time only.
        temperature: 0 = always the most probable token.
        top_p: draw from the smallest set of tokens whose probabilities sum to this.
        seed: None = a different text each time.
        usable_ids: ids from here on are rows of the vocabulary that no token has.
        stop_id: ends the text and is not yielded.
    Raises:
        CheckpointError: the logits are not finite.
    """
    device = model.embedding.weight.device
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    state = None
    for first in range(0, len(prompt), PROMPT_CHUNK_TOKENS):
        tokens = torch.tensor([list(prompt[first : first + PROMPT_CHUNK_TOKENS])], device=device)
        logits, state = model(tokens, state)
    for _ in range(max_tokens):
        last = logits[0, -1].float().cpu()
        if usable_ids is not None:
            last[usable_ids:] = -torch.inf
        token = _draw(last, temperature, top_p, generator)
        if token == stop_id:
            return
        yield token
        logits, state = model(torch.tensor([[token]], device=device), state)


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if not bool(torch.isfinite(logits.max())):
        raise CheckpointError("the model's logits are not finite: its weights are damaged, or its training diverged.")
    if temperature == 0:
        return int(logits.argmax())
    # In float64, and from the largest logit down: no temperature is too small or too large.
    probabilities = torch.softmax((logits.double() - logits.max()) / temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    # A token is kept if the ones before it do not yet reach top_p; the most probable one always is.
    is_beyond = ordered.cumsum(-1) - ordered >= top_p
    is_beyond[0] = False
    return int(ids[torch.multinomial(ordered.masked_fill(is_beyond, 0.0), 1, generator=generator)])
