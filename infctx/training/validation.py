"""Loss on held-out documents: each whole, from a fresh state, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infctx.data.chunking import validation_batches
from infctx.data.document import Document
from infctx.errors import DataError
from infctx.model.state import ModelState
from infctx.training.bptt import forward_through_chunks


def validation_loss(
    objective: Callable[..., tuple[Tensor, ...]],
    documents: Sequence[Document],
    *,
    rows: int,
    chunk_tokens: int,
    fresh_state: Callable[[int], ModelState],
) -> float:
    """One weighted mean over all documents.

    Args:
        rows: documents run side by side.
        fresh_state: the state of so many fresh rows.
    Raises:
        DataError: no token of the documents has a weight.
    """
    loss_sum = 0.0
    weight_total = 0.0
    with torch.no_grad():
        for sequence in validation_batches(documents, rows=rows, chunk_tokens=chunk_tokens):
            state = fresh_state(sequence.chunks[0].tokens.shape[0])
            for chunk in sequence.chunks:
                loss, state = forward_through_chunks(objective, [chunk], state)
                loss_sum += float(loss)
            weight_total += sequence.weight_total
    if weight_total == 0:
        raise DataError(
            f"the {len(documents)} held-out documents have nothing to predict: every weight is 0. "
            "Hold out others with data.validation, or none."
        )
    return loss_sum / weight_total
