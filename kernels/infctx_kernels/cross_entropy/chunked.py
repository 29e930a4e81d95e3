"""The loss over pieces of the tokens: the logits' gradient takes the logits' place as soon as these are known.

Thus the backward pass has nothing to recompute, and only the logits of one piece are ever alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.linear import linear

# Values of a product that waits to be added to the head's gradient: 16 MB, which stay in a GPU's cache.
PRODUCT_AT_ONCE = 2**22

# (logits [R, V], targets [R], loss_weight [R], l2_wrap, wants_gradient) -> weighted losses [R] and, if it is wanted,
# their gradient with respect to the logits [R, V]; the logits may be overwritten.
RowPass = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]


def torch_row_pass(
    logits: Tensor, targets: Tensor, loss_weight: Tensor, l2_wrap: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses and gradient of some rows of logits with in-place torch operations, in float32 or float64."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    # In half precision that was a copy, and nobody else holds the original.
    del logits
    weight = loss_weight.to(values.dtype)
    is_known = (targets >= 0) & (targets < values.shape[1])
    safe = torch.where(is_known, targets, 0)
    rows = torch.arange(values.shape[0], device=values.device)
    largest, place = values.max(dim=1)
    values.sub_(largest[:, None])
    of_target = values[rows, safe]
    values.exp_()
    total = values.sum(dim=1)
    losses = total.log() - of_target
    if l2_wrap != 0.0:
        losses += 0.5 * l2_wrap * largest.square()
    # An id that does not exist must be seen, in the loss and in the gradient.
    weight = torch.where(is_known | (weight == 0), weight, torch.nan)
    losses = torch.where(weight == 0, 0.0, losses * weight)
    if not wants_gradient:
        return losses, None
    values.mul_((weight / total)[:, None])
    values[rows, safe] -= weight
    if l2_wrap != 0.0:
        values[rows, place] += weight * l2_wrap * largest
    return losses, values.masked_fill_((weight == 0)[:, None], 0.0)


class ChunkedLoss(torch.autograd.Function):
    """The gradients are computed in the forward pass; the backward pass multiplies them by the loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        loss_weight: Tensor,
        l2_wrap: float,
        rows_at_once: int,
        row_pass: RowPass,
        wants_tokens: bool,
    ) -> tuple[Tensor, Tensor | None]:
        fixed = (targets, loss_weight, l2_wrap, rows_at_once, row_pass, wants_tokens)
        loss, token_losses, *gradients = loss_and_gradients(hidden, head_weight, *fixed, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        if token_losses is not None:
            ctx.mark_non_differentiable(token_losses)
        return loss, token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        # Not in place: a graph that is kept is walked a second time.
        grads = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return *grads, *(None,) * 6


def loss_and_gradients(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    l2_wrap: float,
    rows_at_once: int,
    row_pass: RowPass,
    wants_tokens: bool,
    wants_hidden: bool,
    wants_head: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss; where they are wanted, that of each token and the two gradients, in the dtypes of their tensors.

    Args:
        hidden, head_weight, targets, loss_weight, l2_wrap: as in `op.linear_cross_entropy`.
        rows_at_once: tokens of a piece.
        row_pass: what turns a piece's logits into losses and their gradient.
    """
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    head = head_weight.to(hidden.dtype)
    counts = loss_weight != 0
    loss = torch.zeros((), dtype=work, device=hidden.device)
    token_losses = torch.empty(hidden.shape[0], dtype=work, device=hidden.device) if wants_tokens else None
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wants_hidden else None
    grad_head = torch.zeros(head.shape, dtype=work, device=hidden.device) if wants_head else None
    for first in range(0, hidden.shape[0], rows_at_once):
        part = slice(first, first + rows_at_once)
        # Zeros instead of what a padding token has: multiplied by a gradient of 0, its NaN would still be NaN.
        inputs = hidden[part].masked_fill(~counts[part, None], 0.0)
        losses, gradient = row_pass(
            linear(inputs, head), targets[part], loss_weight[part], l2_wrap, wants_hidden or wants_head
        )
        loss += losses.sum()
        if token_losses is not None:
            token_losses[part] = losses
        if grad_hidden is not None:
            grad_hidden[part] = linear(gradient.to(head.dtype), head.t())
        if grad_head is not None:
            _add_product_(grad_head, gradient, inputs)
        # Before the next piece's logits are made: two pieces would be alive.
        del gradient, losses
    return loss, token_losses, grad_hidden, None if grad_head is None else grad_head.to(head_weight.dtype)


def _add_product_(grad_head: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """Add gradientᵀ · inputs, [V, R] · [R, C], the sums in grad_head's dtype whatever that of the factors."""
    if inputs.is_cuda and inputs.dtype != grad_head.dtype:
        # Tensor cores take the factors in half precision and sum in float32; only CUDA has such a product.
        half = gradient.to(inputs.dtype)
        columns = max(1, PRODUCT_AT_ONCE // inputs.shape[1])
        for first in range(0, grad_head.shape[0], columns):
            part = slice(first, first + columns)
            grad_head[part] += torch.mm(half[:, part].t(), inputs, out_dtype=grad_head.dtype)
    else:
        grad_head += linear(gradient.to(grad_head.dtype).t(), inputs.to(grad_head.dtype).t())
