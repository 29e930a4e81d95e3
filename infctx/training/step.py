"""One optimizer step over all rows, free of any framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from infctx.data.chunking import Chunk
from infctx.data.stream import StepData
from infctx.model.state import ModelState
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import Window, backward_through_windows, forward_through_chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step did.

    loss: weighted loss sum / weight total; None where there was nothing to learn. grad_norm: before clipping.
    not_updated: why the weights were left alone, or None.
    """

    loss: float | None
    weight_total: float
    num_tokens: int
    num_chunks: int
    grad_norm: float | None
    not_updated: str | None


def run_step(
    objective: Callable[..., tuple[Tensor, ...]],
    data: StepData,
    states: Sequence[ModelState],
    *,
    window: Window,
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    backward: Callable[[Tensor], None],
    keeps_random_state: bool = False,
    boundaries: BoundaryPlan = BoundaryPlan(),  # noqa: B008 (frozen)
) -> tuple[StepReport, list[ModelState]]:
    """Gradient of the whole step, clipping, update.

    Args:
        objective: a ChunkObjective, wrapped or not. What it raises abandons the step, which has changed no weight.
        data: the chunks of this rank's groups, and the weight total of all ranks.
        states: of each group, before its first chunk.
    Returns:
        A report, and the state of each group after its last chunk.
    """
    optimizer.zero_grad(set_to_none=True)
    device = states[0].wkv.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    states_after = []
    for group, state in zip(data.groups, states, strict=True):
        chunks = [chunk_to(chunk, device) for chunk in group.chunks]
        if data.weight_total > 0:
            result = backward_through_windows(
                objective,
                chunks,
                state,
                window=window,
                weight_total=data.weight_total,
                backward=backward,
                keeps_random_state=keeps_random_state,
                boundaries=boundaries,
            )
            loss_sum += result.loss_sum
            state = result.state
        else:
            _, state = forward_through_chunks(objective, chunks, state, with_loss=False)
        states_after.append(state)
    report = StepReport(
        loss=float(loss_sum) / data.weight_total if data.weight_total > 0 else None,
        weight_total=data.weight_total,
        num_tokens=data.num_tokens,
        num_chunks=sum(len(group.chunks) for group in data.groups),
        grad_norm=None,
        not_updated="nothing to learn: all weights are 0",
    )
    if data.weight_total > 0:
        report = replace(report, **_update(optimizer, clip))
    return report, states_after


def _update(optimizer: torch.optim.Optimizer, clip: float | None) -> dict[str, float | str | None]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
    if not math.isfinite(norm):
        return {"grad_norm": norm, "not_updated": f"the gradient is not finite (norm {norm})"}
    optimizer.step()
    return {"grad_norm": norm, "not_updated": None}


def chunk_to(chunk: Chunk, device: torch.device) -> Chunk:
    """The chunk on a device."""
    return replace(
        chunk,
        tokens=chunk.tokens.to(device, non_blocking=True),
        targets=chunk.targets.to(device, non_blocking=True),
        loss_weight=chunk.loss_weight.to(device, non_blocking=True),
        starts=None if chunk.starts is None else chunk.starts.to(device, non_blocking=True),
    )
