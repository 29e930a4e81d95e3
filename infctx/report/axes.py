"""Where an axis begins and ends, where its ticks are, and what stands beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_TICKS = 6
# A value so many times the spread of all others away from them would press them flat.
FAR_AWAY = 3.0
KIBI = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """low, high: values at its ends. ticks: value and text. num_above: values beyond `high`, the largest `largest`."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    num_above: int = 0
    largest: float | None = None

    def share(self, value: float) -> float:
        """How far along the axis a value is: 0 at low, 1 at high, and never beyond."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def value_axis(
    values: Sequence[float], *, from_zero: bool = False, counted: Sequence[float | None] | None = None
) -> Axis:
    """An axis for these values; a few that lie far above all others are left beyond its end and counted.

    Args:
        values: finite. from_zero: begin at 0.
        counted: what is counted beyond the end, where the values stand for more or are there twice; None = they.
    """
    if not values:
        values = (0.0, 1.0)
    ordered = sorted(values)
    usual = ordered[min(len(ordered) - 1, math.ceil(0.98 * len(ordered)) - 1)]
    spread = usual - ordered[0]
    top = ordered[-1]
    if spread > 0 and top > usual + FAR_AWAY * spread:
        top = usual + spread / 4
    low = 0.0 if from_zero else ordered[0]
    if top <= low:
        margin = abs(low) / 10 or 1.0
        low, top = low - (0.0 if from_zero else margin), low + margin
    step = _step(top - low)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(top / step - 1e-9) * step
    beyond = sorted(value for value in (values if counted is None else counted) if value is not None and value > high)
    return Axis(
        low=low,
        high=high,
        ticks=_ticks(low, high, step),
        num_above=len(beyond),
        largest=beyond[-1] if beyond else None,
    )


def step_axis(first: float, last: float) -> Axis:
    """An axis of steps, from the first to the last."""
    last = max(last, first + 1)
    step = max(1.0, _step(last - first))
    begin = math.ceil(first / step) * step
    return Axis(low=first, high=last, ticks=_ticks(begin, last, step))


def bucket_axis(edges: Sequence[int]) -> Axis:
    """An axis of buckets side by side, with a tick at every border: of powers of 2, a logarithmic one."""
    ticks = tuple((float(number), position_text(edge)) for number, edge in enumerate(edges))
    return Axis(low=0.0, high=float(max(1, len(edges) - 1)), ticks=ticks)


def position_text(position: int) -> str:
    """A number of tokens, short: 512, 4K, 1M, of 1,024 and 1,024 · 1,024."""
    for size, sign in ((KIBI * KIBI, "M"), (KIBI, "K")):
        if position >= size and position % size == 0:
            return f"{position // size}{sign}"
    return f"{position:,}"


def _step(span: float) -> float:
    """The round distance that gives the most ticks that are few enough."""
    rough = span / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * (1 - 1e-9))


def _ticks(low: float, high: float, step: float) -> tuple[tuple[float, str], ...]:
    count = math.floor((high - low) / step + 1e-6)
    return tuple((low + number * step, _tick_text(low + number * step, step)) for number in range(count + 1))


def _tick_text(value: float, step: float) -> str:
    largest = max(abs(value), step)
    if largest >= 1e7 or largest < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return "0" if abs(value) < step / 2 else f"{float(mantissa):g}e{int(exponent)}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    # 2.5 has a digit more than its power of ten.
    if round(step, decimals) != round(step, decimals + 1):
        decimals += 1
    return f"{value:,.{decimals}f}" if round(value, decimals) else f"{0:.{decimals}f}"
