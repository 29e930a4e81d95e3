"""Loss by position in the document: before and after the run, and with the state carried or set back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infctx.report.axes import bucket_axis, position_text, value_axis
from infctx.report.charts import Chart, Line
from infctx.report.facts import Record, RunFacts
from infctx.report.findings import interval_text, nats

X_LABEL = "tokens of the document before it, logarithmic (K = 1,024)"
NATS = "nats per token"


def before_after_chart(facts: RunFacts) -> Chart | None:
    """None where neither was measured."""
    sides = [
        (name, side["carried"], style)
        for name, side, style in (("before", facts.before, 1), ("after", facts.after, 0))
        if side is not None and side.get("carried")
    ]
    if not sides:
        return None
    return _chart(
        "position",
        "Loss by position in the document",
        sides,
        "Bands are 95 % intervals, from drawing documents again.",
    )


def carried_reset_chart(facts: RunFacts) -> Chart | None:
    """None where the state was not set back."""
    after = facts.after
    if after is None or not after.get("reset") or not after.get("carried"):
        return None
    every = f"set back every {after['reset_tokens']:,} tokens"
    return _chart(
        "context",
        "State carried against state set back, after the run",
        [("carried", after["carried"], 0), (every, after["reset"], 3)],
        f"Up to position {after['reset_tokens']:,} both are the same by construction.",
    )


def in_words(measured: Record) -> str:
    """What was read for a measurement."""
    documents, of_all = measured["documents"], measured["held_out_documents"]
    many = (
        f"{documents:,} of {of_all:,} held-out documents"
        if documents < of_all
        else f"all {of_all:,} held-out documents"
    )
    if of_all == 1:
        many = "the one held-out document"
    share = f"{measured['tokens']:,} of their {measured['held_out_tokens']:,} tokens"
    if measured["tokens"] == measured["held_out_tokens"]:
        share = f"{measured['tokens']:,} tokens"
    cut = ", long ones cut" if measured["is_cut"] else ""
    return f"Measured on {many}, {share}{cut}"


def _chart(name: str, title: str, sides: Sequence[tuple[str, Mapping[str, Any], int]], note: str) -> Chart:
    """Buckets side by side; each loss stands in the middle of its bucket."""
    longest = max((of["positions"] for _, of, _ in sides), key=len)
    edges = [0, *(bucket["to"] for bucket in longest)]
    lines = tuple(_line(side, of["positions"], style) for side, of, style in sides)
    values = [
        v for line in lines for ends in (line.ys, line.lows or (), line.highs or ()) for v in ends if v is not None
    ]
    has_intervals = any(bucket["interval"] for _, of, _ in sides for bucket in of["positions"])
    rows = tuple(_row(number, sides) for number in range(len(longest)))
    columns = [column for side, _, _ in sides for column in (side, f"{side}, 95 %")]
    whole = "; ".join(f"{side}: {nats(of['loss'])} over all positions" for side, of, _ in sides)
    return Chart(
        name=name,
        title=title,
        description=f"{whole}. " + " ".join(_ends(side, of["positions"]) for side, of, _ in sides),
        x_label=X_LABEL,
        y_label=NATS,
        x_axis=bucket_axis(edges),
        y_axis=value_axis(values),
        lines=lines,
        columns=("positions", *columns, "tokens"),
        rows=rows,
        caption="Mean loss in each range of positions; tokens as their weights count.",
        notes=(note,) if has_intervals or name == "context" else (),
    )


def _line(side: str, buckets: Sequence[Mapping[str, Any]], style: int) -> Line:
    intervals = [bucket["interval"] for bucket in buckets]
    return Line(
        name=side,
        told=_first_to_last(buckets),
        xs=tuple(number + 0.5 for number in range(len(buckets))),
        ys=tuple(bucket["loss"] for bucket in buckets),
        lows=tuple(None if interval is None else interval[0] for interval in intervals),
        highs=tuple(None if interval is None else interval[1] for interval in intervals),
        style=style,
        marks=tuple(
            f"{side}, positions {_range(bucket)}: {bucket['loss']:.4f}" if bucket["loss"] is not None else ""
            for bucket in buckets
        ),
    )


def _row(number: int, sides: Sequence[tuple[str, Mapping[str, Any], int]]) -> tuple[str, ...]:
    buckets = [of["positions"][number] if number < len(of["positions"]) else None for _, of, _ in sides]
    there = next(bucket for bucket in buckets if bucket is not None)
    shown = []
    for bucket in buckets:
        loss = None if bucket is None else bucket["loss"]
        shown += ["" if loss is None else f"{loss:.4f}", "" if bucket is None else interval_text(bucket["interval"])]
    return (_range(there), *shown, f"{there['weight']:,.0f}")


def _range(bucket: Mapping[str, Any]) -> str:
    return f"{position_text(bucket['from'])} to {position_text(bucket['to'])}"


def _first_to_last(buckets: Sequence[Mapping[str, Any]]) -> str:
    known = [bucket["loss"] for bucket in buckets if bucket["loss"] is not None]
    return f"{nats(known[0])} → {nats(known[-1])}" if len(known) > 1 else nats(known[0]) if known else ""


def _ends(side: str, buckets: Sequence[Mapping[str, Any]]) -> str:
    known = [bucket for bucket in buckets if bucket["loss"] is not None]
    if not known:
        return ""
    first, last = known[0], known[-1]
    return (
        f"{side.capitalize()}: {nats(first['loss'])} at positions {_range(first)}, {nats(last['loss'])} at "
        f"{_range(last)}."
    )
