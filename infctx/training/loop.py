"""The run: steps, validation, checkpoints, signals. It knows no engine and no recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from infctx.data.step_source import StepData
from infctx.errors import InfctxError, MachineError, memory_fault
from infctx.model.state import ModelState
from infctx.training.bptt import draws_random_numbers
from infctx.training.host_memory import peak_host_bytes
from infctx.training.memory_ladder import shorten_chunks
from infctx.training.pace import CHECKPOINT, VALIDATION
from infctx.training.resume import resume_run, save_run
from infctx.training.run import Done, Place, Run
from infctx.training.set_losses import report_sets
from infctx.training.signals import StopRequested, StopSignals
from infctx.training.step import StepGradient, step_gradient, take_step
from infctx.training.step_place import StepPlace, WalkPlace, random_state, set_random_state
from infctx.training.step_work import StepWork
from infctx.training.telling import MOST_NAMED, StepDone, interruption, look_for_spike, named, plan_of
from infctx.training.validation import ValidationLoss, validation_loss

# Of every line of metrics.jsonl; the line before the first step has nulls where nothing was done. chunks, chunk_tokens
# and window are as the step was cut in the end; recompute_difference: the largest, relative.
STEP_KEYS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "chunks",
    "chunk_tokens",
    "window",
    "carried_rows",
    "recompute_difference",
    "peak_device_bytes",
    "peak_host_bytes",
    "seconds",
)


# Between the states of the two sweeps, relative. bf16 keeps 8 bits; a GPU may add up in another order.
LARGEST_DIFFERENCE = 1e-2
# See StopSignals.
SECONDS_OF_ONE_SIGNAL = 2.0


def train(run: Run) -> Done:
    """Train to the end, from the newest checkpoint of the folder if there is one.

    Raises:
        StopRequested: a signal came; a checkpoint of where the run was is on disk.
        InfctxError: too many steps in a row had a gradient that is not finite.
        MachineError: the memory is too small, however short the chunks.
    """
    done, place = resume_run(run)
    run.progress.start(run.source.total_steps, list(run.headline), plan_of(run, done))
    try:
        with StopSignals(counts_as_one=SECONDS_OF_ONE_SIGNAL if run.engine.ranks.size > 1 else 0.0) as signals:
            return _run_steps(run, done, place, signals)
    finally:
        run.loggers.finish()
        run.progress.finish()


class _Saver:
    """Writes checkpoints, and knows when the last one was."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._saved_at = time.monotonic()

    def save(self, done: Done, place: Place) -> None:
        ranks = self._run.engine.ranks
        ranks.at(f"the checkpoint of step {done.step}")
        with interruption(self._run, CHECKPOINT):
            save_run(self._run, done, place)
        ranks.at(f"the end of the checkpoint of step {done.step}")
        self._saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        minutes = self._run.settings.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes


def _run_steps(run: Run, done: Done, place: Place, signals: StopSignals) -> Done:
    saver = _Saver(run)
    if done.step == 0 and run.validation and done.first_val_loss is None:
        done.owed = dict.fromkeys(STEP_KEYS) | {"step": 0, "tokens": 0}
    while True:
        try:
            _settle(run, done, place, signals, saver)
            data = run.source.next_step()
            if data is None:
                break
            row_states = _one_step(run, done, data, place, signals, saver)
        except StopRequested:
            saver.save(done, place)
            where = f"after step {done.step}"
            if place.under_way is not None:
                where = f"inside step {done.step + 1}, {place.under_way.in_words()}"
            run.progress.message(f"stopped by {signals.name} {where}; a checkpoint is written")
            raise
        place = Place(cursor=run.source.cursor(), random_state=random_state(run.device), row_states=row_states)
    saver.save(done, place)
    return done


def _settle(run: Run, done: Done, place: Place, signals: StopSignals, saver: _Saver) -> None:
    """What is owed after a step: validation, its line of metrics, a checkpoint."""
    if done.owed is None:
        return
    record, settings = done.owed, run.settings
    is_ahead = done.step < run.source.total_steps
    is_due = not is_ahead or done.step == 0 or _every(settings.validate_every, done.step)
    if run.validation and is_due:
        names = run.validation_set_names or run.set_names
        with interruption(run, VALIDATION):
            measured = _validate(run, done, signals, num_sets=len(names))
        done.val_loss = record["val_loss"] = _finite(measured.loss)
        if measured.by_set:
            record["val_loss_by_set"] = {names[index]: loss for index, loss in measured.by_set.items()}
        if done.step == 0:
            done.first_val_loss = done.val_loss
    done.owed = None
    if run.engine.ranks.is_first:
        run.metrics.append(record)
        run.loggers.append(record)
    if done.step > 0:
        run.progress.step(record)
    elif done.val_loss is not None:
        run.progress.message(f"validation loss before training: {done.val_loss:.4f}")
    is_lost = done.nonfinite_in_a_row >= settings.max_nonfinite_steps
    if is_lost or (is_ahead and done.step > 0 and _every(settings.checkpoint_every, done.step)):
        saver.save(done, place)
    if is_lost:
        error = InfctxError(
            f"step {done.step}: the gradient was not finite in {done.nonfinite_in_a_row} steps in a row, so the "
            f"weights are still those of step {done.step - done.nonfinite_in_a_row}; they are saved in "
            f"{run.folder / 'checkpoints'}. Lower optimizer.lr or look at the data."
        )
        error.is_shared, error.is_told = True, not run.engine.ranks.is_first
        raise error


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0


def _one_step(
    run: Run, done: Done, data: StepData, place: Place, signals: StopSignals, saver: _Saver
) -> list[ModelState]:
    """Run a step and note what it did; returns the rows' states for the next one."""
    rate = run.learning_rate.apply_(run.engine.optimizer, done.step)
    num_carried = sum(state.wkv.shape[1] for state in place.row_states) if data.carries_state else 0
    num_carried *= run.engine.ranks.data_size
    run.model.train()
    gradient, data = _gradient_that_fits(run, done, data, place, signals, saver)
    began = time.perf_counter()
    report = take_step(gradient, data, engine=run.engine, clip=run.settings.clip)
    if run.averaged is not None and report.not_updated is None:
        run.averaged.update_()
    seconds = gradient.seconds + time.perf_counter() - began
    done.step += 1
    done.tokens += report.num_tokens
    done.train_loss = _finite(report.loss) if report.loss is not None else done.train_loss
    done.steps_without_target += report.loss is None
    of_ranks = run.engine.ranks.gather((gradient.largest_difference, _peak_device_bytes(run.device), peak_host_bytes()))
    largest_difference, peak_device, peak_host = map(max, zip(*of_ranks, strict=True))
    if largest_difference > LARGEST_DIFFERENCE:
        run.progress.message(
            f"step {done.step}: the second sweep computed other states than the first (relative difference "
            f"{largest_difference:.1e}): the gradient is not exact. Try another kernel.backend, and report it."
        )
    pieces = data.groups[0].chunks.pieces_per_chunk
    values = (
        done.step,
        done.tokens,
        _finite(report.loss),
        rate,
        _finite(report.grad_norm),
        report.num_tokens / seconds,
        report.num_chunks,
        done.piece_tokens or data.chunk_tokens,
        run.settings.window if run.settings.window == "document" else run.settings.window * pieces,
        num_carried,
        _finite(largest_difference),
        peak_device,
        peak_host,
        seconds,
    )
    done.owed = dict(zip(STEP_KEYS, values, strict=True))
    if len(run.set_names) > 1:
        done.owed["sets"] = report_sets(run.set_names, gradient.set_losses, data)
    if report.not_updated is not None:
        done.owed["not_updated"] = report.not_updated
    if report.suspects:
        done.owed["documents"] = list(report.suspects[:MOST_NAMED])
    if report.not_updated is not None:
        run.progress.message(f"step {done.step}: no update: {report.not_updated}{named(report.suspects)}")
    of_step = StepDone(gradient=gradient, data=data, states=lambda: _states_before(run, data, place))
    spike = look_for_spike(run, done, _finite(report.loss), of_step)
    if spike is not None:
        done.owed["spike"] = spike
    states = gradient.states
    if report.grad_norm is not None and not math.isfinite(report.grad_norm):
        done.nonfinite_steps += 1
        done.nonfinite_in_a_row += 1
        states = [_without_infinities(state) for state in states]
    else:
        done.nonfinite_in_a_row = 0
    # Of documents that have ended, nothing is cached on.
    return [state.trimmed() for state in states] if data.carries_state else []


def _states_before(run: Run, data: StepData, place: Place) -> list[ModelState]:
    """Of each group, what the step before has left, or what stands for nothing."""
    if place.row_states and data.carries_state:
        return place.row_states
    return [_zeros(run, group.chunks[0].tokens.shape[0]) for group in data.groups]


def _gradient_that_fits(
    run: Run, done: Done, data: StepData, place: Place, signals: StopSignals, saver: _Saver
) -> tuple[StepGradient, StepData]:
    """The step's gradient; where the memory runs out, from its beginning in shorter chunks, for the rest of the run.

    A window keeps its length in tokens, so that the gradient is the same.
    """
    start, place.under_way = place.under_way, None
    states = _states_before(run, data, place)

    def before_chunk(tell: Callable[[], StepPlace], group: int, here: WalkPlace) -> None:
        run.trimmer.tick()
        if run.engine.ranks.is_first:
            run.progress.chunk(work.place(group, here))
        run.engine.ranks.at(f"step {done.step + 1}")
        stop, is_due = run.engine.ranks.most(signals.number, int(saver.is_due))
        if stop or is_due:
            _note(run, place, tell())
        signals.raise_if(stop)
        if is_due:
            saver.save(done, place)
            place.under_way = None

    while True:
        if start is None:
            run.engine.forget_gradient()
        try:
            pieces = data.in_pieces(done.piece_tokens)
            work = StepWork(done.step + 1, pieces, run.settings.window)
            gradient = step_gradient(
                # A step without a target has no places to go on from; it can be stopped all the same.
                run.objective if data.weight_total > 0 else _stoppable(run, signals, f"step {done.step + 1}"),
                pieces,
                states,
                window=run.settings.window,
                engine=run.engine,
                keeps_random_state=draws_random_numbers(run.model),
                boundaries=run.settings.boundaries,
                before_chunk=before_chunk,
                start=start,
            )
            return gradient, pieces
        except Exception as error:
            fault = memory_fault(error)
            if fault is None:
                raise
            if run.engine.ranks.size > 1:
                # The others may be in the middle of a chunk, where nobody can be told.
                advice = "Set a smaller bptt.chunk_tokens or run.rows, or bptt.activations: recompute."
                raise MachineError(f"{run.engine.ranks.name}: {fault} {advice}") from error
        # Not in the except clause: there the error's traceback keeps the activations alive.
        shorten_chunks(run, done, data, fault)
        start = None
        set_random_state(place.random_state, run.device)


def _note(run: Run, place: Place, under_way: StepPlace) -> None:
    """Where nothing has run, the step's beginning says it all; for an engine that cannot stop inside it has to."""
    place.under_way = under_way if under_way.passes and run.engine.stops_inside_steps else None


def _without_infinities(state: ModelState) -> ModelState:
    """A state that is not finite would spoil every later step of its rows."""
    return ModelState(*(torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for tensor in state))


def _finite(value: float | None) -> float | None:
    """What can be written as JSON; a loss that is not finite is none."""
    return value if value is not None and math.isfinite(value) else None


def _validate(run: Run, done: Done, signals: StopSignals, *, num_sets: int) -> ValidationLoss:
    run.model.eval()
    loss = validation_loss(
        _stoppable(run, signals, f"the validation after step {done.step}"),
        run.validation,
        rows=run.settings.rows,
        chunk_tokens=done.piece_tokens or run.settings.chunk_tokens,
        fresh_state=lambda rows: _zeros(run, rows),
        num_sets=num_sets,
        ranks=run.engine.ranks,
    )
    run.model.train()
    return loss


def _stoppable(run: Run, signals: StopSignals, place: str) -> Callable[..., tuple[Tensor, ...]]:
    """The objective, which looks for a signal before every chunk of every sweep. place: where that is, for people."""

    def objective(*arguments: object, **settings: object) -> tuple[Tensor, ...]:
        run.engine.ranks.at(place)
        signals.raise_if(*run.engine.ranks.most(signals.number))
        return run.objective(*arguments, **settings)

    return objective


def _zeros(run: Run, rows: int) -> ModelState:
    """The value does not matter where a document starts at the first token; the shape and dtype do."""
    return ModelState.zeros(run.model.config, rows, dtype=run.model.state_dtype, device=run.device)


def _peak_device_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
