"""What the far past is worth: the loss of tokens that see only the last d tokens, beside that with all of them.

For a distance d the state is set back every 2·d tokens. Of the targets behind the first such place, those with at least
d and fewer than 2·d tokens since the last one are measured, and the same targets once more with the state carried from
their document's beginning. The difference is what everything more than d to 2·d tokens back is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.document import Document
from infctx.evaluation.document_losses import read_losses
from infctx.evaluation.intervals import Interval, differences_with_intervals
from infctx.model.finch import Finch


@dataclass(frozen=True, kw_only=True, slots=True)
class DistanceLoss:
    """The tokens of one distance.

    Attributes:
        distance: d, in tokens.
        near: mean loss with the last d to 2·d tokens, nats; None where no document is long enough.
        far: of the same tokens with all that is before them.
        gain: near - far: above 0 = the far past helps.
        interval: 95 % of the gain, paired, by bootstrap over documents; None with fewer than 2.
        weight: of the tokens.
    """

    distance: int
    near: float | None
    far: float | None
    gain: float | None
    interval: Interval | None
    weight: float

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "distance": self.distance,
            "near": self.near,
            "far": self.far,
            "gain": self.gain,
            "interval": None if self.interval is None else list(self.interval),
            "weight": self.weight,
        }


def measure_by_distance(
    model: Finch, documents: Sequence[Document], *, distances: Sequence[int], chunk_tokens: int = 2048, rows: int = 1
) -> tuple[DistanceLoss, ...]:
    """Read the documents once with the state carried, and once for each distance.

    Args:
        model: in evaluation mode.
        distances: d, each at least 1.
        chunk_tokens, rows: see `measure_by_position`.
    """
    assert min(distances, default=1) >= 1, f"distances {distances}"
    shape = (len(documents), len(distances))
    near, far, weights = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for piece in read_losses(model, documents, chunk_tokens=chunk_tokens, rows=rows):
        for column, distance in enumerate(distances):
            counted = is_at_distance(piece.positions, distance)
            far[piece.places, column] += piece.losses[:, counted].sum(axis=1)
            weights[piece.places, column] += piece.weights[:, counted].sum(axis=1)
    for column, distance in enumerate(distances):
        for piece in read_losses(model, documents, chunk_tokens=chunk_tokens, rows=rows, reset_tokens=2 * distance):
            counted = is_at_distance(piece.positions, distance)
            near[piece.places, column] += piece.losses[:, counted].sum(axis=1)
    gains = differences_with_intervals(far, near, weights)
    totals = weights.sum(axis=0)

    def mean(sums: npt.NDArray[np.float64], column: int) -> float | None:
        return float(sums[:, column].sum() / totals[column]) if totals[column] else None

    return tuple(
        DistanceLoss(
            distance=distance,
            near=mean(near, column),
            far=mean(far, column),
            gain=gains[column][0],
            interval=gains[column][1],
            weight=float(totals[column]),
        )
        for column, distance in enumerate(distances)
    )


def is_at_distance(positions: npt.NDArray[np.int64], distance: int) -> npt.NDArray[np.bool_]:
    """Which targets see at least d and fewer than 2·d tokens where the state is set back every 2·d, and more where not.

    Args: positions: the number of tokens before each target in its document.
    """
    # The last of the tokens before it may be the one that the state is set back for.
    num_seen = (positions - 1) % (2 * distance) + 1
    return (positions > 2 * distance) & (num_seen >= distance) & (num_seen < 2 * distance)
