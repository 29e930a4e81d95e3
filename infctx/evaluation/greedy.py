"""The most probable text behind each of many prompts, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infctx.data.tokenizer import END_OF_TEXT, Tokenizer
from infctx.errors import CheckpointError
from infctx.evaluation.row_states import TokenRow, as_floats, read_prompts, select_rows, sharing_prefix
from infctx.model.finch import Finch


class _Text:
    """The bytes of one text as it grows."""

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._bytes = bytearray()

    def push(self, piece: bytes) -> bool:
        """Add the bytes of a token; says whether the text is at its end, and then cuts it before the stop string."""
        # A stop string may have begun in earlier tokens.
        begin = max(0, len(self._bytes) - self._longest + 1)
        self._bytes += piece
        found = [place for stop in self._stops if (place := self._bytes.find(stop, begin)) >= 0]
        if found:
            del self._bytes[min(found) :]
        return bool(found)

    def __str__(self) -> str:
        return self._bytes.decode("utf-8", errors="replace")


@torch.no_grad()
def continue_greedily(
    model: Finch,
    prompts: Sequence[TokenRow],
    *,
    tokenizer: Tokenizer,
    max_tokens: int,
    stops: Sequence[str] = (),
    rows: int = 1,
    chunk_tokens: int = 2048,
) -> list[str]:
    """Give the most probable continuation of each prompt, token by token.

    Args:
        prompts: ids, at least one each.
        max_tokens: of each text, at most.
        stops: a text ends before the first of these; end of text ends it, too. None of them may be empty.
        rows: prompts side by side; a text that has ended leaves its row.
    Raises:
        CheckpointError: the logits are not finite.
    """
    assert all(stops), f"an empty stop string: {stops}"
    encoded = [stop.encode("utf-8") for stop in stops]
    texts = [_Text(encoded) for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    if not prompts or max_tokens < 1:
        return [str(text) for text in texts]
    with sharing_prefix(model, prompts, chunk_tokens=chunk_tokens) as num_shared:
        for first in range(0, len(prompts), rows):
            batch = by_length[first : first + rows]
            own = [prompts[number][num_shared:] for number in batch]
            _continue_batch(
                model,
                own,
                [texts[number] for number in batch],
                tokenizer,
                max_tokens=max_tokens,
                chunk_tokens=chunk_tokens,
            )
    return [str(text) for text in texts]


def _continue_batch(
    model: Finch,
    prompts: Sequence[TokenRow],
    texts: list[_Text],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    chunk_tokens: int,
) -> None:
    logits, state = read_prompts(model, prompts, chunk_tokens=chunk_tokens)
    for number in range(max_tokens):
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(
                "the model's logits are not finite: its weights are damaged, or its training diverged."
            )
        # Ids beyond are rows of the vocabulary that no token has.
        chosen = logits[:, : tokenizer.vocab_size].argmax(-1)
        alive = []
        for row, token in enumerate(chosen.tolist()):
            if token != END_OF_TEXT and not texts[row].push(tokenizer.decode_bytes([token])):
                alive.append(row)
        if not alive or number == max_tokens - 1:
            return
        if len(alive) < len(texts):
            texts = [texts[row] for row in alive]
            state, chosen = select_rows(state, alive), chosen[alive]
        hidden, state = model.forward_hidden(chosen[:, None], state)
        logits = as_floats(model.head(hidden[:, -1]))
