"""Group norm and gate on a CPU, in C++: the autograd function around cpu/surrounding.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.cpu.call import DTYPES, call, computable, contiguous


def group_norm_gate_cpp(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Shapes and dtypes as in `op.group_norm_gate`, none of them float64."""
    return _GroupNormGate.apply(computable(x), computable(gate), weight, bias, eps).to(gate.dtype)


class _GroupNormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, gate, weight, bias = contiguous((x, gate, weight, bias))
        ctx.save_for_backward(x, gate, weight, bias)
        ctx.eps = float(eps)
        out = torch.empty_like(gate)
        call("infctx_group_norm_gate_forward", _sizes(x, gate), ctx.eps, x, gate, weight.float(), bias.float(), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, bias = ctx.saved_tensors
        grad_x, grad_gate = torch.empty_like(x), torch.empty_like(gate)
        wants_affine = any(ctx.needs_input_grad[2:4])
        grad_affine = x.new_empty((2, *weight.shape), dtype=torch.float32) if wants_affine else None
        inputs = (x, gate, weight.float(), bias.float(), gradient.contiguous())
        results = (grad_x, grad_gate, grad_affine)
        call("infctx_group_norm_gate_backward", _sizes(x, gate), ctx.eps, *inputs, *results)
        if grad_affine is None:
            return grad_x, grad_gate, None, None, None
        grad_weight, grad_bias = grad_affine.unbind(0)
        return grad_x, grad_gate, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def _sizes(x: Tensor, gate: Tensor) -> tuple[int, ...]:
    rows, num_tokens, heads, size = x.shape
    return rows * num_tokens, heads, size, DTYPES[x.dtype], DTYPES[gate.dtype]
