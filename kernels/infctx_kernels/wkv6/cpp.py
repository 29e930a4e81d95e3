"""WKV6 on a CPU, in C++: the autograd function around cpu/wkv6.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.cpu import library
from infctx_kernels.cpu.call import DTYPES, call, computable, contiguous


def why_not(device: torch.device, head_size: int, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot run, or None."""
    if device.type != "cpu":
        return "it runs on CPUs only"
    if dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    return library.why_not()


def wkv6_cpp(
    receptance: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    starts: Tensor | None,
    start_state: Tensor | None,
    *,
    decay_is_raw: bool,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence; shapes as in `op.wkv6`, all in float32 inside."""
    dtype = receptance.dtype
    inputs = [computable(x) for x in (receptance, key, value, decay)]
    fresh = None if start_state is None else start_state.float()
    output, new_state = _Wkv6.apply(*inputs, bonus.float(), state, fresh, starts, decay_is_raw)
    return output.to(dtype), new_state


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, starts, decay_is_raw = arguments
        receptance, key, value, decay, bonus, state, start_state, starts = contiguous([*tensors, starts])
        output = torch.empty_like(receptance)
        new_state = torch.empty_like(state)
        inputs = (receptance, key, value, decay, bonus, state, starts, start_state)
        call("infctx_wkv6_forward", _sizes(receptance, decay, decay_is_raw), *inputs, output, new_state)
        ctx.save_for_backward(*inputs)
        ctx.decay_is_raw = decay_is_raw
        ctx.set_materialize_grads(False)
        return output, new_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor | None, new_state_gradient: Tensor | None) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        receptance, key, value, decay, bonus, state, _, start_state = inputs
        if output_gradient is None:
            output_gradient = torch.zeros_like(receptance)
        if new_state_gradient is None:
            new_state_gradient = torch.zeros_like(state)
        gradients = [torch.empty_like(x) for x in (receptance, key, value, decay)]
        # One for each row, since rows are computed side by side.
        bonus_gradient = bonus.new_empty(receptance.shape[0], *bonus.shape)
        state_gradient = torch.empty_like(state)
        start_state_gradient = None if start_state is None else torch.empty_like(state)
        call(
            "infctx_wkv6_backward",
            _sizes(receptance, decay, ctx.decay_is_raw),
            *inputs,
            *contiguous([output_gradient, new_state_gradient]),
            *gradients,
            bonus_gradient,
            state_gradient,
            start_state_gradient,
        )
        start_state_sum = None if start_state_gradient is None else start_state_gradient.sum(0)
        return (*gradients, bonus_gradient.sum(0), state_gradient, start_state_sum, None, None)


def _sizes(receptance: Tensor, decay: Tensor, decay_is_raw: bool) -> tuple[int, ...]:
    return (*receptance.shape, DTYPES[receptance.dtype], DTYPES[decay.dtype], int(decay_is_raw))
