"""One optimizer step over all rows, free of any framework."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infctx.data.step_source import StepData
from infctx.model.state import ModelState
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import Window, backward_through_windows, forward_through_chunks
from infctx.training.engine import Engine
from infctx.training.set_losses import add_set_losses
from infctx.training.step_place import StepPlace, WalkPlace, WindowsPlace, random_state, set_random_state

BeforeChunk = Callable[[Callable[[], StepPlace], int, WalkPlace], None]
"""Called before every chunk of either sweep with a function that tells the place, and with the group and where in
it that is; what it raises leaves the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGradient:
    """The gradient of a step, which lies in .grad.

    Attributes:
        loss_sums: of each group, weighted, not divided, float64 [groups].
        states: of each group, behind its last chunk.
        num_chunks: of all groups, as they were cut.
        largest_difference: between recomputed and banked states.
        set_losses: the part of each set in the sum of all groups, float64 [sets]; None where there is one set only.
        seconds: taken, also before the step was left and entered again.
    """

    loss_sums: Tensor
    states: list[ModelState]
    num_chunks: int
    largest_difference: float
    seconds: float
    set_losses: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step did.

    loss: weighted loss sum / weight total; None where there was nothing to learn. grad_norm: before clipping.
    not_updated: why the weights were left alone, or None. suspects: origins of the documents that a gradient which is
    not finite may come from.
    """

    loss: float | None
    weight_total: float
    num_tokens: int
    num_chunks: int
    grad_norm: float | None
    not_updated: str | None
    suspects: tuple[str, ...] = ()


def run_step(
    objective: Callable[..., tuple[Tensor, ...]],
    data: StepData,
    states: Sequence[ModelState],
    *,
    window: Window,
    engine: Engine,
    clip: float | None,
    keeps_random_state: bool = False,
    boundaries: BoundaryPlan = BoundaryPlan(),  # noqa: B008 (frozen)
) -> tuple[StepReport, list[ModelState]]:
    """Gradient of the whole step, clipping, update.

    Args:
        objective: a ChunkObjective, wrapped or not.
        data: the chunks of this rank's groups, and the weight total of all ranks.
        states: of each group, before its first chunk.
    Returns:
        A report, and the state of each group after its last chunk.
    """
    engine.forget_gradient()
    gradient = step_gradient(
        objective,
        data,
        states,
        window=window,
        engine=engine,
        keeps_random_state=keeps_random_state,
        boundaries=boundaries,
    )
    return take_step(gradient, data, engine=engine, clip=clip), gradient.states


def step_gradient(
    objective: Callable[..., tuple[Tensor, ...]],
    data: StepData,
    states: Sequence[ModelState],
    *,
    window: Window,
    engine: Engine,
    keeps_random_state: bool = False,
    boundaries: BoundaryPlan = BoundaryPlan(),  # noqa: B008 (frozen)
    before_chunk: BeforeChunk | None = None,
    start: StepPlace | None = None,
) -> StepGradient:
    """Add the gradient of the step's loss to what the engine holds. What the objective raises abandons it; no weight
    has changed.

    Args:
        window: in chunks as the data source cut them; where `data` comes in pieces, as many pieces as make them up.
        start: go on from this place, with .grad as it was there.
    """
    began = time.perf_counter() - (start.seconds if start is not None else 0.0)
    passes = start.passes if start is not None else 0
    device = states[0].wkv.device
    states_after = list(start.states_after) if start is not None else []
    loss_sums = list(start.loss_sums) if start is not None else []
    set_losses = start.set_losses if start is not None else None
    differences: list[Tensor] = []

    def pause(place_in_group: Callable[[], WindowsPlace], here: WalkPlace) -> None:
        nonlocal passes
        if before_chunk is not None:
            before_chunk(
                lambda: StepPlace(
                    group=len(states_after),
                    states_after=states_after,
                    loss_sums=loss_sums,
                    windows=place_in_group(),
                    random_state=random_state(device),
                    passes=passes,
                    seconds=time.perf_counter() - began,
                    set_losses=set_losses,
                ),
                len(states_after),
                here,
            )
        passes += 1

    def expect(is_last: bool) -> bool:
        return engine.expect(is_last=is_last and len(states_after) == len(data.groups) - 1)

    if start is not None:
        set_random_state(start.random_state, device)
    for group, state in list(zip(data.groups, states, strict=True))[len(states_after) :]:
        if data.weight_total > 0:
            is_under_way = start is not None and start.group == len(states_after)
            result = backward_through_windows(
                objective,
                group.chunks,
                start.windows if start is not None and is_under_way else state,
                window="document" if window == "document" else window * group.chunks.pieces_per_chunk,
                # Engines take the mean over their ranks.
                weight_total=data.weight_total / engine.ranks.size,
                backward=engine.backward,
                keeps_random_state=keeps_random_state,
                boundaries=boundaries,
                before_chunk=pause,
                expect=expect,
            )
            loss_sum, state = result.loss_sum, result.state
            differences.append(result.largest_difference)
            set_losses = add_set_losses(set_losses, result.set_losses)
        else:
            loss_sum, state = forward_through_chunks(objective, group.chunks, state, with_loss=False)
        loss_sums.append(loss_sum)
        # Of documents that have ended nothing is attended to any more.
        states_after.append(state if data.carries_state else state.without_cache())
    return StepGradient(
        loss_sums=torch.stack(loss_sums).cpu(),
        states=states_after,
        num_chunks=sum(len(group.chunks) for group in data.groups),
        largest_difference=float(torch.stack(differences).max()) if differences else 0.0,
        seconds=time.perf_counter() - began,
        set_losses=engine.ranks.sum(set_losses.cpu()) if set_losses is not None else None,
    )


def take_step(gradient: StepGradient, data: StepData, *, engine: Engine, clip: float | None) -> StepReport:
    """Clip the whole gradient and update, unless there is nothing to learn or a number is not finite.

    The norm is of all ranks, so that all of them decide the same.
    """
    shared = {
        "weight_total": data.weight_total,
        "num_tokens": data.num_tokens,
        "num_chunks": gradient.num_chunks,
    }
    if data.weight_total == 0:
        return StepReport(loss=None, grad_norm=None, not_updated="nothing to learn: all weights are 0", **shared)
    loss = float(engine.ranks.sum(gradient.loss_sums).sum()) / data.weight_total
    norm = engine.update(clip)
    if not math.isfinite(norm):
        problem = f"the gradient is not finite (norm {norm})"
        # Those of each rank's own rows.
        of_ranks = engine.ranks.gather(_suspects(gradient.loss_sums, data))
        is_known = any(certain for certain, _ in of_ranks)
        suspects = dict.fromkeys(name for certain, names in of_ranks if certain or not is_known for name in names)
        return StepReport(loss=loss, grad_norm=norm, not_updated=problem, suspects=tuple(suspects), **shared)
    return StepReport(loss=loss, grad_norm=norm, not_updated=None, **shared)


def _suspects(loss_sums: Tensor, data: StepData) -> tuple[bool, tuple[str, ...]]:
    """The documents of the groups whose loss is not finite, and True; of all groups where every loss is, and False."""
    is_spoilt = ~loss_sums.isfinite()
    is_certain = bool(is_spoilt.any())
    spoilt = [group for group, spoils in zip(data.groups, is_spoilt.tolist(), strict=True) if spoils or not is_certain]
    return is_certain, tuple(dict.fromkeys(origin for group in spoilt for origin in group.origins))
