"""Loss by position in the document, with intervals over the documents, and the difference of two measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.document import Document
from infctx.errors import DataError
from infctx.evaluation.document_losses import document_lengths, read_losses
from infctx.evaluation.intervals import Interval, differences_with_intervals, means_with_intervals
from infctx.model.finch import Finch

FIRST_EDGE = 16
"""The end of the first bucket; every further one is twice as far."""

CountBytes = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLosses:
    """Mean loss by position: how many tokens of its document are before a token.

    Attributes:
        edges: bucket i holds positions from edges[i] to below edges[i + 1]: 0, 16, 32, 64, … as far as documents go.
        losses: nats per unit of weight in each bucket; None where nothing has a weight.
        weights: the sum of the weights in each bucket.
        intervals: 95 % of each loss, by bootstrap over documents; None where fewer than 2 documents reach.
        loss, interval: of all positions.
        num_documents, num_tokens: that were read.
        bits_per_byte: loss of the targets over their bytes, both weighted; None where nobody counted bytes, or there
            are none. The loss of an end of text, which has no bytes, counts.
        document_losses, document_weights: [D, buckets], the weighted sums of each document.
    """

    edges: tuple[int, ...]
    losses: tuple[float | None, ...]
    weights: tuple[float, ...]
    intervals: tuple[Interval | None, ...]
    loss: float
    interval: Interval | None
    num_documents: int
    num_tokens: int
    bits_per_byte: float | None
    document_losses: Sums = field(repr=False, compare=False)
    document_weights: Sums = field(repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that is beyond a float."""
        return _exp(self.loss)

    def to_json(self) -> dict[str, Any]:
        """Everything but the sums of single documents, as JSON has it."""
        return {
            "loss": self.loss,
            "interval": _listed(self.interval),
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "weight": sum(self.weights),
            "positions": [
                {"from": begin, "to": end, "loss": loss, "interval": _listed(interval), "weight": weight}
                for begin, end, loss, interval, weight in zip(
                    self.edges[:-1], self.edges[1:], self.losses, self.intervals, self.weights, strict=True
                )
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionDifference:
    """Mean loss after minus before on the same tokens; below 0 = after is better.

    Attributes:
        edges: see `PositionLosses`.
        differences, intervals: nats per unit of weight in each bucket; intervals are paired, see `compare`.
        difference, interval: of all positions.
        num_documents: that were compared.
    """

    edges: tuple[int, ...]
    differences: tuple[float | None, ...]
    intervals: tuple[Interval | None, ...]
    difference: float
    interval: Interval | None
    num_documents: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval does not hold 0."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "difference": self.difference,
            "interval": _listed(self.interval),
            "documents": self.num_documents,
            "positions": [
                {"from": begin, "to": end, "difference": difference, "interval": _listed(interval)}
                for begin, end, difference, interval in zip(
                    self.edges[:-1], self.edges[1:], self.differences, self.intervals, strict=True
                )
            ],
        }


def measure_by_position(
    model: Finch,
    documents: Sequence[Document],
    *,
    chunk_tokens: int = 2048,
    rows: int = 1,
    reset_tokens: int | None = None,
    count_bytes: CountBytes | None = None,
) -> PositionLosses:
    """Read every document from a fresh state, the state carried, and average the losses by position.

    Args:
        model: in evaluation mode.
        documents: whole ones; nothing of them is kept but sums.
        chunk_tokens: read at once; changes no result.
        rows: documents read side by side.
        reset_tokens: set the state back to that of a fresh document before every so many tokens: what a model would do
            that sees no more than that. None = never.
        count_bytes: the number of bytes of each of some ids, as `Tokenizer.byte_lengths`.
    Raises:
        DataError: no token has a weight.
        CheckpointError: a loss is not finite.
    """
    lengths = document_lengths(documents)
    num_buckets = 1 + int(bucket_of(np.array([max(lengths, default=1)]) - 1)[0])
    losses, weights = np.zeros((2, len(documents), num_buckets))
    num_bytes = 0.0
    for piece in read_losses(model, documents, chunk_tokens=chunk_tokens, rows=rows, reset_tokens=reset_tokens):
        buckets = bucket_of(piece.positions)
        begins = np.flatnonzero(np.diff(buckets, prepend=-1))
        cells = np.ix_(piece.places, buckets[begins])
        losses[cells] += np.add.reduceat(piece.losses, begins, axis=1)
        weights[cells] += np.add.reduceat(piece.weights, begins, axis=1)
        if count_bytes is not None:
            counted = piece.weights > 0
            num_bytes += float(count_bytes(piece.targets[counted]) @ piece.weights[counted])
    if not weights.any():
        raise DataError(
            f"the {len(documents):,} documents have nothing to predict: every weight is 0. Give others, or a template "
            "that trains a part of them."
        )
    *by_bucket, (loss, interval) = means_with_intervals(_with_total(losses), _with_total(weights))
    assert loss is not None
    return PositionLosses(
        edges=bucket_edges(num_buckets),
        losses=tuple(mean for mean, _ in by_bucket),
        weights=tuple(weights.sum(axis=0).tolist()),
        intervals=tuple(interval for _, interval in by_bucket),
        loss=loss,
        interval=interval,
        num_documents=len(documents),
        num_tokens=sum(lengths),
        bits_per_byte=float(losses.sum() / math.log(2) / num_bytes) if num_bytes > 0 else None,
        document_losses=losses,
        document_weights=weights,
    )


def compare(before: PositionLosses, after: PositionLosses) -> PositionDifference:
    """How the loss on the same documents differs: of two models, or of a carried and a reset state.

    The intervals are paired: documents are drawn, and each is drawn with both of its losses, so that what makes
    documents differ from each other does not blur the difference.

    Raises: ValueError: the measurements are not of the same documents.
    """
    if not np.array_equal(before.document_weights, after.document_weights):
        raise ValueError("expected two measurements of the same documents, in the same order")
    *by_bucket, (difference, interval) = differences_with_intervals(
        *map(_with_total, (before.document_losses, after.document_losses, after.document_weights))
    )
    assert difference is not None
    return PositionDifference(
        edges=after.edges,
        differences=tuple(mean for mean, _ in by_bucket),
        intervals=tuple(interval for _, interval in by_bucket),
        difference=difference,
        interval=interval,
        num_documents=after.num_documents,
    )


def bucket_of(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The bucket of each position: 0 below 16, then one for each power of 2."""
    num_bits = np.frexp(positions.astype(np.float64))[1]
    return np.maximum(num_bits.astype(np.int64) - (FIRST_EDGE.bit_length() - 1), 0)


def bucket_edges(num_buckets: int) -> tuple[int, ...]:
    """Where so many buckets begin, and where the last one ends."""
    return (0, *(FIRST_EDGE << number for number in range(num_buckets)))


def _with_total(sums: Sums) -> Sums:
    return np.concatenate([sums, sums.sum(axis=1, keepdims=True)], axis=1)


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
