"""Losses that leap: told from noise by the median and the spread of the steps before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Steps that are looked back on, and how many there have to be.
RECENT_STEPS = 64
WARM_UP_STEPS = 16
# How many times the spread of the recent losses, scaled as a standard deviation, and at least this factor above them.
DEVIATIONS = 8.0
LEAST_FACTOR = 1.5
# Added to losses before their logarithm, in nats: below it, factors between losses mean nothing.
NOTHING = 0.05
# A median of absolute deviations is this part of a standard deviation where the deviations are normal.
MEDIAN_OF_NORMAL = 0.6745


class UsualLoss(NamedTuple):
    """Of recent steps, in nats: the median, and what a loss has to reach to be a spike."""

    median: float
    threshold: float


def usual_loss(recent: Sequence[float]) -> UsualLoss | None:
    """What the loss of the next step is compared with; None while too few steps are known.

    Logarithms are compared, since the noise of a loss grows with it. The median lags behind a falling loss, and a third
    of the steps may be spikes themselves before it moves.

    Args:
        recent: losses of the last steps, the newest last, as `remember` keeps them.
    """
    if len(recent) < WARM_UP_STEPS:
        return None
    logs = [_log(loss) for loss in recent]
    median = statistics.median(logs)
    spread = statistics.median(abs(log - median) for log in logs) / MEDIAN_OF_NORMAL
    height = max(math.log(LEAST_FACTOR), DEVIATIONS * spread)
    return UsualLoss(math.exp(median) - NOTHING, math.exp(min(median + height, 700.0)) - NOTHING)


def remember(recent: Sequence[float], loss: float) -> list[float]:
    """The recent losses with one more. Spikes are kept, too, so that a loss that stays high becomes the usual one."""
    return [*recent, loss][-RECENT_STEPS:]


def _log(loss: float) -> float:
    return math.log(max(loss, 0.0) + NOTHING)
