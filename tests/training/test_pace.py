"""How long a run will still take: with a clock that is moved by hand, and documents of every length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from infctx.data.document import Document
from infctx.data.stream import DocumentSource
from infctx.training.pace import CHECKPOINT, VALIDATION, Pace, RunPlan
from infctx.training.step_place import WalkPlace
from infctx.training.step_work import StepWork, SweepTokens, sweep_tokens


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def report(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 2.345, "seconds": 1.0, "tokens_per_second": 10.0, **more}


def test_without_a_plan_steps_are_alike_and_the_first_is_left_out() -> None:
    clock = FakeClock()
    pace = Pace(clock, 100)
    assert pace.remaining_seconds() is None
    clock.seconds += 60
    pace.step(report(51))
    assert pace.remaining_seconds() == pytest.approx(49 * 60)
    clock.seconds += 2
    pace.step(report(52))
    assert pace.remaining_seconds() == pytest.approx(48 * 2)
    clock.seconds += 4
    pace.step(report(53))
    assert pace.remaining_seconds() == pytest.approx(47 * 3)
    pace.step(report(100))
    assert pace.remaining_seconds() == 0


def test_smoothed_loss_is_a_mean_from_the_first_step_on() -> None:
    pace = Pace(FakeClock(), 10)
    assert pace.smoothed_loss is None
    pace.step(report(1, loss=4.0))
    assert pace.smoothed_loss == pytest.approx(4.0)
    pace.step(report(2, loss=float("nan")))
    assert pace.smoothed_loss == pytest.approx(4.0)
    pace.step(report(3, loss=2.0))
    assert pace.smoothed_loss == pytest.approx((0.9 * 4 + 2) / 1.9)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What takes how long, in seconds; tokens are of a row in sweep 1, `backward` is a factor for sweep 2."""

    token: float
    backward: float
    step: float = 0.2
    warm_up: float = 3.0
    validation: float = 0.0
    checkpoint: float = 1.5
    noise: float = 0.05


CHUNK = 1024
EVERY = 25


def walk(num_chunks: int, window: int | str) -> Iterator[WalkPlace]:
    """The chunks of a group in the order in which both sweeps go through them."""
    length = num_chunks if window == "document" else int(window)
    for first in range(0, num_chunks, length):
        end = min(first + length, num_chunks)
        yield from (WalkPlace(first, chunk, False) for chunk in range(first, end - 1))
        yield from (WalkPlace(first, chunk, True) for chunk in reversed(range(first, end)))


def etas(lengths: Sequence[int], machine: Machine, *, window: int | str, epochs: int = 1) -> list[tuple[float, float]]:
    """Train documents of these lengths; gives at every event the seconds so far and what Pace says is left."""
    random, clock, told = np.random.default_rng(0), FakeClock(), []
    documents = [
        Document(tokens=np.ones(n, np.uint16), weights=np.r_[0, np.ones(n - 1)].astype(np.float32), origin=f"a:{n}")
        for n in lengths
    ]
    source = DocumentSource(documents, rows=2, accumulate=1, chunk_tokens=CHUNK, seed=0, epochs=epochs)
    began = clock.seconds
    left = sweep_tokens(source.row_lengths_left(), chunk_tokens=CHUNK, window=window)
    plan = RunPlan(
        first_step=0,
        left=left,
        backward_cost=3.0,
        is_validated=machine.validation > 0,
        validate_every=EVERY,
        checkpoint_every=EVERY,
    )
    pace = Pace(clock, source.total_steps, plan)

    def interrupt(by: str, seconds: float) -> None:
        pace.interrupted(by, None)
        clock.seconds += seconds
        pace.interrupted(by, seconds)

    def note() -> None:
        eta = pace.remaining_seconds()
        told.append((clock.seconds - began, math.nan if eta is None else eta))

    if machine.validation:
        interrupt(VALIDATION, machine.validation)
    step = 0
    while (data := source.next_step()) is not None:
        step += 1
        work, group = StepWork(step, data, window), data.groups[0]
        for place in walk(len(group.chunks), window):
            here = work.place(0, place)
            pace.chunk(here)
            note()
            seconds = machine.token * here.chunk_tokens * (machine.backward if place.in_sweep_2 else 1)
            clock.seconds += seconds * math.exp(machine.noise * random.standard_normal())
        clock.seconds += machine.step + (machine.warm_up if step == 1 else 0)
        is_due = step % EVERY == 0 or step == source.total_steps
        if is_due and machine.validation:
            interrupt(VALIDATION, machine.validation)
        pace.step(report(step))
        if is_due:
            interrupt(CHECKPOINT, machine.checkpoint)
        note()
    end = clock.seconds - began
    return [(seconds, seconds + eta - end) for seconds, eta in told if not math.isnan(eta)] + [(end, 0.0)]


def worst_error(found: list[tuple[float, float]]) -> float:
    """After a minute, the largest error beside what is really left; the last tenth of a run is not looked at."""
    end = found[-1][0]
    errors = [abs(error) / (end - seconds) for seconds, error in found if 60 <= seconds <= 0.9 * end]
    assert len(errors) > 10
    return max(errors)


def log_normal(number: int, median: float, sigma: float) -> list[int]:
    return np.maximum(2, np.random.default_rng(1).lognormal(math.log(median), sigma, number)).astype(int).tolist()


UNIFORM = [4000] * 400
HUGE = [*[1500] * 200, 1_500_000]
CASES = {
    "uniform": (UNIFORM, Machine(token=2e-4, backward=3.6), "document"),
    "log-normal": (log_normal(600, 3000, 1.2), Machine(token=2e-4, backward=3.6, validation=8.0), "document"),
    "log-normal, short ones": (log_normal(3000, 300, 1.0), Machine(token=2e-4, backward=3.0, step=0.5), "document"),
    "log-normal, window 4": (log_normal(600, 3000, 1.2), Machine(token=2e-4, backward=3.0), 4),
    "log-normal, another sweep 2": (log_normal(600, 3000, 1.2), Machine(token=2e-4, backward=4.8), "document"),
    "one huge document": (HUGE, Machine(token=2e-4, backward=3.0), "document"),
    "short ones and some long": (
        [*[60] * 900, *[150_000] * 4],
        Machine(token=2e-4, backward=3.0, step=0.5),
        "document",
    ),
    "nothing but one huge document": ([1_500_000], Machine(token=2e-4, backward=3.3), "document"),
    "uniform, slow validation": (UNIFORM, Machine(token=2e-4, backward=3.6, validation=40.0), "document"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_time_that_is_left_is_right_within_a_fifth_after_a_minute(case: str) -> None:
    lengths, machine, window = CASES[case]
    error = worst_error(etas(lengths, machine, window=window))
    print(f"{case}: {error:.1%}")
    assert error < 0.2


def test_within_a_first_step_the_guess_of_sweep_2_decides_until_it_is_measured() -> None:
    found = etas([1_500_000], Machine(token=2e-4, backward=4.5), window="document")
    end = found[-1][0]
    in_sweep_1 = [error / (end - seconds) for seconds, error in found if 60 <= seconds <= 250]
    in_sweep_2 = [abs(error) / (end - seconds) for seconds, error in found if 320 <= seconds <= 0.9 * end]
    assert -0.34 < min(in_sweep_1) < -0.2
    assert max(in_sweep_2) < 0.05


def test_checkpoints_by_the_clock_are_counted_in() -> None:
    clock = FakeClock()
    plan = RunPlan(first_step=0, left=SweepTokens(backward=100.0), checkpoint_minutes=1.0)
    pace = Pace(clock, 100, plan)
    pace.interrupted(CHECKPOINT, None)
    clock.seconds += 6
    pace.interrupted(CHECKPOINT, 6.0)
    for step in (1, 2):
        clock.seconds += 6
        pace.step(report(step))
    # 588 seconds of steps, and a checkpoint of 6 in each minute of them.
    assert pace.remaining_seconds() == pytest.approx(588 + 9.8 * 6)
    assert pace.saved == (0, pytest.approx(106.0))


def test_a_step_that_goes_on_after_a_resume_counts_from_where_it_was() -> None:
    documents = [Document(tokens=np.ones(8192, np.uint16), weights=np.zeros(8192, np.float32), origin="a")]
    source = DocumentSource(documents, rows=1, accumulate=1, chunk_tokens=CHUNK, seed=0, steps=1)
    plan = RunPlan(
        first_step=0,
        left=sweep_tokens(source.row_lengths_left(), chunk_tokens=CHUNK, window="document"),
        backward_cost=3.0,
    )
    clock = FakeClock()
    pace = Pace(clock, 1, plan)
    data = source.next_step()
    assert data is not None
    work = StepWork(1, data, "document")
    for chunk in range(6, 2, -1):
        pace.chunk(work.place(0, WalkPlace(0, chunk, True)))
        clock.seconds += 3.0
    # The chunk that was begun and the two before it.
    assert pace.remaining_seconds() == pytest.approx(4 * 3.0)
    assert pace.tokens_per_second({"tokens_per_second": 1.0}) == 1.0, "a few seconds of a step are no speed"
