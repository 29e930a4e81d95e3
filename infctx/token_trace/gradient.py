"""What one token's loss does to the gradient: how far it reaches, its part of the step's, and one weight's update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infctx.data.chunking import ChunkSequence, chunk_rows
from infctx.data.step_source import StepData
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.token_trace.forward import Objective, TokenForward, look_at_token, state_norms, without_random_numbers
from infctx.token_trace.place import TokenPlace
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import Window, backward_through_windows, draws_random_numbers, forward_through_chunks
from infctx.training.engine import Engine
from infctx.training.optim import LearningRate
from infctx.training.step import step_gradient
from infctx.training.step_place import WalkPlace, WindowsPlace

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepValues:
    """The step that the token is of.

    Attributes:
        loss_sum: weighted, not divided.
        grad_norm: before clipping. clip_factor: what the gradient is multiplied by.
        name: the trained parameter with the largest gradient in this step.
        gradient: of it, not clipped.
    """

    loss_sum: float
    grad_norm: float
    clip_factor: float
    name: str
    gradient: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenValues:
    """One token's own part, with weight 1 and not divided, whatever its weight is.

    Attributes:
        window_first, window_last: chunks of its window.
        loss: of the target, in nats, with the terms of the training loss; None where nothing is predicted.
        borders: chunk before which a state stands -> norms of the loss's gradient with respect to that state.
        grad_norm: of all trained parameters.
        gradient: of the parameter that was asked for.
    """

    forward: TokenForward
    window_first: int
    window_last: int
    loss: float | None
    borders: dict[int, dict[str, float]]
    grad_norm: float | None
    gradient: Tensor | None


def measure_step(
    objective: Objective,
    model: Finch,
    step: StepData,
    *,
    window: Window,
    engine: Engine,
    clip: float | None,
    boundaries: BoundaryPlan,
) -> StepValues:
    """The gradient of the first step as a run would have it; no weight is changed, and .grad is left empty."""
    model.train()
    engine.forget_gradient()
    gradient = step_gradient(
        objective,
        step,
        [_no_state(model, len(group.chunks.rows)) for group in step.groups],
        window=window,
        engine=engine,
        keeps_random_state=draws_random_numbers(model),
        boundaries=boundaries,
    )
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = float(nn.utils.get_total_norm(list(trained.values())))
    name = max(trained, key=lambda one: float(trained[one].norm()))
    values = StepValues(
        loss_sum=float(gradient.loss_sums.sum()),
        grad_norm=norm,
        # As clip_grad_norm_ has it.
        clip_factor=1.0 if clip is None or not math.isfinite(norm) else min(1.0, clip / (norm + 1e-6)),
        name=name,
        gradient=trained[name].detach().clone(),
    )
    engine.forget_gradient()
    return values


def measure_token(
    objective: Objective,
    model: Finch,
    place: TokenPlace,
    *,
    chunk_tokens: int,
    window: Window,
    engine: Engine,
    boundaries: BoundaryPlan,
    parameter: str | None,
) -> TokenValues:
    """Run the token's row alone, up to the end of its chunk, and go back from its loss; .grad is left empty.

    Args:
        parameter: whose gradient is given back; None = none.
    """
    alone = chunk_rows([_only_this_loss(place)], chunk_tokens=chunk_tokens)
    first = 0 if window == "document" else place.chunk // window * window
    last = len(alone.chunks) - 1 if window == "document" else min(first + window, len(alone.chunks)) - 1
    state = _no_state(model, 1)
    with without_random_numbers(model):
        for index in range(first):
            _, state = forward_through_chunks(objective, [alone.chunks[index]], state, with_loss=False)
        start = state
        for index in range(first, place.chunk):
            _, state = forward_through_chunks(objective, [alone.chunks[index]], state, with_loss=False)
        forward = look_at_token(objective, model, alone.chunks[place.chunk], state, place=place.chunk_token)
        shared: dict[str, Any] = {"forward": forward, "window_first": first, "window_last": last}
        if place.target_id is None:
            return TokenValues(loss=None, borders={}, grad_norm=None, gradient=None, **shared)
        loss, borders = _go_back(objective, alone, first, place.chunk, start, engine, boundaries)
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    values = TokenValues(
        loss=loss,
        borders=borders,
        grad_norm=float(nn.utils.get_total_norm(list(gradients.values()))),
        gradient=gradients[parameter].detach().clone() if parameter in gradients else None,
        **shared,
    )
    engine.forget_gradient()
    return values


def _only_this_loss(place: TokenPlace) -> Any:
    weights = np.zeros_like(place.row_slice.weights)
    weights[place.token] = 1.0
    return replace(place.row_slice, weights=weights)


def _go_back(
    objective: Objective,
    alone: ChunkSequence,
    first: int,
    chunk: int,
    start: ModelState,
    engine: Engine,
    boundaries: BoundaryPlan,
) -> tuple[float, dict[int, dict[str, float]]]:
    """The token's loss, and the norm of its gradient at each border from its own chunk's back to the window's first."""
    borders: dict[int, dict[str, float]] = {}

    def note(tell: Callable[[], WindowsPlace], here: WalkPlace) -> None:
        reached = tell()
        if reached.in_sweep_2 and reached.adjoint is not None:
            borders[first + reached.next + 1] = state_norms(reached.adjoint)

    engine.forget_gradient()
    result = backward_through_windows(
        objective,
        alone.chunks[first : chunk + 1],
        start,
        window="document",
        weight_total=1.0,
        backward=engine.backward,
        boundaries=boundaries,
        before_chunk=note,
    )
    borders[first] = state_norms(result.initial_state_gradient)
    return float(result.loss_sum), borders


def first_update(
    parameter: Tensor,
    gradient: Tensor,
    *,
    group: dict[str, Any],
    make_optimizer: MakeOptimizer,
    learning_rate: LearningRate,
) -> Tensor:
    """What the first step adds to a weight: the optimizer takes the step on a copy.

    Args:
        gradient: clipped. group: of the run's optimizer that the weight is in.
    """
    copy = nn.Parameter(parameter.detach().clone())
    copy.grad = gradient
    rules = {key: group[key] for key in ("weight_decay", "lr_multiplier")}
    optimizer = make_optimizer([{"params": [copy], **rules}])
    learning_rate.apply_(optimizer, 0)
    optimizer.step()
    return copy.detach() - parameter.detach()


def _no_state(model: Finch, rows: int) -> ModelState:
    """Its values do not matter where every row begins with a document."""
    return ModelState.zeros(model.config, rows, dtype=model.state_dtype, device=model.embedding.weight.device)
