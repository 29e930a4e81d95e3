"""Curves, axes and charts: nothing is hidden by making it small, and every point lies where its number says."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from infctx.report.axes import bucket_axis, position_text, step_axis, value_axis
from infctx.report.charts import HEIGHT, WIDTH, Chart, Line, render_chart
from infctx.report.curves import last_of_each, smoothed, smoothing_span, thinned


def test_a_thinned_curve_keeps_every_extreme_and_every_mean() -> None:
    xs = list(range(1, 1001))
    ys = [math.sin(x / 40) + (50.0 if x == 777 else 0.0) - (9.0 if x == 13 else 0.0) for x in xs]
    curve = thinned(xs, ys, most=37)
    assert len(curve.xs) == 37
    assert curve.xs[-1] == 1000
    assert curve.lows is not None
    assert curve.highs is not None
    begins = [number * 1000 // 37 for number in range(38)]
    for number, (begin, end) in enumerate(pairwise(begins)):
        part = ys[begin:end]
        assert curve.lows[number] == min(part)
        assert curve.highs[number] == max(part)
        assert curve.ys[number] == pytest.approx(sum(part) / len(part))
    assert (min(curve.lows), max(curve.highs)) == (min(ys), max(ys))


def test_few_points_are_left_as_they_are_and_gaps_stay() -> None:
    curve = thinned([1, 2, 3, 4], [1.0, None, math.nan, 2.0])
    assert curve.ys == (1.0, None, None, 2.0)
    assert curve.lows is None
    gaps = thinned(list(range(40)), [None] * 20 + [1.0] * 20, most=4)
    assert gaps.ys == (None, None, 1.0, 1.0)


def test_smoothing_by_the_formula() -> None:
    ys = [3.0, None, 1.0, math.inf, 2.0]
    keep = math.exp(-1 / 5)
    known = [3.0, 1.0, 2.0]
    expected = [
        sum(keep ** (last - i) * known[i] for i in range(last + 1)) / sum(keep ** (last - i) for i in range(last + 1))
        for last in (0, 0, 1, 1, 2)
    ]
    assert smoothed(ys, span=5) == pytest.approx(expected)
    assert smoothed([None, 1.0], span=5) == [None, 1.0]
    assert (smoothing_span(10), smoothing_span(100_000)) == (8, 2000)


def test_another_series_at_the_points_of_a_thinned_one() -> None:
    xs = list(range(10))
    curve = last_of_each(thinned(xs, xs, most=3), xs, [x * x for x in xs])
    assert curve.ys == (4, 25, 81)


@pytest.mark.parametrize(
    ("values", "from_zero", "texts"),
    [
        ([1.21, 0.79], False, ["0.7", "0.8", "0.9", "1.0", "1.1", "1.2", "1.3"]),
        ([2.0], False, ["1.8", "1.9", "2.0", "2.1", "2.2"]),
        ([0.0, 17_000.0], True, ["0", "5,000", "10,000", "15,000", "20,000"]),
        ([0.0, 2e-4], True, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        ([0.0, 1e9], True, ["0", "2e8", "4e8", "6e8", "8e8", "1e9"]),
        ([], True, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.0], True, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([-1.0, 1.0], False, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values: list[float], from_zero: bool, texts: list[str]) -> None:
    axis = value_axis(values, from_zero=from_zero)
    assert [text for _, text in axis.ticks] == texts
    assert axis.num_above == 0
    assert all(axis.low <= value <= axis.high for value in values)
    assert [axis.share(axis.low), axis.share(axis.high)] == [0, 1]


def test_what_lies_far_above_is_counted_and_not_shown() -> None:
    values = [2.0 + number / 100 for number in range(100)] + [60.0]
    axis = value_axis(values)
    assert axis.high < 5
    assert (axis.num_above, axis.largest) == (1, 60.0)
    # What belongs to the course of the curve is no outlier: a loss that falls from 11 to 2.
    assert value_axis([2.0 + 9 * math.exp(-number / 20) for number in range(400)]).num_above == 0


def test_axes_of_steps_and_positions() -> None:
    assert [text for _, text in step_axis(0, 333).ticks] == ["0", "100", "200", "300"]
    assert [text for _, text in step_axis(1, 1).ticks] == ["1", "2"]
    assert [position_text(edge) for edge in (0, 16, 1023, 1024, 1536, 65536, 2**20)] == [
        "0", "16", "1,023", "1K", "1,536", "64K", "1M",
    ]  # fmt: skip
    assert bucket_axis((0, 16, 32)).ticks == ((0.0, "0"), (1.0, "16"), (2.0, "32"))


def test_points_lie_where_their_numbers_say() -> None:
    line = Line(
        name="<a>", xs=(0, 5, 10), ys=(0.0, None, 4.0), lows=(0.0, None, 3.0), highs=(1.0, None, 5.0), marks=("m",) * 3
    )
    chart = Chart(
        name="c", title="T & t", description="D", x_label="x", y_label="y",
        x_axis=step_axis(0, 10), y_axis=value_axis([0.0, 5.0]), lines=(line,), columns=("a",), rows=(("<1>",),),
    )  # fmt: skip
    drawn = render_chart(chart)
    assert (WIDTH, HEIGHT) == (1000, 400)
    # 4 of 5 up from the lower edge of 400 is 80 from the upper one; alone between gaps each point is a dot.
    assert 'class="line c0" d="M0 400L0 400M1000 80L1000 80"' in drawn
    assert 'class="band c0" d="M0 320L0 400ZM1000 0L1000 160Z"' in drawn
    assert re.findall(r'class="mark c0" d="(.*?)"', drawn) == ["M0 400h0", "M1000 80h0"]
    assert "<bdi>&lt;a&gt;</bdi>" in drawn
    assert "&lt;1&gt;" in drawn
    assert "T &amp; t" in drawn
