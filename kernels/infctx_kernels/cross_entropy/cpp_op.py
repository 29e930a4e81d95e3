"""The pass over rows of logits on a CPU, in C++: each row is read three times in a row, and written once in place."""

from __future__ import annotations

import torch
from torch import Tensor

from infctx_kernels.cpu.call import DTYPES, call, computable


def cpp_row_pass(
    logits: Tensor, targets: Tensor, loss_weight: Tensor, l2_wrap: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of some rows of logits; their gradient takes the logits' place, rounded to the logits' dtype."""
    logits = computable(logits).contiguous()
    num_rows, num_ids = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32)
    sizes = (num_rows, num_ids, DTYPES[logits.dtype], int(wants_gradient))
    tensors = (logits, targets.contiguous(), loss_weight.float().contiguous(), losses)
    call("infctx_cross_entropy_rows", sizes, float(l2_wrap), *tensors)
    return losses, logits if wants_gradient else None
