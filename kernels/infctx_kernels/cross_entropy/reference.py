"""The loss in one piece, by autograd: exact in float64. Every other backend is compared with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, loss_weight: Tensor, *, l2_wrap: float, wants_tokens: bool
) -> tuple[Tensor, Tensor | None]:
    """Hold all logits at once; arguments and result as those of the RUNNERS in op.py."""
    counts = loss_weight != 0
    # Zeros instead of what a padding token has: multiplied by a gradient of 0, its NaN would still be NaN.
    logits = hidden.masked_fill(~counts[:, None], 0.0) @ head_weight.to(hidden.dtype).t()  # [T, V]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    is_known = (targets >= 0) & (targets < logits.shape[1])
    losses = F.cross_entropy(logits, torch.where(is_known, targets, 0), reduction="none")
    losses = losses.masked_fill(~is_known, torch.nan)
    if l2_wrap != 0.0:
        # Unlike amax, max sends the gradient to one index only, the first of equal ones.
        losses = losses + 0.5 * l2_wrap * logits.max(dim=1).values.square()
    losses = torch.where(counts, losses * loss_weight.to(losses.dtype), 0.0)
    return losses.sum(), losses.detach() if wants_tokens else None
