"""Losses that leap: told from noise by the level and the spread of the steps before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Steps that are looked back on, and how many there have to be.
RECENT_STEPS = 64
WARM_UP_STEPS = 16
# Of so many steps the median is what the next one is expected to be.
LEVEL_STEPS = 5
# How many times the spread of what earlier steps were off by, scaled as a standard deviation, and at least this factor.
DEVIATIONS = 7.0
LEAST_FACTOR = 2.0
# Added to losses before their logarithm, in nats: below it, factors between losses mean nothing.
NOTHING = 0.05
# The spread is told by the deviation that so many do not exceed, for a few may be spikes themselves; beside it, what
# that is of a normal distribution, in standard deviations.
QUANTILE, QUANTILE_OF_NORMAL = 0.9, 1.6449


class UsualLoss(NamedTuple):
    """Of recent steps, in nats: the median, and what a loss has to reach to be a spike."""

    median: float
    threshold: float


def usual_loss(recent: Sequence[float]) -> UsualLoss | None:
    """What the loss of the next step is compared with; None while too few steps are known.

    It is the median of the last few steps, and the threshold lies as far above it as hardly any of the steps before lay
    from what was expected of them: so a loss may fall by orders of magnitude without hiding a spike. Logarithms are
    compared, since the noise of a loss grows with it.

    Args:
        recent: losses of the last steps, the newest last, as `remember` keeps them.
    """
    if len(recent) < WARM_UP_STEPS:
        return None
    logs = [_log(loss) for loss in recent]
    errors = [
        log - statistics.median(logs[place - LEVEL_STEPS : place])
        for place, log in enumerate(logs)
        if place >= LEVEL_STEPS
    ]
    # While a loss falls, all of it lies below the level by about as much, which is no noise.
    usual_error = statistics.median(errors)
    deviations = sorted(abs(error - usual_error) for error in errors)
    spread = deviations[round(QUANTILE * (len(deviations) - 1))] / QUANTILE_OF_NORMAL
    level = statistics.median(logs[-LEVEL_STEPS:])
    height = max(math.log(LEAST_FACTOR), DEVIATIONS * spread)
    return UsualLoss(math.exp(level) - NOTHING, math.exp(min(level + height, 700.0)) - NOTHING)


def remember(recent: Sequence[float], loss: float) -> list[float]:
    """The recent losses with one more. Spikes are kept, too, so that a loss that stays high becomes the usual one."""
    return [*recent, loss][-RECENT_STEPS:]


def _log(loss: float) -> float:
    return math.log(max(loss, 0.0) + NOTHING)
