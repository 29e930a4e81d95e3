"""Interleaved timing of two calls, and what the ratio of their times says.

Both are timed in one process, strictly in turn: A B A B … A. Each B is divided by the mean of the A before and the A
after it, so that a machine that slowly grows faster or slower leaves the ratio as it is, and every call follows one of
the other: none finds its data in a cache because it has just run. The ratio of each pair is taken first and then the
median, so that a disturbed pair is one ratio among many.

The same samples say how quiet the machine was: every second A divided by its neighbours, the A / A ratio, should be 1.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

Call = Callable[[], object]
# Runs a call so many times and returns the seconds of one.
Timer = Callable[[Call, int], float]

WARM_UP_CALLS = 3
MOST_CALLS_OF_A_SAMPLE = 200
RESAMPLES = 2000


def time_on_cpu(call: Call, num_calls: int) -> float:
    """Seconds of one call by the wall clock, the mean of so many."""
    began = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - began) / num_calls


def time_on_cuda(call: Call, num_calls: int) -> float:
    """Seconds of one call on the current CUDA device, between two events, the mean of so many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / num_calls


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTimes:
    """Seconds in the order they were measured, one more of ours than of the other. other: empty if ours ran alone."""

    ours: tuple[float, ...]
    other: tuple[float, ...] = ()

    @property
    def num_pairs(self) -> int:
        """Ratios of each kind."""
        return len(self.ours) - 1

    @property
    def ratios(self) -> list[float]:
        """The other's time over that of ours beside it, pair by pair; none where ours ran alone."""
        pairs = pairwise(self.ours) if self.other else ()
        return [other / ((before + after) / 2) for other, (before, after) in zip(self.other, pairs, strict=True)]

    @property
    def ratios_of_ours(self) -> list[float]:
        """Ours over ours, the next or the one before in turn: 1 on a quiet machine, also on one that drifts."""
        return [
            after / before if number % 2 == 0 else before / after
            for number, (before, after) in enumerate(pairwise(self.ours))
        ]


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the median lies with 95 %, by the bootstrap: the same each time; None for a single value."""
    if len(values) < 2:
        return None
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    medians = torch.tensor(values, dtype=torch.float64)[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def time_pairs(
    ours: Call,
    other: Call | None,
    timer: Timer,
    *,
    num_pairs: int,
    sample_seconds: float = 0.0,
    seconds_limit: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> PairTimes:
    """Warm up and time two calls in turn, or one alone.

    Args:
        num_pairs: >= 1.
        sample_seconds: a sample is as many calls as are expected to take so long, at least one.
        seconds_limit: no further pair begins after so many seconds of timing; the first is always taken.
    """
    calls_of_ours = _warm_up(ours, timer, sample_seconds)
    calls_of_other = 0 if other is None else _warm_up(other, timer, sample_seconds)
    times_of_other: list[float] = []
    with _no_garbage_collection():
        began = clock()
        times_of_ours = [timer(ours, calls_of_ours)]
        for number in range(num_pairs):
            if number and seconds_limit is not None and clock() - began > seconds_limit:
                break
            if other is not None:
                times_of_other.append(timer(other, calls_of_other))
            times_of_ours.append(timer(ours, calls_of_ours))
    return PairTimes(ours=tuple(times_of_ours), other=tuple(times_of_other))


def _warm_up(call: Call, timer: Timer, sample_seconds: float) -> int:
    """Run a call before it counts. Returns the number of calls of a sample."""
    fastest = min(timer(call, 1) for _ in range(WARM_UP_CALLS))
    wanted = math.ceil(sample_seconds / fastest) if fastest > 0 else 1
    return min(max(wanted, 1), MOST_CALLS_OF_A_SAMPLE)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """It would stop one call and not the other."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
