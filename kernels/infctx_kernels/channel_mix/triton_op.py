"""Both steps as Triton kernels: what is read is read once, only the inputs are kept for the backward pass."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.surrounding import LAUNCH_OPTIONS

ELEMENTS_AT_ONCE = 1024


@triton.jit
@no_type_check
def _sigmoid(x):
    # The exponential of a positive number could overflow.
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
@no_type_check
def squared_relu_kernel(x, out, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # The comparison lets NaN through.
    squared = tl.where(value <= 0, 0.0, value * value)
    tl.store(out + at, squared.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def squared_relu_backward_kernel(grad, x, grad_x, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(value <= 0, 0.0, 2.0 * value * incoming)
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def sigmoid_gate_kernel(receptance, value, out, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    gate = _sigmoid(tl.load(receptance + at, mask=inside, other=0.0).to(tl.float32))
    gated = gate * tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def sigmoid_gate_backward_kernel(
    grad, receptance, value, grad_receptance, grad_value, num_elements, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    incoming = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(receptance + at, mask=inside, other=0.0).to(tl.float32)
    gate = _sigmoid(opening)
    gated = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
    # 1 - gate would lose every digit where the gate is open.
    to_receptance = incoming * gated * gate * _sigmoid(-opening)
    tl.store(grad_receptance + at, to_receptance.to(grad_receptance.dtype.element_ty), mask=inside)
    tl.store(grad_value + at, (incoming * gate).to(grad_value.dtype.element_ty), mask=inside)


def _launch(kernel: Any, *tensors: Tensor) -> None:
    num_elements = tensors[0].numel()
    if num_elements == 0:
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(num_elements, ELEMENTS_AT_ONCE),)](
            *tensors, num_elements, BLOCK=ELEMENTS_AT_ONCE, num_warps=4, **LAUNCH_OPTIONS
        )


class SquaredRelu(torch.autograd.Function):
    """x -> relu(x)²; x of any shape in fp32, bf16 or fp16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _launch(squared_relu_kernel, x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        _launch(squared_relu_backward_kernel, grad.contiguous(), x, grad_x)
        return grad_x


class SigmoidGate(torch.autograd.Function):
    """(receptance, value) -> sigmoid(receptance) · value; one shape, one dtype of fp32, bf16, fp16."""

    @staticmethod
    def forward(ctx: Any, receptance: Tensor, value: Tensor) -> Tensor:
        receptance, value = receptance.contiguous(), value.contiguous()
        ctx.save_for_backward(receptance, value)
        out = torch.empty_like(value)
        _launch(sigmoid_gate_kernel, receptance, value, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        receptance, value = ctx.saved_tensors
        grad_receptance, grad_value = torch.empty_like(receptance), torch.empty_like(value)
        _launch(sigmoid_gate_backward_kernel, grad.contiguous(), receptance, value, grad_receptance, grad_value)
        return grad_receptance, grad_value
