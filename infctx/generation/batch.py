"""Many prompts, some at a time: each has a row with a state, counts and a generator of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infctx.generation.cache_room import check_cache_room
from infctx.generation.reading import Reading, TokenArray, read_tokens
from infctx.generation.row import Row, Voice, Wish, copied
from infctx.model.state import ModelState


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """tokens: ids to read, which may be none where something was read before."""

    tokens: TokenArray
    wish: Wish


@dataclass(frozen=True, slots=True)
class _Active:
    number: int
    row: Row


def write_texts(
    voice: Voice, prompts: Sequence[Prompt], *, num_rows: int, before: Reading | None = None
) -> Iterator[tuple[int, Row]]:
    """Continue each prompt; a row that has ended leaves, and the next prompt takes its place.

    A prompt is read by itself, as it would be alone. What a row draws does not depend on the others, but for the
    rounding of products of several rows, which can decide between tokens of equal chance.

    Args:
        num_rows: written at once.
        before: what every prompt follows; None = each is a document of its own.
    Yields:
        The number of a prompt and its row, when it has ended.
    Raises:
        InfctxError: see `check_cache_room`; before anything is read.
    """
    longest = max((len(prompt.tokens) for prompt in prompts), default=0)
    cached = 0 if before is None else before.state.num_cached
    check_cache_room(voice.model, cached + longest, num_cached=cached, rows=min(num_rows, len(prompts)))
    waiting = iter(enumerate(prompts))
    active: list[_Active] = []
    state: ModelState | None = None
    while True:
        found = _fill(voice, waiting, num_rows - len(active), before)
        for entry, _ in found:
            if entry.row.ended is not None:
                yield entry.number, entry.row
        joined = [(entry, reading) for entry, reading in found if entry.row.ended is None]
        if joined:
            active += [entry for entry, _ in joined]
            state = copied([*([] if state is None else [state]), *(reading.state for _, reading in joined)])
        if not active:
            if not found:
                return
            continue
        assert state is not None
        tokens = torch.tensor([entry.row.tokens[-1] for entry in active], device=state.wkv.device)
        logits, state = voice.step.advance_(tokens, state)
        for entry, one in zip(active, logits, strict=True):
            entry.row.take(one)
            if entry.row.ended is not None:
                yield entry.number, entry.row
        going_on = [place for place, entry in enumerate(active) if entry.row.ended is None]
        if len(going_on) < len(active):
            state = _rows_of(state, going_on) if going_on else None
            active = [active[place] for place in going_on]


def _fill(
    voice: Voice, waiting: Iterable[tuple[int, Prompt]], num_free: int, before: Reading | None
) -> list[tuple[_Active, Reading]]:
    """Read the next prompts and draw the first token of each."""
    found: list[tuple[_Active, Reading]] = []
    if num_free <= 0:
        return found
    for number, prompt in waiting:
        reading = before if not len(prompt.tokens) else read_tokens(voice.model, prompt.tokens, before)
        assert reading is not None, "a prompt has a token, or something was read before it"
        row = Row(voice, prompt.wish)
        if row.ended is None:
            row.take(reading.logits)
        found.append((_Active(number, row), reading))
        if len(found) == num_free:
            break
    return found


@torch.inference_mode()
def _rows_of(state: ModelState, rows: list[int]) -> ModelState:
    index = torch.tensor(rows, device=state.wkv.device)
    parts: list[Tensor] = [part.index_select(1, index) for part in state]
    return ModelState(*parts)
