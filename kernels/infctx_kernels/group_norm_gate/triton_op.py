"""Group norm and gate as two Triton kernels: each activation is read once and written once in each direction.

A program owns some heads and walks over its tokens. The statistics of a head are sums over a few threads of one warp:
the backward pass computes them again instead of keeping them.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.surrounding import LAUNCH_OPTIONS, tokens_per_program

CHANNELS_AT_ONCE = 1024
ELEMENTS_PER_THREAD = 8


@triton.jit
@no_type_check
def _sigmoid(x):
    # The exponential of a positive number could overflow.
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
@no_type_check
def _normalised(x, inside, size, eps):
    """Each row of x with mean 0 and variance 1, zeros outside, and what it was multiplied by."""
    mean = tl.sum(x, axis=1) / size
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / size + eps)
    return centred * scale[:, None], scale


@triton.jit
@no_type_check
def forward_kernel(
    x,  # [B·T, H·N]
    gate,  # [B·T, H·N]
    weight,  # [H·N]
    bias,  # [H·N]
    out,  # [B·T, H·N]
    num_tokens,  # B·T
    heads,
    size,
    eps,
    tokens_here,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * tokens_here
    last = tl.minimum(first + tokens_here, num_tokens)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_N)[None, :]
    inside = (head < heads) & (channel < size)
    column = head * size + channel
    scaling = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shifting = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for step in range(last - first):
        place = (first + step).to(tl.int64) * heads * size + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        opening = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        normed, _ = _normalised(value, inside, size, eps)
        result = (normed * scaling + shifting) * opening * _sigmoid(opening)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def backward_kernel(
    grad,  # [B·T, H·N]
    x,
    gate,
    weight,
    bias,
    grad_x,
    grad_gate,
    partials,  # [programs, 2, H·N], float32, of weight and bias, or anything
    num_tokens,
    heads,
    size,
    eps,
    tokens_here,
    WANTS_WEIGHTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    first = program * tokens_here
    last = tl.minimum(first + tokens_here, num_tokens)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_N)[None, :]
    inside = (head < heads) & (channel < size)
    column = head * size + channel
    scaling = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shifting = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    to_weight = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
    to_bias = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
    for step in range(last - first):
        place = (first + step).to(tl.int64) * heads * size + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        opening = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normed, scale = _normalised(value, inside, size, eps)
        sigmoid = _sigmoid(opening)
        to_gate = incoming * (normed * scaling + shifting) * sigmoid * (1.0 + opening * (1.0 - sigmoid))
        tl.store(grad_gate + place, to_gate.to(grad_gate.dtype.element_ty), mask=inside)
        to_affine = incoming * opening * sigmoid
        if WANTS_WEIGHTS:
            to_weight += to_affine * normed
            to_bias += to_affine
        to_normed = to_affine * scaling
        mean = tl.sum(to_normed, axis=1) / size
        along = tl.sum(to_normed * normed, axis=1) / size
        to_x = (to_normed - mean[:, None] - normed * along[:, None]) * scale[:, None]
        tl.store(grad_x + place, to_x.to(grad_x.dtype.element_ty), mask=inside)
    if WANTS_WEIGHTS:
        partial_place = (program * 2).to(tl.int64) * heads * size + column
        tl.store(partials + partial_place, to_weight, mask=inside)
        tl.store(partials + partial_place + heads * size, to_bias, mask=inside)


def _launch_shape(num_tokens: int, heads: int, size: int) -> tuple[int, tuple[int, int], int, int, int]:
    """Tokens of a program, the grid, heads of a program, padded head size, and its warps."""
    block_size = triton.next_power_of_2(size)
    block_heads = min(max(1, CHANNELS_AT_ONCE // block_size), triton.next_power_of_2(heads))
    head_blocks = triton.cdiv(heads, block_heads)
    tokens = tokens_per_program(num_tokens, column_blocks=head_blocks)
    warps = min(8, max(1, block_heads * block_size // (32 * ELEMENTS_PER_THREAD)))
    return tokens, (triton.cdiv(num_tokens, tokens), head_blocks), block_heads, block_size, warps


class GroupNormGate(torch.autograd.Function):
    """(x, gate, weight, bias, eps) -> [B, T, H·N]; shapes and dtypes as in `op.group_norm_gate`, none of them fp64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, gate, weight, bias = (tensor.contiguous() for tensor in (x, gate, weight, bias))
        ctx.save_for_backward(x, gate, weight, bias)
        ctx.eps = eps
        rows, row_tokens, heads, size = x.shape
        num_tokens = rows * row_tokens
        tokens, grid, block_heads, block_size, warps = _launch_shape(num_tokens, heads, size)
        out = torch.empty_like(gate)
        with torch.cuda.device_of(x):
            forward_kernel[grid](
                x,
                gate,
                weight,
                bias,
                out,
                num_tokens,
                heads,
                size,
                eps,
                tokens,
                BLOCK_H=block_heads,
                BLOCK_N=block_size,
                num_warps=warps,
                **LAUNCH_OPTIONS,
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, bias = ctx.saved_tensors
        rows, row_tokens, heads, size = x.shape
        num_tokens = rows * row_tokens
        tokens, grid, block_heads, block_size, warps = _launch_shape(num_tokens, heads, size)
        grad_x, grad_gate = torch.empty_like(x), torch.empty_like(gate)
        wants_weights = any(ctx.needs_input_grad[2:4])
        partials = x.new_empty((grid[0], 2, heads * size), dtype=torch.float32) if wants_weights else None
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                grad.contiguous(),
                x,
                gate,
                weight,
                bias,
                grad_x,
                grad_gate,
                x if partials is None else partials,
                num_tokens,
                heads,
                size,
                ctx.eps,
                tokens,
                WANTS_WEIGHTS=wants_weights,
                BLOCK_H=block_heads,
                BLOCK_N=block_size,
                num_warps=warps,
                **LAUNCH_OPTIONS,
            )
        if partials is None:
            return grad_x, grad_gate, None, None, None
        to_weight, to_bias = partials.sum(0).unbind(0)
        return grad_x, grad_gate, to_weight.to(weight.dtype), to_bias.to(bias.dtype), None
