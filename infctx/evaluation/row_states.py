"""Prompts of different lengths side by side, each row with the state of its own prompt and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from infctx.model.finch import Finch
from infctx.model.state import ModelState

# A shorter beginning is not worth a pass of its own.
MIN_SHARED_TOKENS = 32

TokenRow = tuple[int, ...]


def select_rows(state: ModelState, rows: Sequence[int]) -> ModelState:
    """The state of some rows, in this order; a row may come again."""
    places = torch.tensor(rows, device=state.wkv.device)
    return ModelState(*(tensor.index_select(1, places) for tensor in state))


@torch.no_grad()
def read_on(model: Finch, tokens: Tensor, state: ModelState, *, chunk_tokens: int) -> ModelState:
    """The state after int64 tokens [B, T], T >= 0, whose logits nobody wants."""
    for chunk in tokens.split(chunk_tokens, dim=1):
        if chunk.shape[1]:
            state = model.advance(chunk, state)
    return state


@torch.no_grad()
def read_prompts(model: Finch, prompts: Sequence[TokenRow], *, chunk_tokens: int) -> tuple[Tensor, ModelState]:
    """Read prompts to their ends.

    All end at the same place of the batch; before the shorter ones is padding, of which nothing remains, for each
    document starts behind it.

    Args:
        prompts: ids, at least one each.
    Returns:
        The logits behind each last token [B, V], float32 (float64 in a float64 model), and the state there.
    """
    device = model.embedding.weight.device
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), dtype=np.int64)
    starts = np.zeros(tokens.shape, dtype=np.bool_)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        starts[row, length - len(prompt)] = True
    state = model.fresh_state(len(prompts))
    # The last chunk is a whole one: it alone is read with logits, and only those of its last place are made.
    first = (length - 1) % chunk_tokens + 1
    for begin, end in zip(
        [0, *range(first, length, chunk_tokens)], range(first, length + 1, chunk_tokens), strict=True
    ):
        part = torch.from_numpy(tokens[:, begin:end]).to(device)
        begins = torch.from_numpy(starts[:, begin:end]).to(device) if starts[:, begin:end].any() else None
        if end < length:
            state = model.advance(part, state, starts=begins)
        else:
            hidden, state = model.forward_hidden(part, state, starts=begins)
    return as_floats(model.head(hidden[:, -1])), state


@contextmanager
def sharing_prefix(model: Finch, prompts: Sequence[TokenRow], *, chunk_tokens: int) -> Iterator[int]:
    """Read the beginning that all prompts have in common once; inside, every fresh document of the model begins there.

    This is what a tuned initial state is, and put in its place for the time.

    Yields: how many tokens of each prompt are read already; at least one of each is left. 0 = nothing is shared.
    """
    distinct = set(prompts)
    # What the first and the last in order have in common, all have.
    first, last = min(distinct), max(distinct)
    num_same = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    num_shared = min(map(len, distinct)) - 1 if num_same is None else min(num_same, min(map(len, distinct)) - 1)
    # What attention has cached of the beginning cannot stand for a tuned state.
    if len(distinct) == 1 or num_shared < MIN_SHARED_TOKENS or model.config.n_attention:
        yield 0
        return
    prefix = torch.tensor([first[:num_shared]], device=model.embedding.weight.device)
    state = read_on(model, prefix, model.fresh_state(1), chunk_tokens=chunk_tokens)
    with _beginning_with(model, state):
        yield num_shared


@contextmanager
def _beginning_with(model: Finch, state: ModelState) -> Iterator[None]:
    places: list[tuple[nn.Module, str]] = []
    for block in model.blocks:
        places += [
            (block.time_mix, "initial_state"),
            (block.time_mix, "initial_shift"),
            (block.channel_mix, "initial_shift"),
        ]
    before = [getattr(owner, name) for owner, name in places]
    values = [tensor[0] for layer in zip(*state, strict=True) for tensor in layer]
    try:
        for (owner, name), value in zip(places, values, strict=True):
            setattr(owner, name, nn.Parameter(value.clone(), requires_grad=False))
        yield
    finally:
        for (owner, name), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def as_floats(logits: Tensor) -> Tensor:
    """float64 as it is, all else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
