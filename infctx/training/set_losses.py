"""The loss of each data set of a mixture: beside the loss of all of them, to which it adds nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from infctx.data.step_source import StepData

# Of the table of sets and tokens whose rows are added up: 16 MB.
VALUES_AT_ONCE = 2**22


def sum_by_set(token_losses: Tensor, sets: Tensor, num_sets: int) -> Tensor:
    """Add up each set's tokens in float64, without a gradient.

    Args:
        token_losses: [T], weighted.
        sets: uint8 [T], of each token.
    Returns:
        float64 [num_sets]. A loss that is not finite spoils its own set's sum alone.
    """
    numbers = torch.arange(num_sets, dtype=torch.uint8, device=sets.device)[:, None]
    sums = torch.zeros(num_sets, dtype=torch.float64, device=sets.device)
    at_once = max(1, VALUES_AT_ONCE // num_sets)
    # Not by a scatter: on a GPU its order, and so the last bits, would differ from run to run.
    for losses, of_sets in zip(token_losses.detach().split(at_once), sets.split(at_once), strict=True):
        sums += torch.where(of_sets == numbers, losses, 0.0).sum(dim=1, dtype=torch.float64)
    return sums


def add_set_losses(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Their sum, a new tensor; None stands for nothing so far, and for no sets."""
    if total is None or part is None:
        return part if total is None else total
    return total + part


def means_by_set(set_losses: Sequence[float], set_weights: Sequence[float]) -> list[float | None]:
    """Loss over weight of each set; None where nothing of it has a weight, or its loss is not finite."""
    pairs = zip(set_losses, set_weights, strict=True)
    return [loss / weight if weight > 0 and math.isfinite(loss) else None for loss, weight in pairs]


def report_sets(names: Sequence[str], set_losses: Tensor | None, data: StepData) -> dict[str, dict[str, object]]:
    """What metrics.jsonl says of the sets that a step read.

    Args:
        set_losses: as in StepGradient; None where the step has nothing to learn.
    """
    sums = [0.0] * len(names) if set_losses is None else set_losses.tolist()
    means = means_by_set(sums, data.set_weights)
    sets = zip(names, data.set_tokens, means, strict=True)
    return {name: {"tokens": tokens, "loss": loss} for name, tokens, loss in sets if tokens > 0}
