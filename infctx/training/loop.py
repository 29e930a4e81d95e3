"""The run: steps, validation, checkpoints, signals. It knows no engine and no recipe."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from infctx.data.step_source import StepData
from infctx.errors import InfctxError
from infctx.model.state import ModelState
from infctx.training.bptt import has_dropout
from infctx.training.resume import random_state, resume_run, save_run
from infctx.training.run import Done, Place, Run
from infctx.training.signals import StopRequested, StopSignals
from infctx.training.step import run_step
from infctx.training.validation import validation_loss

# Of every line of metrics.jsonl; the line before the first step has nulls where nothing was done.
STEP_KEYS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "chunks",
    "window",
    "carried_rows",
    "peak_device_bytes",
    "peak_host_bytes",
    "seconds",
)


def train(run: Run) -> Done:
    """Train to the end, from the newest checkpoint of the folder if there is one.

    Raises:
        StopRequested: a signal came; a checkpoint of the last finished step is on disk.
        InfctxError: too many steps in a row had a gradient that is not finite.
    """
    done, row_states = resume_run(run)
    run.progress.start(run.source.total_steps, list(run.headline))
    try:
        with StopSignals() as signals:
            return _run_steps(run, done, row_states, signals)
    finally:
        run.progress.finish()


def _run_steps(run: Run, done: Done, row_states: list[ModelState], signals: StopSignals) -> Done:
    if done.step == 0 and run.validation and done.first_val_loss is None:
        done.owed = dict.fromkeys(STEP_KEYS) | {"step": 0, "tokens": 0}
    while True:
        place = Place(cursor=run.source.cursor(), random_state=random_state(run.device), row_states=row_states)
        try:
            _settle(run, done, place, signals)
            data = run.source.next_step()
            if data is None:
                break
            row_states = _one_step(run, done, data, row_states, signals)
        except StopRequested:
            save_run(run, done, place)
            run.progress.message(f"stopped by {signals.name}; a checkpoint of step {done.step} is written")
            raise
    save_run(run, done, place)
    return done


def _settle(run: Run, done: Done, place: Place, signals: StopSignals) -> None:
    """What is owed after a step: validation, its line of metrics, a checkpoint."""
    if done.owed is None:
        return
    record, settings = done.owed, run.settings
    is_ahead = done.step < run.source.total_steps
    is_due = not is_ahead or done.step == 0 or _every(settings.validate_every, done.step)
    if run.validation and is_due:
        done.val_loss = record["val_loss"] = _finite(_validate(run, signals))
        if done.step == 0:
            done.first_val_loss = done.val_loss
    done.owed = None
    run.metrics.append(record)
    if done.step > 0:
        run.progress.step(record)
    elif done.val_loss is not None:
        run.progress.message(f"validation loss before training: {done.val_loss:.4f}")
    is_lost = done.nonfinite_in_a_row >= settings.max_nonfinite_steps
    if is_lost or (is_ahead and done.step > 0 and _every(settings.checkpoint_every, done.step)):
        save_run(run, done, place)
    if is_lost:
        raise InfctxError(
            f"step {done.step}: the gradient was not finite in {done.nonfinite_in_a_row} steps in a row, so the "
            f"weights are still those of step {done.step - done.nonfinite_in_a_row}; they are saved in "
            f"{run.folder / 'checkpoints'}. Lower optimizer.lr or look at the data."
        )


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0


def _one_step(
    run: Run, done: Done, data: StepData, row_states: list[ModelState], signals: StopSignals
) -> list[ModelState]:
    """Run a step and note what it did; returns the rows' states for the next one."""
    began = time.perf_counter()
    rate = run.learning_rate.apply_(run.optimizer, done.step)
    num_carried = sum(state.wkv.shape[1] for state in row_states) if data.carries_state else 0
    if not data.carries_state or not row_states:
        row_states = [_zeros(run, group.chunks[0].tokens.shape[0]) for group in data.groups]
    run.model.train()
    report, row_states = run_step(
        _stoppable(run, signals),
        data,
        row_states,
        window=run.settings.window,
        optimizer=run.optimizer,
        clip=run.settings.clip,
        backward=run.backward,
        keeps_random_state=has_dropout(run.model),
        boundaries=run.settings.boundaries,
    )
    seconds = time.perf_counter() - began
    done.step += 1
    done.tokens += report.num_tokens
    done.train_loss = _finite(report.loss) if report.loss is not None else done.train_loss
    done.steps_without_target += report.loss is None
    values = (
        done.step,
        done.tokens,
        _finite(report.loss),
        rate,
        _finite(report.grad_norm),
        report.num_tokens / seconds,
        report.num_chunks,
        run.settings.window,
        num_carried,
        _peak_device_bytes(run.device),
        _peak_host_bytes(),
        seconds,
    )
    done.owed = dict(zip(STEP_KEYS, values, strict=True))
    if report.not_updated is not None:
        done.owed["not_updated"] = report.not_updated
        run.progress.message(f"step {done.step}: no update: {report.not_updated}")
    if report.grad_norm is not None and not math.isfinite(report.grad_norm):
        done.nonfinite_steps += 1
        done.nonfinite_in_a_row += 1
        row_states = [_without_infinities(state) for state in row_states]
    else:
        done.nonfinite_in_a_row = 0
    return row_states if data.carries_state else []


def _without_infinities(state: ModelState) -> ModelState:
    """A state that is not finite would spoil every later step of its rows."""
    return ModelState(*(torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for tensor in state))


def _finite(value: float | None) -> float | None:
    """What can be written as JSON; a loss that is not finite is none."""
    return value if value is not None and math.isfinite(value) else None


def _validate(run: Run, signals: StopSignals) -> float:
    run.model.eval()
    loss = validation_loss(
        _stoppable(run, signals),
        run.validation,
        rows=run.settings.rows,
        chunk_tokens=run.settings.chunk_tokens,
        fresh_state=lambda rows: _zeros(run, rows),
    )
    run.model.train()
    return loss


def _stoppable(run: Run, signals: StopSignals) -> Callable[..., tuple[Tensor, ...]]:
    """The objective, which looks for a signal before every chunk of every sweep."""

    def objective(*arguments: object, **settings: object) -> tuple[Tensor, ...]:
        signals.raise_if_requested()
        return run.objective(*arguments, **settings)

    return objective


def _zeros(run: Run, rows: int) -> ModelState:
    """The value does not matter where a document starts at the first token; the shape and dtype do."""
    return ModelState.zeros(run.model.config, rows, dtype=run.model.state_dtype, device=run.device)


def _peak_device_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _peak_host_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
