"""The mixes as two Triton kernels: each activation is read once and written once in each direction.

A program owns a block of channels and walks over its tokens, forward in the forward pass and backward in the backward
pass, so that the neighbouring token, and the gradient that crosses to it, stay in registers.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx_kernels.surrounding import LAUNCH_OPTIONS, tokens_per_program

WARPS = 4
# Channels of a program: 8 a thread, 16 bytes of bf16. The backward pass keeps twice as many values for each; with 8 a
# thread, too few programs would fit on a multiprocessor to hide how long memory takes.
FORWARD_CHANNELS, BACKWARD_CHANNELS = 1024, 512


@triton.jit
@no_type_check
def _pick(m: tl.constexpr, x0, x1, x2, x3, x4):
    return x0 if m == 0 else (x1 if m == 1 else (x2 if m == 2 else (x3 if m == 3 else x4)))


@triton.jit
@no_type_check
def _only_if(is_there, column, channels):
    """Which columns to touch: none where there is no such token."""
    # Not `&`: Triton's interpreter makes an integer of a scalar condition that meets a block of them.
    return column < tl.where(is_there, channels, 0)


@triton.jit
@no_type_check
def _weight(weights, m: tl.constexpr, column, inside, channels, NUM_MIXES: tl.constexpr):
    """Row m of the weights, in float32; zeros where there is no such mix."""
    if m < NUM_MIXES:
        return tl.load(weights + m * channels + column, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(column).to(tl.float32)


@triton.jit
@no_type_check
def forward_kernel(
    hidden,  # [B·T, C]
    carried,  # [B, C]
    weights,  # [M, C]
    dynamic,  # [M, B·T, C] or anything
    starts,  # [B·T], bytes, or anything
    mixed0,  # the M mixes, [B·T, C] each; beyond M anything
    mixed1,
    mixed2,
    mixed3,
    mixed4,
    row_tokens,  # T
    all_tokens,  # B·T
    channels,
    tokens_here,
    NUM_MIXES: tl.constexpr,
    HAS_DYNAMIC: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0) * tokens_here
    last = tl.minimum(first + tokens_here, all_tokens)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    weight0 = _weight(weights, 0, column, inside, channels, NUM_MIXES)
    weight1 = _weight(weights, 1, column, inside, channels, NUM_MIXES)
    weight2 = _weight(weights, 2, column, inside, channels, NUM_MIXES)
    weight3 = _weight(weights, 3, column, inside, channels, NUM_MIXES)
    weight4 = _weight(weights, 4, column, inside, channels, NUM_MIXES)
    before = tl.load(
        hidden + (first - 1).to(tl.int64) * channels + column, mask=_only_if(first > 0, column, channels), other=0.0
    )
    for step in range(last - first):
        token = first + step
        place = token.to(tl.int64) * channels + column
        own = tl.load(hidden + place, mask=inside, other=0.0)
        is_first = token % row_tokens == 0
        row = (token // row_tokens).to(tl.int64)
        fed = tl.load(carried + row * channels + column, mask=_only_if(is_first, column, channels), other=0.0).to(
            own.dtype
        )
        previous = tl.where(is_first, fed, before).to(tl.float32)
        if HAS_STARTS:
            previous = tl.where(tl.load(starts + token) != 0, 0.0, previous)
        difference = previous - own.to(tl.float32)
        for m in tl.static_range(NUM_MIXES):
            amount = _pick(m, weight0, weight1, weight2, weight3, weight4)
            if HAS_DYNAMIC:
                dynamic_place = (token + m * all_tokens).to(tl.int64) * channels + column
                amount += tl.load(dynamic + dynamic_place, mask=inside, other=0.0).to(tl.float32)
            result = own.to(tl.float32) + difference * amount
            mixed = _pick(m, mixed0, mixed1, mixed2, mixed3, mixed4)
            tl.store(mixed + place, result.to(mixed.dtype.element_ty), mask=inside)
        before = own


@triton.jit
@no_type_check
def backward_kernel(
    grad0,  # gradients of the M mixes, [B·T, C] each; beyond M anything
    grad1,
    grad2,
    grad3,
    grad4,
    hidden,
    carried,
    weights,
    dynamic,
    starts,
    grad_hidden,  # [B·T, C]
    grad_carried,  # [B, C]
    grad_dynamic,  # [M, B·T, C] or anything
    partials,  # [programs, M, C], float32, or anything
    row_tokens,
    all_tokens,
    channels,
    tokens_here,
    NUM_MIXES: tl.constexpr,
    HAS_DYNAMIC: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    WANTS_DYNAMIC: tl.constexpr,
    WANTS_WEIGHTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    first = program * tokens_here
    last = tl.minimum(first + tokens_here, all_tokens)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    weight0 = _weight(weights, 0, column, inside, channels, NUM_MIXES)
    weight1 = _weight(weights, 1, column, inside, channels, NUM_MIXES)
    weight2 = _weight(weights, 2, column, inside, channels, NUM_MIXES)
    weight3 = _weight(weights, 3, column, inside, channels, NUM_MIXES)
    weight4 = _weight(weights, 4, column, inside, channels, NUM_MIXES)
    sum0 = tl.zeros([BLOCK_C], dtype=tl.float32)
    sum1 = tl.zeros([BLOCK_C], dtype=tl.float32)
    sum2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    sum3 = tl.zeros([BLOCK_C], dtype=tl.float32)
    sum4 = tl.zeros([BLOCK_C], dtype=tl.float32)

    # What the token after this program's last one sends back to it.
    sends_back = (last < all_tokens) & (last % row_tokens != 0)
    if HAS_STARTS:
        sends_back = sends_back & (tl.load(starts + last, mask=sends_back, other=1) == 0)
    touched = _only_if(sends_back, column, channels)
    from_next = tl.zeros([BLOCK_C], dtype=tl.float32)
    for m in tl.static_range(NUM_MIXES):
        amount = _pick(m, weight0, weight1, weight2, weight3, weight4)
        if HAS_DYNAMIC:
            dynamic_place = (last + m * all_tokens).to(tl.int64) * channels + column
            amount += tl.load(dynamic + dynamic_place, mask=touched, other=0.0).to(tl.float32)
        sender = _pick(m, grad0, grad1, grad2, grad3, grad4) + last.to(tl.int64) * channels
        from_next += tl.load(sender + column, mask=touched, other=0.0).to(tl.float32) * amount
    from_next = tl.where(sends_back, from_next, 0.0)

    own = tl.load(hidden + (last - 1).to(tl.int64) * channels + column, mask=inside, other=0.0)
    for step in range(last - first):
        token = last - 1 - step
        place = token.to(tl.int64) * channels + column
        before = tl.load(hidden + place - channels, mask=_only_if(token > 0, column, channels), other=0.0)
        is_first = token % row_tokens == 0
        row_place = (token // row_tokens).to(tl.int64) * channels + column
        fed = tl.load(carried + row_place, mask=_only_if(is_first, column, channels), other=0.0).to(own.dtype)
        previous = tl.where(is_first, fed, before).to(tl.float32)
        if HAS_STARTS:
            is_start = tl.load(starts + token) != 0
            previous = tl.where(is_start, 0.0, previous)
        difference = previous - own.to(tl.float32)
        to_own = tl.zeros([BLOCK_C], dtype=tl.float32)
        to_previous = tl.zeros([BLOCK_C], dtype=tl.float32)
        for m in tl.static_range(NUM_MIXES):
            amount = _pick(m, weight0, weight1, weight2, weight3, weight4)
            dynamic_place = (token + m * all_tokens).to(tl.int64) * channels + column
            if HAS_DYNAMIC:
                amount += tl.load(dynamic + dynamic_place, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(_pick(m, grad0, grad1, grad2, grad3, grad4) + place, mask=inside, other=0.0).to(tl.float32)
            to_own += grad * (1.0 - amount)
            to_previous += grad * amount
            to_amount = grad * difference
            if WANTS_DYNAMIC:
                tl.store(grad_dynamic + dynamic_place, to_amount.to(grad_dynamic.dtype.element_ty), mask=inside)
            if WANTS_WEIGHTS:
                if m == 0:
                    sum0 += to_amount
                elif m == 1:
                    sum1 += to_amount
                elif m == 2:
                    sum2 += to_amount
                elif m == 3:
                    sum3 += to_amount
                else:
                    sum4 += to_amount
        tl.store(grad_hidden + place, (to_own + from_next).to(grad_hidden.dtype.element_ty), mask=inside)
        if HAS_STARTS:
            to_previous = tl.where(is_start, 0.0, to_previous)
        tl.store(
            grad_carried + row_place,
            to_previous.to(grad_carried.dtype.element_ty),
            mask=_only_if(is_first, column, channels),
        )
        from_next = tl.where(is_first, 0.0, to_previous)
        own = before
    if WANTS_WEIGHTS:
        for m in tl.static_range(NUM_MIXES):
            partial_place = (program * NUM_MIXES + m).to(tl.int64) * channels + column
            tl.store(partials + partial_place, _pick(m, sum0, sum1, sum2, sum3, sum4), mask=inside)


def _launch_shape(all_tokens: int, channels: int, *, at_once: int) -> tuple[int, tuple[int, int], int]:
    """Tokens of a program, the grid, and channels of a program."""
    block = min(at_once, triton.next_power_of_2(channels))
    column_blocks = triton.cdiv(channels, block)
    tokens = tokens_per_program(all_tokens, column_blocks=column_blocks)
    return tokens, (triton.cdiv(all_tokens, tokens), column_blocks), block


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """Five arguments whatever the number of mixes; a kernel never touches those beyond it."""
    return tensors + tensors[:1] * (5 - len(tensors))


def _mix_(
    mixed: list[Tensor], hidden: Tensor, carried: Tensor, weights: Tensor, dynamic: Tensor | None, starts: Tensor | None
) -> None:
    rows, num_tokens, channels = hidden.shape
    tokens, grid, block = _launch_shape(rows * num_tokens, channels, at_once=FORWARD_CHANNELS)
    with torch.cuda.device_of(hidden):
        forward_kernel[grid](
            hidden,
            carried,
            weights,
            hidden if dynamic is None else dynamic,
            hidden if starts is None else starts.view(torch.uint8),
            *_padded(mixed),
            num_tokens,
            rows * num_tokens,
            channels,
            tokens,
            NUM_MIXES=len(mixed),
            HAS_DYNAMIC=dynamic is not None,
            HAS_STARTS=starts is not None,
            BLOCK_C=block,
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )


def _save(ctx: Any, *arguments: Tensor | None) -> list[Tensor | None]:
    """Keep the inputs, and nothing else, for the backward pass; returns them contiguous."""
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in arguments]
    ctx.save_for_backward(*contiguous)
    return contiguous


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    hidden, carried, weights, dynamic, starts = ctx.saved_tensors
    _, wants_carried, wants_weights, wants_dynamic, _ = ctx.needs_input_grad
    rows, num_tokens, channels = hidden.shape
    num_mixes = weights.shape[0]
    tokens, grid, block = _launch_shape(rows * num_tokens, channels, at_once=BACKWARD_CHANNELS)
    grad_hidden, grad_carried = torch.empty_like(hidden), torch.empty_like(carried)
    grad_dynamic = torch.empty_like(dynamic) if wants_dynamic else None
    partials = hidden.new_empty((grid[0], num_mixes, channels), dtype=torch.float32) if wants_weights else None
    with torch.cuda.device_of(hidden):
        backward_kernel[grid](
            *_padded([grad.contiguous() for grad in grads]),
            hidden,
            carried,
            weights,
            hidden if dynamic is None else dynamic,
            hidden if starts is None else starts.view(torch.uint8),
            grad_hidden,
            grad_carried,
            hidden if grad_dynamic is None else grad_dynamic,
            hidden if partials is None else partials,
            num_tokens,
            rows * num_tokens,
            channels,
            tokens,
            NUM_MIXES=num_mixes,
            HAS_DYNAMIC=dynamic is not None,
            HAS_STARTS=starts is not None,
            WANTS_DYNAMIC=grad_dynamic is not None,
            WANTS_WEIGHTS=partials is not None,
            BLOCK_C=block,
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )
    grad_weights = None if partials is None else partials.sum(0).to(weights.dtype)
    return grad_hidden, grad_carried if wants_carried else None, grad_weights, grad_dynamic, None


class ShiftedMix(torch.autograd.Function):
    """(hidden, carried, weights, dynamic, starts) -> [M, B, T, C]; shapes and dtypes as in `op.shifted_mix`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> Tensor:
        hidden, carried, weights, dynamic, starts = _save(ctx, *arguments)
        mixed = hidden.new_empty((weights.shape[0], *hidden.shape))
        _mix_(list(mixed.unbind(0)), hidden, carried, weights, dynamic, starts)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, list(grad.unbind(0)))


class SeparateShiftedMix(torch.autograd.Function):
    """The same, as M tensors [B, T, C] that take their gradients one by one."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        hidden, carried, weights, dynamic, starts = _save(ctx, *arguments)
        mixed = [torch.empty_like(hidden) for _ in range(weights.shape[0])]
        _mix_(mixed, hidden, carried, weights, dynamic, starts)
        return tuple(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, list(grads))
