"""What was measured, in words and tables of at most 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from infctx.evaluation.by_distance import DistanceLoss
from infctx.evaluation.by_position import PositionDifference, PositionLosses
from infctx.evaluation.intervals import Interval

_BAR_COLUMNS = 16
_EIGHTHS = " ▏▎▍▌▋▊▉"


def loss_in_words(measured: PositionLosses) -> list[str]:
    """Loss, perplexity and bits per byte, and the loss by position with bars."""
    lines = [
        f"{_documents(measured.num_documents)}, {measured.num_tokens:,} tokens",
        f"loss {measured.loss:.4f} nats a token{_plus_minus(measured.interval)}   perplexity {measured.perplexity:,.4g}"
        + ("" if measured.bits_per_byte is None else f"   {measured.bits_per_byte:.4f} bits per byte"),
        "",
        f"{'tokens before':>19} {'loss':>8} {'95 % interval':>18} {'targets':>11}",
    ]
    largest = max(loss for loss in measured.losses if loss is not None)
    for place, loss, interval, weight in zip(
        _places(measured.edges), measured.losses, measured.intervals, measured.weights, strict=True
    ):
        if loss is not None:
            told = f"{place} {loss:8.4f} {_interval(interval):>18} {_weight(weight)}  {bar(loss, largest)}"
            lines.append(told.rstrip())
    return lines


def difference_in_words(before: PositionLosses, after: PositionLosses, found: PositionDifference) -> list[str]:
    """Two models on the same documents, by position."""
    lines = [f"{'tokens before':>19} {'before':>8} {'after':>8} {'after-before':>12}  95 % interval (paired)"]
    rows = zip(_places(found.edges), before.losses, after.losses, found.differences, found.intervals, strict=True)
    for place, old, new, difference, interval in rows:
        if old is not None and new is not None and difference is not None:
            lines.append(f"{place} {old:8.4f} {new:8.4f} {_signed(difference):>12}  {_interval(interval, signed=True)}")
    lines.append(
        f"{'all':>19} {before.loss:8.4f} {after.loss:8.4f} {_signed(found.difference):>12}  "
        f"{_interval(found.interval, signed=True)}"
    )
    return [line.rstrip() for line in lines]


def reset_in_words(found: PositionDifference, *, reset_tokens: int) -> list[str]:
    """What a carried state is worth beside one that is set back. found: reset after, carried before."""
    gain = f"{abs(found.difference):.4f}{_plus_minus(found.interval)} nats"
    if found.interval is None:
        verdict = "one document gives no interval"
    elif not found.is_certain:
        verdict = "no difference that these documents can show"
    else:
        verdict = "the model uses what is further back" if found.difference > 0 else "what is further back disturbs it"
    higher = "higher" if found.difference > 0 else "lower"
    return [f"State set back every {reset_tokens:,} tokens: a loss {higher} by {gain}:", f"{verdict}."]


def forgetting_in_words(found: PositionDifference) -> str:
    """Whether a model became worse at what it was not trained for."""
    amount = f"{abs(found.difference):.4f}{_plus_minus(found.interval)} nats"
    if found.interval is None:
        better_or_worse = "worse" if found.difference > 0 else "better"
        return f"{better_or_worse} by {amount}; one document gives no interval"
    if not found.is_certain:
        return f"differs by {_signed(found.difference)}{_plus_minus(found.interval)} nats: no forgetting that " + (
            f"{_documents(found.num_documents)} can show"
        )
    return f"worse by {amount}: it forgot" if found.difference > 0 else f"better by {amount}: nothing was forgotten"


def distances_in_words(found: Sequence[DistanceLoss]) -> list[str]:
    """What the past beyond each distance is worth."""
    lines = [f"{'context':>19} {'loss':>8} {'with all':>8} {'gain of all':>12}  95 % interval (paired)"]
    for one in found:
        place = _range(one.distance, 2 * one.distance)
        if one.near is None or one.far is None or one.gain is None:
            lines.append(f"{place:>19} no document is long enough")
        else:
            interval = _interval(one.interval, signed=True)
            lines.append(f"{place:>19} {one.near:8.4f} {one.far:8.4f} {_signed(one.gain):>12}  {interval}".rstrip())
    return lines


def bar(value: float, largest: float) -> str:
    """A bar of block characters, as long as the value is of the largest."""
    eighths = 0 if largest <= 0 else round(max(value, 0.0) / largest * _BAR_COLUMNS * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _places(edges: Sequence[int]) -> list[str]:
    return [f"{_range(max(begin, 1), end):>19}" for begin, end in itertools.pairwise(edges)]


def _range(begin: int, end: int) -> str:
    return f"{begin:,}–{end - 1:,}"


def _documents(count: int) -> str:
    return f"{count:,} document" + "s" * (count != 1)


def _plus_minus(interval: Interval | None) -> str:
    return "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.4f}"


def _interval(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"{_signed(low)} to {_signed(high)}" if signed else f"{low:.4f} – {high:.4f}"


def _signed(value: float) -> str:
    # No minus sign before what is shown as nothing.
    return f"{round(value, 4) + 0.0:+.4f}"


def _weight(weight: float) -> str:
    return f"{weight:11,.0f}" if weight == int(weight) else f"{weight:11,.1f}"
