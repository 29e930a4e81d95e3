"""How sure a mean over documents is: their bootstrap."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 1000
LEVEL = 0.95
# Two measurements of the same documents are resampled alike: their difference is a paired one.
SEED = 0
# Draws held at once.
_DRAWS_AT_ONCE = 2**22

Interval = tuple[float, float]


def resampled_sums(columns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums over documents drawn with replacement, as many as there are.

    Args: columns: [D, K], of each document the summands.
    Returns: [NUM_RESAMPLES, K]; the same documents are drawn for every column, and in every call with as many.
    """
    num_documents = len(columns)
    generator = np.random.default_rng(SEED)
    at_once = max(1, _DRAWS_AT_ONCE // max(1, num_documents))
    sums = []
    for first in range(0, NUM_RESAMPLES, at_once):
        num_draws = min(at_once, NUM_RESAMPLES - first)
        drawn = generator.integers(num_documents, size=(num_draws, num_documents))
        drawn += np.arange(num_draws)[:, None] * num_documents
        counts = np.bincount(drawn.ravel(), minlength=num_draws * num_documents).reshape(num_draws, num_documents)
        sums.append(counts @ columns)
    return np.concatenate(sums)


def interval_of(resampled: npt.NDArray[np.float64]) -> Interval:
    """The middle 95 % of resampled values; resamples that hold nothing to average (NaN) are left out."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def means_with_intervals(
    sums: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> list[tuple[float | None, Interval | None]]:
    """The weighted mean of each column and its 95 % interval.

    Args: sums, weights: [D, K], of each document its weighted sum and the sum of its weights.
    Returns: of each column, None for a mean without weights, and for an interval of fewer than 2 documents.
    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (the percentile interval).
    """
    num_columns = sums.shape[1]
    drawn = resampled_sums(np.concatenate([sums, weights], axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = drawn[:, :num_columns] / drawn[:, num_columns:]
    return [
        (
            float(sums[:, column].sum() / weights[:, column].sum()) if weights[:, column].any() else None,
            interval_of(means[:, column]) if np.count_nonzero(weights[:, column]) >= 2 else None,
        )
        for column in range(num_columns)
    ]


def differences_with_intervals(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> list[tuple[float | None, Interval | None]]:
    """The same of mean after - mean before, where both are of the same documents and weights."""
    return means_with_intervals(after - before, weights)
