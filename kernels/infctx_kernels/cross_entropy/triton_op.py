"""One Triton kernel over rows of logits: read twice, written once, each row by one program."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from infctx_kernels.surrounding import LAUNCH_OPTIONS

LOGITS_OF_A_STEP = 4096
WARPS = 8


@triton.jit
@no_type_check
def row_kernel(
    logits,  # [R, V], overwritten by the gradient where it is wanted
    targets,  # [R], int64
    loss_weight,  # [R]
    losses,  # [R], float32
    num_ids,
    l2_wrap,
    HAS_L2: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_ids
    column = tl.arange(0, BLOCK_V)
    weight = tl.load(loss_weight + row).to(tl.float32)
    if weight == 0.0:
        tl.store(losses + row, 0.0)
        if WANTS_GRADIENT:
            nothing = tl.zeros([BLOCK_V], dtype=logits.dtype.element_ty)
            for first in range(0, num_ids, BLOCK_V):
                tl.store(logits + first + column, nothing, mask=first + column < num_ids)
    else:
        target = tl.load(targets + row)
        is_known = (target >= 0) & (target < num_ids)
        # An id that does not exist must be seen, in the loss and in the gradient.
        weight = tl.where(is_known, weight, float("nan"))
        of_target = tl.load(logits + target, mask=is_known, other=0.0).to(tl.float32)

        largest = -float("inf")
        place = 0
        total = 0.0
        for first in range(0, num_ids, BLOCK_V):
            at = first + column
            x = tl.load(logits + at, mask=at < num_ids, other=-float("inf")).to(tl.float32)
            here = tl.max(x, axis=0)
            if HAS_L2:
                # Later steps must be larger, not equal: the first of equal logits is the one.
                first_here = tl.min(tl.where(x == here, at, num_ids), axis=0)
                place = tl.where(here > largest, first_here, place)
            now = tl.maximum(largest, here)
            # Where all logits so far are -inf, subtracting their maximum would be NaN.
            reference = tl.where(now == -float("inf"), 0.0, now)
            total = total * tl.exp(largest - reference) + tl.sum(tl.exp(x - reference), axis=0)
            largest = now
        loss = tl.log(total) + largest - of_target
        if HAS_L2:
            loss += 0.5 * l2_wrap * largest * largest
        tl.store(losses + row, loss * weight)

        if WANTS_GRADIENT:
            # All threads read the target's logit: none may overwrite it before.
            tl.debug_barrier()
            scale = weight / total
            for first in range(0, num_ids, BLOCK_V):
                at = first + column
                x = tl.load(logits + at, mask=at < num_ids, other=-float("inf")).to(tl.float32)
                gradient = tl.exp(x - largest) * scale
                gradient = tl.where(at == target, gradient - weight, gradient)
                if HAS_L2:
                    gradient = tl.where(at == place, gradient + weight * l2_wrap * largest, gradient)
                tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < num_ids)


def triton_row_pass(
    logits: Tensor, targets: Tensor, loss_weight: Tensor, l2_wrap: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of some rows of logits; their gradient takes the logits' place, rounded to the logits' dtype."""
    logits = logits.contiguous()
    num_rows, num_ids = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    block = min(LOGITS_OF_A_STEP, triton.next_power_of_2(num_ids))
    with torch.cuda.device_of(logits):
        row_kernel[(num_rows,)](
            logits,
            targets.contiguous(),
            loss_weight.contiguous(),
            losses,
            num_ids,
            l2_wrap,
            HAS_L2=l2_wrap != 0.0,
            WANTS_GRADIENT=wants_gradient,
            BLOCK_V=block,
            num_warps=WARPS if block == LOGITS_OF_A_STEP else 4,
            **LAUNCH_OPTIONS,
        )
    return losses, logits if wants_gradient else None
