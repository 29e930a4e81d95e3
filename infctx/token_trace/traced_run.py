"""A run before its first step, as a trace needs it."""

from __future__ import annotations

from dataclasses import dataclass

from infctx.data.step_source import StepData
from infctx.model.finch import Finch
from infctx.recipe.schema import Recipe
from infctx.run_data import RunData
from infctx.token_trace.forward import Objective
from infctx.token_trace.gradient import MakeOptimizer
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.engine import Engine
from infctx.training.optim import LearningRate


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunToTrace:
    """A run before its first step.

    Attributes:
        recipe: resolved. written: as its author gave it, whose paths are shown.
        model: what `objective` wraps.
        step: the first, with the rows of all ranks.
        make_optimizer: of a run like this one, over groups of parameters.
        boundaries: where states wait; writes no file.
    """

    recipe: Recipe
    written: Recipe
    data: RunData
    model: Finch
    objective: Objective
    engine: Engine
    step: StepData | None
    learning_rate: LearningRate
    make_optimizer: MakeOptimizer
    boundaries: BoundaryPlan
