"""Squared ReLU and sigmoid gate on a CPU, in C++: the autograd functions around cpu/surrounding.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.cpu.call import DTYPES, call, computable


def squared_relu_cpp(x: Tensor) -> Tensor:
    """relu(x)²; x of any shape and dtype but float64."""
    return _SquaredRelu.apply(computable(x)).to(x.dtype)


def sigmoid_gate_cpp(receptance: Tensor, value: Tensor) -> Tensor:
    """sigmoid(receptance) · value; one shape, one dtype, which is not float64."""
    return _SigmoidGate.apply(computable(receptance), computable(value)).to(value.dtype)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        call("infctx_squared_relu_forward", _sizes(x), x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        call("infctx_squared_relu_backward", _sizes(x), x, gradient.contiguous(), grad_x)
        return grad_x


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receptance: Tensor, value: Tensor) -> Tensor:
        receptance, value = receptance.contiguous(), value.contiguous()
        ctx.save_for_backward(receptance, value)
        out = torch.empty_like(value)
        call("infctx_sigmoid_gate_forward", _sizes(value), receptance, value, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        receptance, value = ctx.saved_tensors
        grads = (torch.empty_like(receptance), torch.empty_like(value))
        call("infctx_sigmoid_gate_backward", _sizes(value), receptance, value, gradient.contiguous(), *grads)
        return grads


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tensor.numel(), DTYPES[tensor.dtype]
