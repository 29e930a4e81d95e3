"""Charts as inline SVG: lines that stretch with the page, text that does not, and a table of the numbers behind each.

Curves are drawn in a box of 1000 by 400 that is stretched to the plot; strokes keep their width. Everything written
stands beside it as HTML, so that it can be read at any width. No curve is told from another by its colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from infctx.html_page import cells, escaped, table
from infctx.report.axes import Axis

WIDTH, HEIGHT = 1000, 400
# Colours and dashes of the style sheet.
NUM_STYLES = 8
LAST_SHARE = 0.97


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A curve.

    Attributes:
        name: in the legend. told: what stands behind it there, as its last value.
        xs, ys: points; a gap where y is None.
        lows, highs: ends of a band around it, None for none.
        style: 0 to NUM_STYLES - 1; colour and dash.
        marks: what each point tells when it is pointed at; () = points are not marked.
        is_faint: drawn thin, behind the others.
    """

    name: str
    told: str = ""
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    lows: tuple[float | None, ...] | None = None
    highs: tuple[float | None, ...] | None = None
    style: int = 0
    marks: tuple[str, ...] = ()
    is_faint: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart and all that is said around it.

    Attributes:
        name: unique in the page, letters and dashes.
        description: what a reader who does not see it should know.
        columns, rows: the table of its numbers. caption: of the table.
        notes: below the plot, sentences.
    """

    name: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_axis: Axis
    y_axis: Axis
    lines: tuple[Line, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    notes: tuple[str, ...] = field(default=())


def render_chart(chart: Chart) -> str:
    """The chart as HTML."""
    notes = [*chart.notes, *_beyond(chart)]
    return (
        f'<figure class="chart" id="{chart.name}">\n'
        f"<figcaption><h3>{escaped(chart.title)}</h3>{_legend(chart.lines)}</figcaption>\n"
        f'<p class="axis" aria-hidden="true">{escaped(chart.y_label)}</p>\n'
        f'<div class="frame">\n{_value_ticks(chart.y_axis)}{_plot(chart)}{_place_ticks(chart.x_axis)}</div>\n'
        f'<p class="axis end-of-axis" aria-hidden="true">{escaped(chart.x_label)}</p>\n'
        + "".join(f'<p class="note">{escaped(note)}</p>\n' for note in notes)
        + f"<details><summary>Numbers of “{escaped(chart.title)}”</summary>\n"
        f"{table(chart.columns, map(cells, chart.rows), caption=chart.caption)}</details>\n</figure>\n"
    )


def _beyond(chart: Chart) -> Iterator[str]:
    axis = chart.y_axis
    if axis.num_above:
        points = "1 point lies" if axis.num_above == 1 else f"{axis.num_above:,} points lie"
        yield f"{points} above the plot, up to {axis.largest:,.4g}."


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li><svg class="sample" viewBox="0 0 34 10" aria-hidden="true">'
        f'<path class="{_kind(line)}" d="M1 5H33"/></svg>'
        f"<bdi>{escaped(line.name)}</bdi>"
        + (f' <span class="quiet">{escaped(line.told)}</span>' if line.told else "")
        + "</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _kind(line: Line) -> str:
    return f"line c{line.style}" + (" faint" if line.is_faint else "")


def _plot(chart: Chart) -> str:
    title, description = f"{chart.name}-title", f"{chart.name}-text"
    levels = "".join(f"M0 {_y(chart.y_axis, value)}H{WIDTH}" for value, _ in chart.y_axis.ticks)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="{title}" aria-describedby="{description}">\n'
        f'<title id="{title}">{escaped(chart.title)}</title>\n'
        f'<desc id="{description}">{escaped(chart.description)}</desc>\n'
        f'<path class="grid" d="{levels}"/>\n'
    ]
    # Bands first, so that no curve is hidden by the band of another.
    parts += [_band(chart, line) for line in chart.lines]
    parts += [f'<path class="{_kind(line)}" d="{path}"/>\n' for line in chart.lines if (path := _curve(chart, line))]
    parts += [_marks(chart, line) for line in chart.lines]
    return "".join([*parts, "</svg>\n"])


def _x(axis: Axis, value: float) -> str:
    return f"{WIDTH * axis.share(value):.1f}".removesuffix(".0")


def _y(axis: Axis, value: float) -> str:
    return f"{HEIGHT * (1 - axis.share(value)):.1f}".removesuffix(".0")


def _runs(ys: Sequence[float | None]) -> Iterator[range]:
    """The stretches of places without a gap."""
    begin = 0
    for place in range(len(ys) + 1):
        if place == len(ys) or ys[place] is None:
            if place > begin:
                yield range(begin, place)
            begin = place + 1


def _curve(chart: Chart, line: Line) -> str:
    pieces = []
    for run in _runs(line.ys):
        points = [f"{_x(chart.x_axis, line.xs[place])} {_y(chart.y_axis, line.ys[place])}" for place in run]  # type: ignore[arg-type]
        # One point alone is a dot: a line without length, whose round ends are drawn.
        pieces.append(f"M{points[0]}L{' '.join(points[1:] or points)}")
    return "".join(pieces)


def _band(chart: Chart, line: Line) -> str:
    if line.lows is None or line.highs is None:
        return ""
    both = [None if low is None or high is None else low for low, high in zip(line.lows, line.highs, strict=True)]
    pieces = []
    for run in _runs(both):
        over = [f"{_x(chart.x_axis, line.xs[place])} {_y(chart.y_axis, line.highs[place])}" for place in run]  # type: ignore[arg-type]
        under = [f"{_x(chart.x_axis, line.xs[place])} {_y(chart.y_axis, line.lows[place])}" for place in reversed(run)]  # type: ignore[arg-type]
        pieces.append(f"M{'L'.join([*over, *under])}Z")
    return f'<path class="band c{line.style}" d="{"".join(pieces)}"/>\n' if pieces else ""


def _marks(chart: Chart, line: Line) -> str:
    return "".join(
        f'<path class="mark c{line.style}" d="M{_x(chart.x_axis, x)} {_y(chart.y_axis, y)}h0">'
        f"<title>{escaped(told)}</title></path>\n"
        for x, y, told in zip(line.xs, line.ys, line.marks, strict=False)
        if y is not None
    )


def _value_ticks(axis: Axis) -> str:
    spans = "".join(
        f'<span style="top:{100 * (1 - axis.share(value)):.4g}%">{escaped(text)}</span>' for value, text in axis.ticks
    )
    return f'<div class="values" aria-hidden="true">{spans}</div>\n'


def _place_ticks(axis: Axis) -> str:
    spans = []
    for number, (value, text) in enumerate(axis.ticks):
        # On a narrow screen every second one is left out, on a very full axis on every screen.
        kinds = ["second" if number % 2 == 0 else "first"] if number % 4 else []
        # What stands at the end of the axis stays inside of the chart.
        kinds += ["last"] if axis.share(value) > LAST_SHARE else []
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        spans.append(f'<span{kind} style="left:{100 * axis.share(value):.4g}%">{escaped(text)}</span>')
    crowded = " crowded" if len(axis.ticks) > 9 else ""
    return f'<div class="places{crowded}" aria-hidden="true">{"".join(spans)}</div>\n'
