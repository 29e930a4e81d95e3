"""Loss on held-out documents: each whole, from a fresh state, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infctx.data.chunking import validation_batches
from infctx.data.document import Document
from infctx.errors import DataError
from infctx.model.state import ModelState
from infctx.training.bptt import run_chunk
from infctx.training.ranks import ALONE, Ranks
from infctx.training.set_losses import add_set_losses, means_by_set


class ValidationLoss(NamedTuple):
    """loss: one weighted mean over all documents. by_set: that of each set there are documents of, by its index, None
    where nothing of it has a weight; empty with one set."""

    loss: float
    by_set: dict[int, float | None]


def validation_loss(
    objective: Callable[..., tuple[Tensor, ...]],
    documents: Sequence[Document],
    *,
    rows: int,
    chunk_tokens: int,
    fresh_state: Callable[[int], ModelState],
    num_sets: int = 1,
    ranks: Ranks = ALONE,
) -> ValidationLoss:
    """Run every document once, on one of the ranks.

    Args:
        rows: documents run side by side.
        fresh_state: the state of so many fresh rows.
        num_sets: that the documents may come from.
    Raises:
        DataError: no token of the documents has a weight.
    """
    loss_sum = 0.0
    weight_total = 0.0
    set_losses: Tensor | None = None
    set_totals = np.zeros((2, num_sets))
    with torch.no_grad():
        for sequence in validation_batches(
            documents,
            rows=rows,
            chunk_tokens=chunk_tokens,
            num_sets=num_sets,
            rank=ranks.data_rank,
            world=ranks.data_size,
            part=(ranks.time_rank, ranks.time_size),
        ):
            state = fresh_state(sequence.chunks[0].tokens.shape[0])
            for chunk in sequence.chunks:
                loss, after, of_sets = run_chunk(objective, chunk, state)
                state = state.followed_by(after)
                loss_sum += float(loss)
                set_losses = add_set_losses(set_losses, of_sets)
            # Of the ranks that share a document, one counts it.
            if ranks.time_rank == 0:
                weight_total += sequence.weight_total
                set_totals += sum(np.stack(row.totals_by_set(num_sets)) for row in sequence.chunks.rows)
    sums = ranks.sum(torch.tensor([loss_sum, weight_total], dtype=torch.float64))
    loss_sum, weight_total = sums.tolist()
    if weight_total == 0:
        error = DataError(
            f"the {len(documents)} held-out documents have nothing to predict: every weight is 0. "
            "Hold out others with data.validation, or none."
        )
        error.is_shared, error.is_told = True, ranks.rank > 0
        raise error
    if set_losses is None:
        return ValidationLoss(loss_sum / weight_total, {})
    set_losses, set_totals = ranks.sum(set_losses.cpu()), ranks.sum(torch.from_numpy(set_totals)).numpy()
    means = means_by_set(set_losses.tolist(), set_totals[1].tolist())
    return ValidationLoss(
        loss_sum / weight_total, {int(index): means[index] for index in np.flatnonzero(set_totals[0])}
    )
