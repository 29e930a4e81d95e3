"""The statistics on synthetic clocks, where the right answer is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median

import pytest

from infctx.bench.pairs import (
    MOST_CALLS_OF_A_SAMPLE,
    WARM_UP_CALLS,
    PairTimes,
    median_interval,
    time_on_cpu,
    time_pairs,
)


class Machine:
    """Calls that say how long they take, and a clock that adds it up. pace: multiplies the time of each sample."""

    def __init__(self, pace: Callable[[int], float] = lambda sample: 1.0) -> None:
        self.pace = pace
        self.now = 0.0
        self.samples: list[tuple[str, int]] = []

    def call(self, name: str, seconds: float) -> Callable[[], object]:
        return lambda: (name, seconds)

    def timer(self, call: Callable[[], object], num_calls: int) -> float:
        name, seconds = call()
        taken = seconds * self.pace(len(self.samples))
        self.samples.append((name, num_calls))
        self.now += taken * num_calls
        return taken

    def run(self, seconds: tuple[float, ...], **settings: object) -> PairTimes:
        calls = [self.call(name, one) for name, one in zip("AB", seconds, strict=False)]
        other = calls[1] if len(calls) > 1 else None
        return time_pairs(calls[0], other, self.timer, clock=lambda: self.now, **settings)


def test_strictly_in_turn_after_the_warm_up() -> None:
    machine = Machine()
    times = machine.run((1.0, 3.0), num_pairs=4)
    order = "".join(name for name, _ in machine.samples)
    assert order == "A" * WARM_UP_CALLS + "B" * WARM_UP_CALLS + "ABABABABA"
    assert times == PairTimes(ours=(1.0,) * 5, other=(3.0,) * 4)
    assert times.ratios == [3.0] * 4
    assert times.ratios_of_ours == [1.0] * 4


def test_alone() -> None:
    machine = Machine()
    times = machine.run((2.0,), num_pairs=3)
    assert times == PairTimes(ours=(2.0,) * 4)
    assert times.ratios == []
    assert times.ratios_of_ours == [1.0] * 3
    assert times.num_pairs == 3


def test_a_drift_changes_no_ratio() -> None:
    times = Machine(lambda sample: 1.0 + 0.02 * sample).run((1.0, 3.0), num_pairs=20)
    assert max(times.ours) > 1.5 * min(times.ours)
    assert times.ratios == pytest.approx([3.0] * 20, rel=1e-12)
    assert median(times.ratios_of_ours) == pytest.approx(1.0, abs=0.005)


def test_disturbed_samples_are_a_few_among_many() -> None:
    source = random.Random(1)
    times = Machine(lambda sample: 9.0 if source.random() < 0.1 else 1.0).run((1.0, 3.0), num_pairs=31)
    assert max(times.ours) == 9.0
    assert median(times.ratios) == 3.0
    assert median(times.ratios_of_ours) == 1.0


def test_a_noisy_machine_is_seen() -> None:
    # Every second sample of A is slower: no drift, and nothing that a median over all of them would show.
    times = Machine(lambda sample: 1.2 if sample % 4 == 0 else 1.0).run((1.0, 3.0), num_pairs=20)
    assert abs(median(times.ratios_of_ours) - 1.0) > 0.1


def test_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    source = random.Random(2)
    num_held = 0
    for _ in range(60):
        times = Machine(lambda sample: source.lognormvariate(0.0, 0.1)).run((1.0, 3.0), num_pairs=15)
        low, high = median_interval(times.ratios)
        assert low <= median(times.ratios) <= high
        assert high < 3.0 * 1.4
        num_held += low <= 3.0 <= high
    assert num_held >= 51, f"{num_held} of 60 intervals hold the true ratio"


def test_interval_of_little() -> None:
    assert median_interval([2.0]) is None
    assert median_interval([2.0, 3.0]) == (2.0, 3.0)
    assert median_interval([2.0] * 15) == (2.0, 2.0)
    values = [1.0, 2.0, 4.0, 3.0, 2.5]
    assert median_interval(values) == median_interval(values)


def test_a_sample_is_long_enough() -> None:
    machine = Machine()
    times = machine.run((0.001, 0.004), num_pairs=2, sample_seconds=0.01)
    assert machine.samples[2 * WARM_UP_CALLS :] == [("A", 10), ("B", 3), ("A", 10), ("B", 3), ("A", 10)]
    assert times.ratios == [4.0, 4.0]
    machine = Machine()
    machine.run((1e-9,), num_pairs=1, sample_seconds=1.0)
    assert machine.samples[-1] == ("A", MOST_CALLS_OF_A_SAMPLE)


def test_the_limit_ends_it_after_the_first_pair() -> None:
    assert Machine().run((1.0, 3.0), num_pairs=100, seconds_limit=0.0).num_pairs == 1
    # One A, then 4 s a pair: the fifth begins at 17 s.
    assert Machine().run((1.0, 3.0), num_pairs=100, seconds_limit=16.0).num_pairs == 4


def test_the_clock_of_the_cpu() -> None:
    calls = []
    seconds = time_on_cpu(lambda: calls.append(0), 5)
    assert len(calls) == 5
    assert 0 < seconds < 1
