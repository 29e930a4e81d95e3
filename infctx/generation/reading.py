"""A text of any length read into a state, chunk after chunk; memory does not depend on its length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
    *_, reading = read_chunks(model, tokens, before)
    return reading


@torch.inference_mode()
def read_chunks(
    model: Finch, tokens: TokenArray, before: Reading | None = None, *, chunk_tokens: int = CHUNK_TOKENS
) -> Iterator[Reading]:
    """Read a text, chunk after chunk.

    Args:
        tokens: ids [n], n >= 1.
        before: what was read before it; None = a fresh document.
        chunk_tokens: read at once.
    Yields:
        The place behind each chunk; it may be read on from there, in another process too, to the same bits.
    """
    assert len(tokens) > 0
    device = model.embedding.weight.device
    state = model.fresh_state(1) if before is None else before.state
    num_tokens = 0 if before is None else before.num_tokens
    for start in range(0, len(tokens), chunk_tokens):
        chunk = torch.from_numpy(tokens[start : start + chunk_tokens].astype(np.int64))[None].to(device)
        # The head at the last token only: at each of them it would take longer than a small model does.
        hidden, state = model.forward_hidden(chunk, state)
        num_tokens += chunk.shape[1]
        yield Reading(state=state, logits=model.head(hidden[:, -1:])[0, 0], num_tokens=num_tokens)
