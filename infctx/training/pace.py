"""How fast a run goes and how long it will still take, from chunks within a step as well as from steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from infctx.training.progress_numbers import number, set_losses
from infctx.training.step_work import ChunkPlace, SweepTokens

SMOOTHING = 0.9
"""Share of the past in the smoothed loss: it looks back over about ten steps."""
VALIDATION, CHECKPOINT = "validation", "checkpoint"
"""What interrupts the steps of a run."""

# So many steps are looked back on.
RECENT_STEPS = 256
# Against a line through steps of nearly the same length, whose slope is noise: then time is taken as proportional.
SPREAD_THAT_TELLS = 0.1
# Less of a first step, in seconds and as a part of it, tells nothing of the rest.
LEAST_SECONDS, LEAST_PART = 2.0, 1e-3
# Of a step, before its own speed is shown.
LEAST_SECONDS_OF_SPEED = 10.0
# A first step that took longer counts like any other.
MOST_WARM_UP_SECONDS = 120.0
# Chunks of either sweep before what they take is known.
LEAST_CHUNKS = 3
# The pace of the steps before weighs as much as this part of the step under way.
WEIGHT_OF_THE_PAST = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run has before it.

    Attributes:
        first_step: steps done already.
        left: in all further steps, the one under way included.
        backward_cost: a guess, see `guess_backward_cost`.
        validate_every, checkpoint_every: steps, or None; is_validated: there is something to validate on.
        checkpoint_minutes: between checkpoints by the clock, or None.
    """

    first_step: int
    left: SweepTokens
    backward_cost: float = 3.0
    is_validated: bool = False
    validate_every: int | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None


class Pace:
    """Where a run is, how long it will still take, and its loss without the jitter of single steps.

    Args:
        clock: seconds from any fixed moment.
        total_steps: steps of the whole run, those before a resume included; None: not known.
        plan: None: all that is known is the number of steps, which are taken as alike.
    """

    def __init__(self, clock: Callable[[], float], total_steps: int | None = None, plan: RunPlan | None = None) -> None:
        self._clock, self._total_steps, self._plan = clock, total_steps, plan
        self._left = plan.left if plan is not None else None
        self._started = self._step_began = self._chunk_began = self._last_end = clock()
        # Of finished steps: what they had to do, and their seconds with what lay between them and the step before.
        self._steps: deque[tuple[SweepTokens, float]] = deque(maxlen=RECENT_STEPS)
        self._has_warmed_up = False
        self._first_place: ChunkPlace | None = None
        self._sweeps = {False: _SweepTime(), True: _SweepTime()}
        self._interruptions: dict[str, list[float]] = {VALIDATION: [], CHECKPOINT: []}
        self._loss_sum = self._loss_weight = 0.0
        self.current_step = plan.first_step if plan is not None else 0
        self.place: ChunkPlace | None = None
        self.interrupted_by: str | None = None
        self._interrupted_at = 0.0
        self.saved: tuple[int, float] | None = None
        self.val_loss: float | None = None
        self.set_losses: dict[str, float | None] = {}
        self.set_val_losses: dict[str, float | None] = {}

    def chunk(self, place: ChunkPlace) -> None:
        """A chunk is about to be run."""
        now, before = self._clock(), self.place
        if before is None or before.step != place.step:
            self._step_began, self._first_place = now, place
        elif not (before.in_sweep_2 and not place.in_sweep_2):
            # The interval between two windows has the end of one and the beginning of another in it.
            # States that a thinned bank computes again are part of what a chunk of sweep 2 takes.
            is_new = (before.group, before.chunk, before.in_sweep_2) != (place.group, place.chunk, place.in_sweep_2)
            self._sweeps[before.in_sweep_2].add(now - self._chunk_began, before.chunk_tokens if is_new else 0)
        self.place, self._chunk_began = place, now

    def interrupted(self, by: str, seconds: float | None) -> None:
        """A validation or a checkpoint begins, or is done after so many seconds."""
        now = self._clock()
        if seconds is None:
            self.interrupted_by, self._interrupted_at = by, now
            return
        self.interrupted_by = None
        self._interruptions[by].append(seconds)
        # What is measured goes on where it was.
        self._step_began, self._chunk_began = self._step_began + seconds, self._chunk_began + seconds
        self._last_end += seconds
        if by == CHECKPOINT:
            self.saved = (self.current_step, now)

    def step(self, report: Mapping[str, object]) -> None:
        """Take note of a finished step."""
        now = self._clock()
        self.current_step = int(number(report, "step") or self.current_step + 1)
        done = self.place.total if self.place is not None else self._mean_of_what_is_left()
        if self._left is not None:
            self._left = self._left.plus(done, -1.0)
        self._note_step(done, now - self._last_end, report)
        self._last_end, self.place = now, None
        loss = number(report, "loss")
        if loss is not None:
            self._loss_sum = SMOOTHING * self._loss_sum + (1 - SMOOTHING) * loss
            self._loss_weight = SMOOTHING * self._loss_weight + (1 - SMOOTHING)
        val_loss = number(report, "val_loss")
        self.val_loss = self.val_loss if val_loss is None else val_loss
        # A step need not have read every set.
        self.set_losses |= set_losses(report, "sets")
        self.set_val_losses |= set_losses(report, "val_loss_by_set")

    def _mean_of_what_is_left(self) -> SweepTokens:
        """What stands for a step whose chunks nobody told of."""
        if self._left is None or self._total_steps is None:
            return SweepTokens(backward=1.0)
        num_left = max(1, self._total_steps - self.current_step + 1)
        return SweepTokens().plus(self._left, 1 / num_left)

    def _note_step(self, done: SweepTokens, seconds: float, report: Mapping[str, object]) -> None:
        began = self._first_place
        if self.place is not None and began is not None and began.done.work(1.0) > 0:
            # An earlier process had begun it, and its seconds are in the report.
            seconds = max(seconds, number(report, "seconds") or 0.0)
        if len(self._steps) == 1 and not self._has_warmed_up:
            self._has_warmed_up = True
            if self._steps[0][1] < MOST_WARM_UP_SECONDS:
                # The first one has the warm-up of everything in it.
                self._steps.clear()
        self._steps.append((done, max(seconds, 0.0)))

    @property
    def smoothed_loss(self) -> float | None:
        """Moving average of the finite losses; None before the first."""
        return self._loss_sum / self._loss_weight if self._loss_weight else None

    @property
    def is_last(self) -> bool:
        """Whether the run's last step is done."""
        return self._total_steps is not None and self.current_step >= self._total_steps

    @property
    def fraction(self) -> float | None:
        """Of the run's work, the part that is done, 0 to 1; None where its end is not known."""
        if self._total_steps is None:
            return None
        within = 0.0
        if self.place is not None:
            within = self.place.done.work(self._backward_cost()) / self.place.total.work(self._backward_cost())
        return min(1.0, (self.current_step + within) / max(1, self._total_steps))

    @property
    def elapsed_seconds(self) -> float:
        """Since the run began or went on."""
        return self._clock() - self._started

    @property
    def seconds_since_saved(self) -> float | None:
        """Since the last checkpoint; None before the first."""
        return None if self.saved is None else self._clock() - self.saved[1]

    def tokens_per_second(self, report: Mapping[str, object]) -> float | None:
        """Of the step under way once that has run for a while, else of the last one, whose report this is."""
        work, seconds = self._this_step()
        if self.place is not None and work > 0 and seconds >= LEAST_SECONDS_OF_SPEED:
            return self.place.step_tokens * work / self.place.total.work(self._backward_cost()) / seconds
        return number(report, "tokens_per_second")

    def position(self) -> str:
        """The step and how many there will be, where that is known."""
        return f"{self.current_step}" if self._total_steps is None else f"{self.current_step}/{self._total_steps}"

    def remaining_seconds(self) -> float | None:
        """Seconds to the end at the pace so far, validation and checkpoints included; None: not known yet."""
        if self._total_steps is None:
            return None
        if self.is_last:
            return 0.0
        pace = self._fit()
        if pace is None:
            return None
        a_step, a_token = pace
        steps_left, cost = self._total_steps - self.current_step, self._backward_cost()
        if self._left is None:
            return (a_step + a_token * cost) * steps_left
        left = max(0.0, self._left.work(cost))
        if self.place is None:
            seconds = a_step * steps_left + a_token * left
        else:
            total, done = self.place.total.work(cost), self.place.done.work(cost)
            seconds = a_step * (steps_left - 1) + a_token * max(0.0, left - total)
            seconds += (total - done) * self._pace_of_this_step(a_step, a_token) + a_step
        return seconds + self._interruptions_left(seconds)

    def _backward_cost(self) -> float:
        forward, backward = self._sweeps[False].seconds_a_token, self._sweeps[True].seconds_a_token
        if forward is not None and backward is not None:
            return backward / forward
        return self._plan.backward_cost if self._plan is not None else 1.0

    def _this_step(self) -> tuple[float, float]:
        """Of the step under way, the work this process has done, and its seconds."""
        if self.place is None or self._first_place is None:
            return 0.0, 0.0
        cost = self._backward_cost()
        # Up to the last chunk that was begun: what is done of that one is not known.
        return self.place.done.work(cost) - self._first_place.done.work(cost), self._chunk_began - self._step_began

    def _pace_of_this_step(self, a_step: float, a_token: float) -> float:
        """Seconds for each token of work, from this step and a little from those before it."""
        work, seconds = self._this_step()
        if not self._steps:
            return a_token
        assert self.place is not None
        past = WEIGHT_OF_THE_PAST * self.place.total.work(self._backward_cost())
        return (past * a_token + seconds) / (past + work)

    def _fit(self) -> tuple[float, float] | None:
        """Seconds of a step whatever its length, and seconds of a token of work in it."""
        cost = self._backward_cost()
        points = [(done.work(cost), seconds) for done, seconds in self._steps]
        work, seconds = self._this_step()
        mean_seconds = sum(seconds for _, seconds in points) / len(points) if points else 0.0
        if not points and (seconds < LEAST_SECONDS or work < LEAST_PART * self.place.total.work(cost)):  # type: ignore[union-attr]
            return None
        if seconds > max(mean_seconds, LEAST_SECONDS) and work > 0:
            points.append((work, seconds))
        mean_work = sum(work for work, _ in points) / len(points)
        mean_seconds = sum(seconds for _, seconds in points) / len(points)
        if mean_work <= 0:
            return mean_seconds, 0.0
        # In units of the mean work. The line goes through the means, and its foot is drawn to 0 where the lengths
        # hardly differ.
        spread = sum((work / mean_work - 1) ** 2 for work, _ in points) / len(points)
        slope = sum((work / mean_work - 1) * (seconds - mean_seconds) for work, seconds in points) / len(points)
        slope = (slope + SPREAD_THAT_TELLS**2 * mean_seconds) / (spread + SPREAD_THAT_TELLS**2)
        slope = min(max(slope, 0.0), mean_seconds)
        return mean_seconds - slope, slope / mean_work

    def _interruptions_left(self, seconds: float) -> float:
        """Seconds of the validations and checkpoints of a run that goes on for so many seconds beside them."""
        plan, total = self._plan, self._total_steps
        assert total is not None
        if plan is None:
            return 0.0
        num_validations = _multiples(plan.validate_every, self.current_step, total - 1) + 1 if plan.is_validated else 0
        num_checkpoints = _multiples(plan.checkpoint_every, self.current_step, total - 1) + 1.0
        if plan.checkpoint_minutes is not None:
            num_checkpoints = max(num_checkpoints, seconds / (60 * plan.checkpoint_minutes))
        left = num_validations * _mean(self._interruptions[VALIDATION])
        left += num_checkpoints * _mean(self._interruptions[CHECKPOINT])
        if self.interrupted_by is not None:
            expected = _mean(self._interruptions[self.interrupted_by])
            left += max(0.0, expected - (self._clock() - self._interrupted_at))
        return left


class _SweepTime:
    """What a sweep takes."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0
        self._chunks = 0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds, self._tokens, self._chunks = (
            self._seconds + seconds,
            self._tokens + tokens,
            self._chunks + (tokens > 0),
        )

    @property
    def seconds_a_token(self) -> float | None:
        return self._seconds / self._tokens if self._chunks >= LEAST_CHUNKS and self._seconds > 0 else None


def _multiples(every: int | None, after: int, up_to: int) -> int:
    """How many multiples of a number lie behind one number and up to another."""
    return max(0, up_to // every - after // every) if every is not None else 0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
