"""The run: steps, validation, checkpoints, signals. It knows no engine and no recipe."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from infctx.checkpoint.run_state import RunState, load_run_state, save_run_state
from infctx.data.document import Document
from infctx.data.step_source import StepData, StepSource
from infctx.errors import CheckpointError, InfctxError
from infctx.model.finch import Finch
from infctx.model.state import ModelState, state_dtype
from infctx.training.bptt import Window, has_dropout
from infctx.training.metrics import MetricsLog
from infctx.training.optim import LearningRate
from infctx.training.progress import Progress
from infctx.training.signals import StopRequested, StopSignals
from infctx.training.step import run_step
from infctx.training.validation import validation_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """Counts of `every` are in steps; None = never between the first and the last."""

    window: Window
    chunk_tokens: int
    rows: int
    clip: float | None
    checkpoint_every: int | None
    validate_every: int | None
    keep_checkpoints: int
    max_nonfinite_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The live objects of a run.

    objective and optimizer are what the engine returned; model is what they wrap. facts are written into every
    checkpoint. save_adapter writes the adapter folder.
    """

    folder: Path
    model: Finch
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    backward: Callable[[Tensor], None]
    device: torch.device
    source: StepSource
    validation: Sequence[Document]
    learning_rate: LearningRate
    settings: LoopSettings
    metrics: MetricsLog
    progress: Progress
    headline: Sequence[str]
    facts: Mapping[str, object]
    save_adapter: Callable[[], None]


@dataclass(kw_only=True, slots=True)
class Done:
    """How far a run is. All of it is in every checkpoint.

    owed: the last step's line of metrics, until its validation, if one is due, has been measured.
    """

    step: int = 0
    tokens: int = 0
    train_loss: float | None = None
    first_val_loss: float | None = None
    val_loss: float | None = None
    steps_without_target: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    owed: dict[str, object] | None = None


@dataclass(kw_only=True, slots=True)
class Place:
    """Where the next step begins: what it would need to be run again."""

    cursor: dict[str, object]
    random_state: dict[str, Tensor]
    row_states: list[ModelState] = field(default_factory=list)


def train(run: Run) -> Done:
    """Train to the end, from the newest checkpoint of the folder if there is one.

    Raises:
        StopRequested: a signal came; a checkpoint of the last finished step is on disk.
        InfctxError: too many steps in a row had a gradient that is not finite.
    """
    done, row_states = _resume(run)
    run.progress.start(run.source.total_steps, list(run.headline))
    try:
        with StopSignals() as signals:
            return _run_steps(run, done, row_states, signals)
    finally:
        run.progress.finish()


def _run_steps(run: Run, done: Done, row_states: list[ModelState], signals: StopSignals) -> Done:
    if done.step == 0 and run.validation and done.first_val_loss is None:
        done.owed = {"step": 0, "tokens": 0}
    while True:
        place = Place(cursor=run.source.cursor(), random_state=_random_state(run.device), row_states=row_states)
        try:
            _settle(run, done, place, signals)
            data = run.source.next_step()
            if data is None:
                break
            row_states = _one_step(run, done, data, row_states, signals)
        except StopRequested:
            _save(run, done, place)
            run.progress.message(f"stopped by {signals.name}; a checkpoint of step {done.step} is written")
            raise
    _save(run, done, place)
    return done


def _settle(run: Run, done: Done, place: Place, signals: StopSignals) -> None:
    """What is owed after a step: validation, its line of metrics, a checkpoint."""
    if done.owed is None:
        return
    record, settings = done.owed, run.settings
    is_ahead = done.step < run.source.total_steps
    is_due = not is_ahead or done.step == 0 or _every(settings.validate_every, done.step)
    if run.validation and is_due:
        done.val_loss = record["val_loss"] = _validate(run, signals)
        if done.step == 0:
            done.first_val_loss = done.val_loss
    done.owed = None
    run.metrics.append(record)
    if done.step > 0:
        run.progress.step(record)
    elif done.val_loss is not None:
        run.progress.message(f"validation loss before training: {done.val_loss:.4f}")
    if is_ahead and done.step > 0 and _every(settings.checkpoint_every, done.step):
        _save(run, done, place)


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0


def _one_step(
    run: Run, done: Done, data: StepData, row_states: list[ModelState], signals: StopSignals
) -> list[ModelState]:
    """Run a step and note what it did; returns the rows' states for the next one."""
    began = time.perf_counter()
    rate = run.learning_rate.apply_(run.optimizer, done.step)
    if not data.carries_state or not row_states:
        row_states = [_zeros(run, group.chunks[0].tokens.shape[0]) for group in data.groups]
    run.model.train()
    report, row_states = run_step(
        run.objective,
        data,
        row_states,
        window=run.settings.window,
        optimizer=run.optimizer,
        clip=run.settings.clip,
        backward=run.backward,
        before_chunk=lambda chunk: signals.raise_if_requested(),
        keeps_random_state=has_dropout(run.model),
    )
    seconds = time.perf_counter() - began
    done.step += 1
    done.tokens += report.num_tokens
    done.train_loss = report.loss if report.loss is not None else done.train_loss
    done.steps_without_target += report.loss is None
    done.owed = {
        "step": done.step,
        "tokens": done.tokens,
        "loss": report.loss,
        "lr": rate,
        "grad_norm": report.grad_norm,
        "tokens_per_second": report.num_tokens / seconds,
        "peak_device_bytes": _peak_device_bytes(run.device),
        "peak_host_bytes": _peak_host_bytes(),
        "seconds": seconds,
    }
    if report.not_updated is not None:
        done.owed["not_updated"] = report.not_updated
        run.progress.message(f"step {done.step}: no update: {report.not_updated}")
    if report.grad_norm is not None and not math.isfinite(report.grad_norm):
        row_states = _after_nonfinite(run, done, row_states)
    else:
        done.nonfinite_in_a_row = 0
    return row_states if data.carries_state else []


def _after_nonfinite(run: Run, done: Done, row_states: list[ModelState]) -> list[ModelState]:
    """Count the step, stop after too many in a row, and do not carry a state that is not finite into the next."""
    done.nonfinite_steps += 1
    done.nonfinite_in_a_row += 1
    if done.nonfinite_in_a_row >= run.settings.max_nonfinite_steps:
        raise InfctxError(
            f"step {done.step}: the gradient was not finite in {done.nonfinite_in_a_row} steps in a row; the weights "
            f"are those of step {done.step - done.nonfinite_in_a_row}. Lower optimizer.lr or look at the data. "
            f"Checkpoints are in {run.folder / 'checkpoints'}."
        )
    return [
        ModelState(*(torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for tensor in state))
        for state in row_states
    ]


def _validate(run: Run, signals: StopSignals) -> float:
    run.model.eval()
    loss = validation_loss(
        run.objective,
        run.validation,
        rows=run.settings.rows,
        chunk_tokens=run.settings.chunk_tokens,
        fresh_state=lambda rows: _zeros(run, rows),
        before_chunk=signals.raise_if_requested,
    )
    run.model.train()
    return loss


def _zeros(run: Run, rows: int) -> ModelState:
    """The value does not matter where a document starts at the first token; the shape and dtype do."""
    compute_dtype = run.model.compute_dtype or run.model.embedding.weight.dtype
    return ModelState.zeros(run.model.config, rows, dtype=state_dtype(compute_dtype), device=run.device)


def _save(run: Run, done: Done, place: Place) -> None:
    rows = {
        f"{group}.{name}": tensor.cpu()
        for group, state in enumerate(place.row_states)
        for name, tensor in zip(ModelState._fields, state, strict=True)
    }
    optimizer = {
        f"{index}.{name}": value.cpu()
        for index, values in run.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    state = RunState(
        step=done.step,
        tensors={
            "trainable": {name: p.detach().cpu() for name, p in run.model.named_parameters() if p.requires_grad},
            "optimizer": optimizer,
            "rows": rows,
            "random": place.random_state,
        },
        facts={**run.facts, "done": asdict(done), "cursor": place.cursor, "row_groups": len(place.row_states)},
    )
    save_run_state(run.folder, state, keep=run.settings.keep_checkpoints)
    run.save_adapter()


def _resume(run: Run) -> tuple[Done, list[ModelState]]:
    """Put weights, optimizer, random numbers, data and row states where the newest checkpoint left them."""
    loaded = load_run_state(run.folder)
    if loaded is None:
        run.metrics.truncate_after(-1)
        return Done(), []
    for reason in loaded.skipped:
        run.progress.message(f"skipped a damaged checkpoint: {reason}")
    state = loaded.state
    if state.facts.get("base_fingerprint") != run.facts["base_fingerprint"]:
        raise CheckpointError(
            f"{run.folder}: the model file is not the one this run began with: its weights differ. Put the original "
            "back, or start beside this run with --fresh."
        )
    done = Done(**state.facts["done"])
    parameters = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.tensors["trainable"].items():
            parameters[name].copy_(tensor)
    _restore_optimizer(run.optimizer, state.tensors["optimizer"])
    run.source.restore(state.facts["cursor"])
    torch.set_rng_state(state.tensors["random"]["cpu"])
    if "device" in state.tensors["random"] and run.device.type == "cuda":
        torch.cuda.set_rng_state(state.tensors["random"]["device"], run.device)
    rows = state.tensors["rows"]
    row_states = [
        ModelState(*(rows[f"{group}.{name}"].to(run.device) for name in ModelState._fields))
        for group in range(state.facts["row_groups"])
    ]
    run.metrics.truncate_after(done.step if done.owed is None else done.step - 1)
    run.progress.message(f"continuing after step {done.step}")
    return done, row_states


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    if state:
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def _peak_device_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _peak_host_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
