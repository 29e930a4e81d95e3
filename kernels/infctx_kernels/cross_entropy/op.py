"""The public operator: checks what it is given and chooses a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infctx_kernels.cross_entropy.chunked import ChunkedLoss, RowPass, loss_and_gradients, torch_row_pass
from infctx_kernels.cross_entropy.reference import linear_cross_entropy_reference
from infctx_kernels.surrounding import SurroundingBackend, check_float, check_tensors, choose_surrounding

# Logits alive at once: 256 tokens of a World vocabulary.
LOGITS_AT_ONCE = 2**24

# The sum, and the weighted losses of the tokens where they are wanted.
Losses = tuple[Tensor, Tensor | None]


def _in_pieces(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    *,
    l2_wrap: float,
    wants_tokens: bool,
    row_pass: RowPass,
) -> Losses:
    rows_at_once = max(1, LOGITS_AT_ONCE // head_weight.shape[0])
    fixed = (targets, loss_weight, l2_wrap, rows_at_once, row_pass, wants_tokens)
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return ChunkedLoss.apply(hidden, head_weight, *fixed)
    return loss_and_gradients(hidden, head_weight, *fixed, False, False)[:2]


def _torch(*tensors: Tensor, l2_wrap: float, wants_tokens: bool) -> Losses:
    return _in_pieces(*tensors, l2_wrap=l2_wrap, wants_tokens=wants_tokens, row_pass=torch_row_pass)


def _triton(*tensors: Tensor, l2_wrap: float, wants_tokens: bool) -> Losses:
    from infctx_kernels.cross_entropy.triton_op import triton_row_pass

    return _in_pieces(*tensors, l2_wrap=l2_wrap, wants_tokens=wants_tokens, row_pass=triton_row_pass)


def _cpp(*tensors: Tensor, l2_wrap: float, wants_tokens: bool) -> Losses:
    from infctx_kernels.cross_entropy.cpp_op import cpp_row_pass

    return _in_pieces(*tensors, l2_wrap=l2_wrap, wants_tokens=wants_tokens, row_pass=cpp_row_pass)


# Each takes what `linear_cross_entropy` takes, checked.
RUNNERS: dict[SurroundingBackend, Callable[..., Losses]] = {
    SurroundingBackend.TRITON: _triton,
    SurroundingBackend.CPP: _cpp,
    SurroundingBackend.TORCH: _torch,
    SurroundingBackend.REFERENCE: linear_cross_entropy_reference,
}


def linear_cross_entropy(
    hidden: Float[Tensor, "T C"],
    head_weight: Float[Tensor, "V C"],
    targets: Int[Tensor, " T"],
    loss_weight: Float[Tensor, " T"],
    *,
    l2_wrap: float = 0.0,
    backend: str | None = None,
    with_token_losses: bool = False,
) -> Float[Tensor, ""] | tuple[Float[Tensor, ""], Float[Tensor, " T"]]:
    """Sum over tokens of loss_weight · (cross entropy + l2_wrap / 2 · largest logit²).

    The logits, hidden · head_weightᵀ, are computed in hidden's dtype and then treated as float32. Where a gradient is
    needed, all backends but reference compute it in the forward pass, for `LOGITS_AT_ONCE` logits at a time, and keep
    it until the backward pass, which only multiplies by the gradient of the loss: recomputing the forward pass under
    activation checkpointing would do all of it twice.

    Args:
        hidden: what the head is applied to; fp32, bf16, fp16, fp64; T, C >= 1.
        head_weight: any float dtype, used in hidden's.
        targets: int64, the id each token should predict; any number where the weight is 0.
        loss_weight: any float dtype. A token of weight 0 adds nothing to the loss or a gradient, whatever its hidden.
        l2_wrap: weight of the penalty that keeps the logits from drifting, >= 0; its gradient goes to the largest
            logit, the first one where several are equal.
        backend: a name of `SurroundingBackend`; None = the fastest that can run here. "reference" holds all logits.
        with_token_losses: give back the terms of the sum too.
    Returns:
        The sum, float32 (float64 with float64 hidden). Gradients flow into hidden and head_weight, in their dtypes;
        that of head_weight is summed in float32. With token losses a pair: the sum, to the same bits, and its terms in
        its dtype [T], weighted, through which no gradient flows.
    Raises:
        ValueError: a shape, dtype or device is wrong; on the CPU also: a target of a weighted token is no id (elsewhere
            looking would stall the device, and the loss is NaN). BackendError: the backend cannot run here.
    Source: L2Wrap of the official RWKV trainer, as a term of the loss.
    """
    _check(hidden, head_weight, targets, loss_weight, l2_wrap)
    chosen = choose_surrounding(backend, device=hidden.device, dtypes=(hidden.dtype,))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, token_losses = RUNNERS[chosen](
            hidden, head_weight, targets, loss_weight, l2_wrap=l2_wrap, wants_tokens=with_token_losses
        )
    return loss if token_losses is None else (loss, token_losses)


def _check(hidden: Tensor, head_weight: Tensor, targets: Tensor, loss_weight: Tensor, l2_wrap: float) -> None:
    if hidden.dim() != 2 or 0 in hidden.shape:
        raise ValueError(f"hidden: expected [T, C], none of them 0, got {list(hidden.shape)}")
    num_tokens, channels = hidden.shape
    if head_weight.dim() != 2 or head_weight.shape[0] < 1:
        raise ValueError(f"head_weight: expected [V, C] with V >= 1, got {list(head_weight.shape)}")
    num_ids = head_weight.shape[0]
    expected = {
        "head_weight": (head_weight, (num_ids, channels)),
        "targets": (targets, (num_tokens,)),
        "loss_weight": (loss_weight, (num_tokens,)),
    }
    check_tensors("hidden", hidden, expected)
    for name, tensor in (("hidden", hidden), ("head_weight", head_weight), ("loss_weight", loss_weight)):
        check_float(name, tensor)
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if loss_weight.requires_grad:
        raise ValueError("loss_weight: expected a tensor without gradient, got requires_grad=True; none is computed")
    if not 0.0 <= l2_wrap < float("inf"):
        raise ValueError(f"l2_wrap: expected a finite number >= 0, got {l2_wrap}")
    if hidden.device.type == "cpu":
        is_wrong = ((targets < 0) | (targets >= num_ids)) & (loss_weight != 0)
        if bool(is_wrong.any()):
            at = int(is_wrong.nonzero()[0])
            raise ValueError(
                f"targets: expected ids from 0 to {num_ids - 1} where loss_weight is not 0, "
                f"got {int(targets[at])} at token {at}"
            )
