"""The nouns of a run: its live objects, how far it is, and where the next step begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from infctx.data.document import Document
from infctx.data.step_source import StepSource
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.averaged_weights import AveragedWeights
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import Window
from infctx.training.engine import Engine
from infctx.training.host_memory import HeapTrimmer
from infctx.training.loggers import NO_LOGGERS, Loggers
from infctx.training.metrics import MetricsLog
from infctx.training.optim import LearningRate
from infctx.training.progress import Progress
from infctx.training.step_place import RandomState, StepPlace


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """Counts of `every` are in steps; None = never between the first and the last. moment_bytes: the optimizer's on the
    device, for each trained parameter."""

    window: Window
    chunk_tokens: int
    rows: int
    clip: float | None
    checkpoint_every: int | None
    validate_every: int | None
    checkpoint_minutes: float | None
    keep_checkpoints: int
    max_nonfinite_steps: int
    boundaries: BoundaryPlan
    moment_bytes: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The live objects of a run.

    objective is what the engine returned; model is what it wraps. strategy: the engine's, by its name in a recipe.
    facts are written into every checkpoint. save_adapter writes the adapter folder, where adapter_has_files, from whole
    weights where those of the model are divided among ranks. set_names are those of the data sets by their index; with
    more than one, the metrics have the loss of each. validation_set_names: those of the held-out documents' sets, where
    they come from others. averaged: the average of the trained weights, where the run keeps one. loggers: beside
    the metrics, on the first rank.
    """

    folder: Path
    model: Finch
    objective: nn.Module
    engine: Engine
    strategy: str
    device: torch.device
    source: StepSource
    validation: Sequence[Document]
    learning_rate: LearningRate
    settings: LoopSettings
    metrics: MetricsLog
    progress: Progress
    headline: Sequence[str]
    facts: Mapping[str, object]
    save_adapter: Callable[[Mapping[str, Tensor] | None], None]
    adapter_has_files: bool
    trimmer: HeapTrimmer
    set_names: Sequence[str] = ("",)
    validation_set_names: Sequence[str] | None = None
    averaged: AveragedWeights | None = None
    loggers: Loggers = NO_LOGGERS


@dataclass(kw_only=True, slots=True)
class Done:
    """How far a run is. All of it is in every checkpoint.

    piece_tokens: what a chunk was cut into after the memory had run out; None = whole.
    owed: the last step's line of metrics, until its validation, if one is due, has been measured.
    recent_losses: what the next step's is compared with, see `usual_loss`; spikes_in_a_row: up to the last step.
    """

    step: int = 0
    tokens: int = 0
    train_loss: float | None = None
    first_val_loss: float | None = None
    val_loss: float | None = None
    steps_without_target: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    piece_tokens: int | None = None
    owed: dict[str, object] | None = None
    recent_losses: list[float] = field(default_factory=list)
    spikes_in_a_row: int = 0


@dataclass(kw_only=True, slots=True)
class Place:
    """Where the next step begins: what it would need to be run again; and how far inside it the run is."""

    cursor: dict[str, object]
    random_state: RandomState
    row_states: list[ModelState] = field(default_factory=list)
    under_way: StepPlace | None = None
