"""The charts of a run's steps: loss, loss of each set, rate, gradient, speed, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from infctx.report.axes import step_axis, value_axis
from infctx.report.charts import NUM_STYLES, Chart, Line
from infctx.report.curves import Curve, finite, last_of_each, smoothed, smoothing_span, thinned
from infctx.report.facts import Record, RunFacts
from infctx.report.findings import nats

TABLE_ROWS = 24
MOST_SETS = NUM_STYLES
NATS = "nats per token"


def loss_chart(facts: RunFacts) -> Chart | None:
    """Loss of the steps and of the held-out documents; None where there is neither."""
    steps = [int(record["step"]) for record in facts.steps]
    losses = [finite(record.get("loss")) for record in facts.steps]
    held_out = facts.val_losses
    if not any(loss is not None for loss in losses) and not held_out:
        return None
    span = smoothing_span(len(steps))
    curve = thinned(steps, losses)
    smooth = last_of_each(curve, steps, smoothed(losses, span=span))
    lines = []
    if steps:
        each = "each step" if curve.lows is None else "range of the steps"
        lines.append(_line(each, curve, style=4, is_faint=True))
        lines.append(_line(f"training, smoothed over {span} steps", smooth, told=_told(smooth.ys), style=0))
    if held_out:
        points = Curve(xs=tuple(step for step, _ in held_out), ys=tuple(loss for _, loss in held_out))
        marks = tuple(f"step {step:,}: {loss:.4f}" for step, loss in held_out) if len(held_out) <= 100 else ()
        lines.append(_line("held out", points, told=_told(points.ys), style=1, marks=marks))
    by_step = dict(held_out)
    smooth_by_step = dict(zip(steps, smoothed(losses, span=span), strict=True))
    rows = tuple(
        (
            f"{record['step']:,}",
            _cell(record.get("tokens"), ",.0f"),
            _cell(record.get("loss"), ".4f"),
            _cell(smooth_by_step.get(record["step"]), ".4f"),
            _cell(by_step.get(record["step"]), ".4f"),
        )
        for record in _some(facts.records, keep=set(by_step) if len(by_step) <= TABLE_ROWS else set())
    )
    return Chart(
        name="loss",
        title="Loss in training and on held-out documents",
        description=_course("training, smoothed", smooth.ys, steps) + _course_of(held_out),
        x_label="step",
        y_label=NATS,
        x_axis=step_axis(*_ends(facts)),
        y_axis=value_axis(_values(lines), counted=losses),
        lines=tuple(lines),
        columns=("step", "tokens", "loss", "smoothed", "held out"),
        rows=rows,
        caption=_caption(facts.records, rows),
    )


def set_charts(facts: RunFacts) -> Iterator[Chart]:
    """Of a mixture: the loss of each set in training, and on held-out documents."""
    for name, title, key, span in (
        ("sets", "Training loss of each set, smoothed", "sets", smoothing_span(len(facts.steps))),
        ("held-out-sets", "Held-out loss of each set", "val_loss_by_set", 0),
    ):
        records = [record for record in facts.records if isinstance(record.get(key), dict)]
        names = list(dict.fromkeys(one for record in records for one in record[key]))
        if len(names) < 2:
            continue
        steps = [int(record["step"]) for record in records]
        shown = names[:MOST_SETS]
        curves = {}
        for one in shown:
            losses = [_of_set(record[key].get(one)) for record in records]
            curves[one] = thinned(steps, smoothed(losses, span=span) if span else losses)
        lines = tuple(
            _line(one, curve, told=_told(curve.ys), style=style) for style, (one, curve) in enumerate(curves.items())
        )
        rows = tuple(
            (f"{record['step']:,}", *(_cell(_of_set(record[key].get(one)), ".4f") for one in shown))
            for record in _some(records)
        )
        notes = (f"{len(names) - MOST_SETS:,} more sets are in metrics.jsonl.",) if len(names) > MOST_SETS else ()
        yield Chart(
            name=name,
            title=title,
            description=" ".join(f"{one}: {_told(curve.ys)}." for one, curve in curves.items()),
            x_label="step",
            y_label=NATS,
            x_axis=step_axis(*_ends(facts)),
            y_axis=value_axis(_values(lines)),
            lines=lines,
            columns=("step", *shown),
            rows=rows,
            caption=_caption(records, rows),
            notes=notes,
        )


def small_charts(facts: RunFacts) -> Iterator[Chart]:
    """Rate, gradient, speed and memory."""
    has_device = any(finite(record.get("peak_device_bytes")) for record in facts.steps)
    memory = "peak_device_bytes" if has_device else "peak_host_bytes"
    for name, title, key, unit, factor, form in (
        ("rate", "Learning rate", "lr", "learning rate", 1.0, ".3g"),
        ("gradient-norm", "Norm of the gradient", "grad_norm", "norm before clipping", 1.0, ".4g"),
        ("speed", "Speed", "tokens_per_second", "tokens per second", 1.0, ",.0f"),
        ("memory", "Peak memory so far", memory, "GB", 1e-9, ".3f"),
    ):
        steps = [int(record["step"]) for record in facts.steps]
        values = [None if (value := finite(record.get(key))) is None else value * factor for record in facts.steps]
        known = [value for value in values if value is not None]
        if not known:
            continue
        line = _line(title.lower(), thinned(steps, values), told=f"{known[-1]:{form}} at the end", style=0)
        rows = tuple((f"{steps[place]:,}", _cell(values[place], form)) for place in _places(len(steps)))
        yield Chart(
            name=name,
            title=title,
            description=f"Between {min(known):{form}} and {max(known):{form}} {unit}; {known[-1]:{form}} at the end.",
            x_label="step",
            y_label=unit,
            x_axis=step_axis(*_ends(facts)),
            y_axis=value_axis(_values([line]), from_zero=True, counted=values),
            lines=(line,),
            columns=("step", unit),
            rows=rows,
            caption=_caption(steps, rows),
        )


def _line(
    name: str, curve: Curve, *, told: str = "", style: int, marks: tuple[str, ...] = (), is_faint: bool = False
) -> Line:
    return Line(
        name=name,
        told=told,
        xs=curve.xs,
        ys=curve.ys,
        lows=curve.lows,
        highs=curve.highs,
        style=style,
        marks=marks,
        is_faint=is_faint,
    )


def _ends(facts: RunFacts) -> tuple[int, int]:
    steps = [int(record["step"]) for record in facts.records]
    return (min(steps), max(steps)) if steps else (0, 1)


def _values(lines: Sequence[Line]) -> list[float]:
    series = [values for line in lines for values in (line.ys, line.lows or (), line.highs or ())]
    return [value for values in series for value in values if value is not None]


def _of_set(value: object) -> float | None:
    """A loss of a set: of a step a record with its tokens, too; of a validation a number."""
    return finite(value.get("loss")) if isinstance(value, dict) else finite(value)


def _told(ys: Sequence[float | None]) -> str:
    known = [y for y in ys if y is not None]
    return "" if not known else nats(known[0]) if len(known) == 1 else f"{nats(known[0])} → {nats(known[-1])}"


def _course(name: str, ys: Sequence[float | None], steps: Sequence[int]) -> str:
    known = [y for y in ys if y is not None]
    if not known:
        return ""
    return (
        f"Loss of {name}: {nats(known[0])} at first, {nats(known[-1])} at step {steps[-1]:,}, lowest "
        f"{nats(min(known))}. "
    )


def _course_of(held_out: Sequence[tuple[int, float]]) -> str:
    if not held_out:
        return "Nothing was held out."
    lowest = min(loss for _, loss in held_out)
    return (
        f"Held-out loss, measured {len(held_out):,} times: {nats(held_out[0][1])} at step {held_out[0][0]:,}, "
        f"{nats(held_out[-1][1])} at step {held_out[-1][0]:,}, lowest {nats(lowest)}."
    )


def _cell(value: object, form: str) -> str:
    number = finite(value)
    return "" if number is None else f"{number:{form}}"


def _places(count: int) -> list[int]:
    """Places spread evenly, the first and the last among them."""
    shown = min(count, TABLE_ROWS)
    return [round(number * (count - 1) / max(1, shown - 1)) for number in range(shown)]


def _some(records: Sequence[Record], *, keep: set[int] | None = None) -> list[Record]:
    places = set(_places(len(records)))
    kept = keep or set()
    return [record for place, record in enumerate(records) if place in places or record.get("step") in kept]


def _caption(all_of_them: Sequence[object], rows: Sequence[object]) -> str:
    if len(rows) == len(all_of_them):
        return ""
    return f"{len(rows):,} of {len(all_of_them):,} lines; all are in metrics.jsonl."
