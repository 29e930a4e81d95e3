"""A text of any length read into a state, chunk after chunk; memory does not depend on its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from infctx.generation.cache_room import check_cache_room
from infctx.model.finch import Finch
from infctx.model.state import ModelState

CHUNK_TOKENS = 1024

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Where a text has been read to; nothing changes it.

    Attributes:
        state: of one row.
        logits: [V], of the token that comes next; in the model's dtype.
        num_tokens: since the document's first.
    """

    state: ModelState
    logits: Tensor
    num_tokens: int


def read_tokens(model: Finch, tokens: TokenArray, before: Reading | None = None) -> Reading:
    """Read a text to its end; see `read_chunks`."""
    *_, last = read_chunks(model, tokens, before)
    return last.whole()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadChunk:
    """A place between two chunks.

    Attributes:
        num_tokens: since the document's first.
        whole: makes what it takes to go on from there, in another process too, to the same bits.
    """

    num_tokens: int
    whole: Callable[[], Reading]


def read_chunks(
    model: Finch, tokens: TokenArray, before: Reading | None = None, *, chunk_tokens: int = CHUNK_TOKENS
) -> Iterator[ReadChunk]:
    """Read a text, chunk after chunk. A GoldFinch's layers that attend run where a place is made whole, not before.

    Args:
        tokens: ids [n], n >= 1.
        before: what was read before it; None = a fresh document.
        chunk_tokens: read at once.
    Yields:
        The place behind each chunk.
    Raises:
        InfctxError: see `check_cache_room`; before anything is read.
    """
    assert len(tokens) > 0
    num_cached = 0 if before is None else before.state.num_cached
    check_cache_room(model, num_cached + len(tokens), num_cached=num_cached)
    device = model.embedding.weight.device
    with torch.inference_mode():
        state = model.fresh_state(1) if before is None else before.state
    num_tokens = 0 if before is None else before.num_tokens
    tail: Tensor | None = None
    for start in range(0, len(tokens), chunk_tokens):
        chunk = torch.from_numpy(tokens[start : start + chunk_tokens].astype(np.int64))[None].to(device)
        with torch.inference_mode():
            hidden, state = (model.forward_hidden if model.token_cat is None else model.skim)(chunk, state)
            is_alone = model.token_cat is None or tail is None
            tail = hidden if is_alone else torch.cat([tail, hidden], dim=1)
            # Of a slice the whole chunk would stay in memory.
            tail = tail[:, -model.num_tail :].clone()
        num_tokens += chunk.shape[1]
        yield ReadChunk(num_tokens=num_tokens, whole=partial(_whole, model, tail, state, num_tokens))


@torch.inference_mode()
def _whole(model: Finch, tail: Tensor, state: ModelState, num_tokens: int) -> Reading:
    if model.token_cat is not None:
        tail, state = model.finish(tail, state)
    # The head at the last token only: at each of them it would take longer than a small model does.
    return Reading(state=state, logits=model.head(tail[:, -1:])[0, 0], num_tokens=num_tokens)
