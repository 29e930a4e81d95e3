"""Long series of numbers as few points that hide nothing: extremes stay, gaps stay gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# As many as a plot of usual width has pixels to spare for.
MOST_POINTS = 240
# A smoothed curve looks back over this part of all steps, and over some steps at least.
SMOOTHED_SHARE = 50
FEWEST_SMOOTHED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Points of a curve, the x of each, and the smallest and largest value that each stands for.

    lows and highs are None where every point stands for itself.
    """

    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    lows: tuple[float | None, ...] | None = None
    highs: tuple[float | None, ...] | None = None


def thinned(xs: Sequence[float], ys: Sequence[float | None], *, most: int = MOST_POINTS) -> Curve:
    """At most so many points: where there are more, each is the mean of its neighbours, with their extremes.

    Args:
        ys: None = not measured, or not finite.
    """
    values = [finite(y) for y in ys]
    if len(xs) <= most:
        return Curve(xs=tuple(xs), ys=tuple(values))
    points = []
    for number in range(most):
        begin, end = number * len(xs) // most, (number + 1) * len(xs) // most
        there = [value for value in values[begin:end] if value is not None]
        mean = math.fsum(there) / len(there) if there else None
        points.append((xs[end - 1], mean, min(there, default=None), max(there, default=None)))
    thin_xs, means, lows, highs = zip(*points, strict=True)
    return Curve(xs=thin_xs, ys=means, lows=lows, highs=highs)


def smoothing_span(count: int) -> int:
    """The number of steps that a smoothed curve of so many steps looks back over."""
    return max(FEWEST_SMOOTHED, count // SMOOTHED_SHARE)


def smoothed(ys: Sequence[float | None], *, span: int) -> list[float | None]:
    """The exponential moving average; what is missing is passed over, and the first values are not pulled to 0.

    Args:
        span: steps after which a value counts 1/e of what it did.
    """
    keep = math.exp(-1 / span)
    total = weight = 0.0
    averages: list[float | None] = []
    for y in ys:
        value = finite(y)
        if value is not None:
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else None)
    return averages


def last_of_each(curve: Curve, xs: Sequence[float], ys: Sequence[float | None]) -> Curve:
    """Another series over the same steps, at the points of a thinned curve."""
    by_x = dict(zip(xs, ys, strict=True))
    return Curve(xs=curve.xs, ys=tuple(by_x.get(x) for x in curve.xs))


def finite(value: object) -> float | None:
    """A number that can be drawn."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]


def median(values: Sequence[float]) -> float | None:
    """The middle value, the lower of two; None without values."""
    return sorted(values)[(len(values) - 1) // 2] if values else None
