"""The mixes on a CPU, in C++: the autograd functions around cpu/surrounding.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.cpu.call import DTYPES, call, computable, contiguous


def shifted_mix_cpp(
    hidden: Tensor, carried: Tensor, weights: Tensor, dynamic: Tensor | None, starts: Tensor | None
) -> Tensor:
    """The mixes, stacked; shapes and dtypes as in `op.shifted_mix`, none of them float64."""
    return _ShiftedMix.apply(*_inputs(hidden, carried, weights, dynamic, starts)).to(hidden.dtype)


def separate_shifted_mix_cpp(
    hidden: Tensor, carried: Tensor, weights: Tensor, dynamic: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, ...]:
    """The same, as M tensors [B, T, C] that take their gradients one by one."""
    mixed = _SeparateShiftedMix.apply(*_inputs(hidden, carried, weights, dynamic, starts))
    return tuple(mix.to(hidden.dtype) for mix in mixed)


def _inputs(
    hidden: Tensor, carried: Tensor, weights: Tensor, dynamic: Tensor | None, starts: Tensor | None
) -> tuple[Tensor | None, ...]:
    if hidden.dtype not in DTYPES:
        # What is carried is used rounded to hidden's dtype, also where that is widened.
        carried = carried.to(hidden.dtype)
    return computable(hidden), carried, weights, None if dynamic is None else computable(dynamic), starts


class _ShiftedMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> Tensor:
        hidden, _, weights, *_ = arguments
        mixed = hidden.new_empty((weights.shape[0], *hidden.shape))
        _mix_(list(mixed.unbind(0)), ctx, *arguments)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, list(gradient.contiguous().unbind(0)))


class _SeparateShiftedMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        hidden, _, weights, *_ = arguments
        mixed = [hidden.new_empty(hidden.shape) for _ in range(weights.shape[0])]
        _mix_(mixed, ctx, *arguments)
        # A mix that nobody uses sends None back, not zeros.
        ctx.set_materialize_grads(False)
        return tuple(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, contiguous(gradients))


def _mix_(mixed: list[Tensor], ctx: Any, *arguments: Tensor | None) -> None:
    inputs = contiguous(arguments)
    # As they are given, and nothing else, for the backward pass.
    ctx.save_for_backward(*inputs)
    sizes, pointed_to = _call_arguments(inputs)
    call("infctx_shifted_mix_forward", sizes, *pointed_to, mixed)


def _gradients(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    # Read once: a recomputed layer hands them out a single time.
    inputs = ctx.saved_tensors
    hidden, carried, weights, dynamic, _ = inputs
    wants_hidden, wants_carried, wants_weights, wants_dynamic, _ = ctx.needs_input_grad
    grad_hidden = torch.empty_like(hidden) if wants_hidden else None
    grad_carried = torch.empty_like(carried, dtype=torch.float32)
    grad_weights = torch.empty_like(weights, dtype=torch.float32) if wants_weights else None
    grad_dynamic = torch.empty_like(dynamic) if wants_dynamic else None
    sizes, pointed_to = _call_arguments(inputs)
    results = (grad_hidden, grad_carried, grad_weights, grad_dynamic)
    call("infctx_shifted_mix_backward", sizes, *pointed_to, gradients, *results)
    return (
        grad_hidden,
        grad_carried.to(carried.dtype) if wants_carried else None,
        None if grad_weights is None else grad_weights.to(weights.dtype),
        grad_dynamic,
        None,
    )


def _call_arguments(inputs: Any) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """Sizes and tensors as the library takes them."""
    hidden, carried, weights, dynamic, starts = inputs
    sizes = (*hidden.shape, weights.shape[0], DTYPES[hidden.dtype])
    return sizes, (hidden, carried.to(hidden.dtype), weights.float(), dynamic, starts)
