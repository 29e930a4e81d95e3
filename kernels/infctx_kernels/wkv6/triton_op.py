"""The recurrence in Triton: which kernels run with which sizes, and the gradient."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from infctx_kernels.wkv6.triton_backward import (
    key_gradients_kernel,
    segment_state_gradients_kernel,
    value_gradients_kernel,
)
from infctx_kernels.wkv6.triton_blocks import BLOCK_TOKENS
from infctx_kernels.wkv6.triton_forward import outputs_kernel, scan_kernel, segment_states_kernel

HEAD_SIZES = (16, 32, 64, 128)
# Blocks of 16 tokens. The state is saved every 64 tokens for the backward pass, its gradient every 256.
CHECKPOINT_TOKENS = 64
SPAN_TOKENS = 256
# Below this a segment costs more (its state is read, written and scanned) than the parallel work gives.
SMALLEST_SEGMENT_TOKENS = 512
# So many programs of 128 threads fit, by their registers; segments are cut until the device is full.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Of the kernels that make and scan the states of segments.
STATE_WARPS = 4
# A block takes longer than its loads: two stages of them are enough, and take fewer registers than three. Fused
# multiplications and additions because the sums are made of them; Triton 3.9 warns where nobody says so.
COMPILER_OPTIONS = {"num_stages": 2, "enable_fp_fusion": True}
HOPPER = 9
# The runs of `key_gradients_kernel`, by whether they are split.
KEY_PARTS = {
    False: ({"WITH_STATE": True, "WITH_PAIRS": True},),
    True: ({"WITH_STATE": True, "WITH_PAIRS": False}, {"WITH_STATE": False, "WITH_PAIRS": True}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Sizes that decide how many registers a program needs.

    values: value channels of a program that holds all key channels of the state.
    keys: key channels of a program that holds all value channels of the state and of its gradient.
    channels, levels: how many channels and levels of a block's halves are multiplied at once.
    walk_warps, key_warps: of the programs that walk through segments, and of those for a tile of keys.
    splits_keys: whether what goes through states and what stays in a block are separate runs for a tile of keys.
    precision: of the matrix products, in Triton's words.
    """

    values: int
    keys: int
    channels: int
    levels: int
    walk_warps: int
    key_warps: int
    splits_keys: bool
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """How a sequence is cut, each a multiple of a block of 16 tokens: segments have programs of their own, the state is
    saved in front of every `checkpoint_tokens`, its gradient behind every `span_tokens`.
    """

    segment_tokens: int
    checkpoint_tokens: int
    span_tokens: int


def choose_tiles(*, head_size: int, dtype: torch.dtype, has_starts: bool, compute_capability: int) -> Tiles:
    """The fastest tiles that fit into registers; tests/kernels/cross_compile.py shows what they take.

    Larger ones share more work: the scores of a block are made again by every program of a tile of values.
    """
    # Hopper's own matrix instructions take 64 rows; elsewhere those would take too many registers.
    takes_64 = compute_capability == HOPPER and head_size == 64
    if dtype == torch.float32:
        return Tiles(
            values=64 if takes_64 and not has_starts else min(head_size, 16 if has_starts else 32),
            keys=min(head_size, 32), channels=16 if takes_64 and has_starts else min(head_size, 32),
            levels=4 if takes_64 and not has_starts else 2,
            walk_warps=8, key_warps=8, splits_keys=True,
            precision="tf32x3",
        )  # fmt: skip
    rows = 64 if takes_64 else min(head_size, 32)
    # Two warps for a head size of 16: Triton 3.9 fails to compile value_gradients_kernel with starts for four.
    return Tiles(
        values=rows, keys=rows, channels=min(head_size, 64), levels=4, walk_warps={16: 2, 128: 8}.get(head_size, 4),
        key_warps=8 if rows == 64 or head_size in (32, 128) or (has_starts and head_size == 64) else 4,
        splits_keys=head_size in (16, 128), precision="tf32",
    )  # fmt: skip


def plan_launch(*, programs: int, num_tokens: int, num_multiprocessors: int) -> LaunchPlan:
    """Cut into segments where the programs of one segment do not fill the device; depends on sizes only.

    programs: rows times heads times tiles, as programs of 128 threads.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
    # Segments need a pass before them: not worth it for the last half of the device.
    num_segments = 1 if 2 * programs > wanted else wanted // programs
    segment_tokens = max(-(-num_tokens // num_segments), SMALLEST_SEGMENT_TOKENS)
    segment_tokens = -(-segment_tokens // SPAN_TOKENS) * SPAN_TOKENS
    return LaunchPlan(segment_tokens=segment_tokens, checkpoint_tokens=CHECKPOINT_TOKENS, span_tokens=SPAN_TOKENS)


def wkv6_triton(
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
    plan: LaunchPlan | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence; shapes and dtypes as in `op.wkv6`, checked there, float64 excepted.

    Args:
        decay: the log decay, or raw with log_decay = -exp(raw); above 0, or NaN, the results are NaN.
        plan, tiles: how the sequence and the work are cut; None = by sizes and device.
    Returns:
        The output in receptance's dtype and the state after the last token in float32, a new tensor.
    """
    rows, num_tokens, heads, head_size = receptance.shape
    device = receptance.device
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if tiles is None:
        tiles = choose_tiles(
            head_size=head_size, dtype=receptance.dtype, has_starts=starts is not None, compute_capability=capability
        )
    if plan is None:
        plan = plan_launch(
            programs=rows * heads * (head_size // tiles.values) * tiles.walk_warps // 4, num_tokens=num_tokens,
            num_multiprocessors=_num_multiprocessors(device),
        )  # fmt: skip
    inputs = (receptance, key, value, decay, bonus, state, start_state)
    keeps_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, new_state = _Wkv6Triton.apply(*inputs, starts, decay_is_raw, plan, tiles, keeps_states)
    return output, new_state


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    """Sizes and switches that every kernel of one call shares."""

    rows: int
    num_tokens: int
    heads: int
    head_size: int
    plan: LaunchPlan
    tiles: Tiles
    decay_is_raw: bool
    has_starts: bool
    has_start_state: bool

    @property
    def num_segments(self) -> int:
        return triton.cdiv(self.num_tokens, self.plan.segment_tokens)

    @property
    def num_spans(self) -> int:
        return triton.cdiv(self.num_tokens, self.plan.span_tokens)

    @property
    def num_checkpoints(self) -> int:
        return triton.cdiv(self.num_tokens, self.plan.checkpoint_tokens)

    @property
    def walk_grid(self) -> tuple[int]:
        """Programs of the kernels that walk through segments."""
        return (self.head_size // self.tiles.values * self.rows * self.heads * self.num_segments,)

    @property
    def walk_sizes(self) -> tuple[int, int, int, int, int]:
        segment_blocks = self.plan.segment_tokens // BLOCK_TOKENS.value
        return self.num_tokens, self.rows * self.heads, self.heads, self.num_segments, segment_blocks

    def states(self, count: int, like: Tensor) -> Tensor:
        shape = (self.rows * self.heads, count, self.head_size, self.head_size)
        return torch.empty(shape, dtype=torch.float32, device=like.device)


def _segment_decays(launch: _Launch, like: Tensor) -> Tensor:
    shape = (launch.rows * launch.heads, launch.num_segments, launch.head_size)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _scan(launch: _Launch, initial: Tensor, states: Tensor, decays: Tensor, *, reverse: bool) -> None:
    tile = 16
    grid = (launch.rows * launch.heads * (launch.head_size // tile),)
    scan_kernel[grid](
        initial, states, decays, launch.num_segments,
        HEAD_SIZE=launch.head_size, KEY_TILE=tile, REVERSE=reverse, num_warps=STATE_WARPS,
        **COMPILER_OPTIONS,
    )  # fmt: skip


class _Wkv6Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        receptance: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        bonus: Tensor,
        state: Tensor,
        start_state: Tensor | None,
        starts: Tensor | None,
        decay_is_raw: bool,
        plan: LaunchPlan,
        tiles: Tiles,
        keeps_states: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, num_tokens, heads, head_size = receptance.shape
        receptance, key, value, decay, bonus, state = (
            x.contiguous() for x in (receptance, key, value, decay, bonus, state)
        )
        has_starts = starts is not None
        has_start_state = has_starts and start_state is not None
        # Never read without starts; a kernel's arguments still have to be pointers.
        starts = starts.contiguous().view(torch.uint8) if has_starts else bonus
        start_state = start_state.contiguous() if has_start_state else bonus
        launch = _Launch(
            rows=rows, num_tokens=num_tokens, heads=heads, head_size=head_size, plan=plan, decay_is_raw=decay_is_raw,
            has_starts=has_starts, has_start_state=has_start_state, tiles=tiles,
        )  # fmt: skip
        switches = dict(
            HEAD_SIZE=head_size, VALUE_TILE=tiles.values, DECAY_IS_RAW=decay_is_raw, HAS_STARTS=has_starts,
            HAS_START_STATE=has_start_state, PRECISION=tiles.precision, **COMPILER_OPTIONS,
        )  # fmt: skip
        output, new_state = torch.empty_like(receptance), torch.empty_like(state)
        checkpoints = launch.states(launch.num_checkpoints, state) if keeps_states else state
        with _on(receptance.device):
            front_states = state
            if launch.num_segments > 1:
                front_states = launch.states(launch.num_segments, state)
                decays = _segment_decays(launch, state)
                segment_states_kernel[launch.walk_grid](
                    key, value, decay, starts, start_state, front_states, decays, *launch.walk_sizes,
                    num_warps=STATE_WARPS, **switches,
                )  # fmt: skip
                _scan(launch, state, front_states, decays, reverse=False)
            outputs_kernel[launch.walk_grid](
                receptance, key, value, decay, bonus, starts, start_state, front_states, output, new_state,
                checkpoints, *launch.walk_sizes,
                CHECKPOINT_BLOCKS=plan.checkpoint_tokens // BLOCK_TOKENS.value, CHANNELS=tiles.channels,
                LEVELS=tiles.levels, SAVES_CHECKPOINTS=keeps_states, num_warps=tiles.walk_warps,
                **switches,
            )  # fmt: skip
        if keeps_states:
            ctx.save_for_backward(receptance, key, value, decay, bonus, starts, start_state, checkpoints)
            ctx.launch = launch
        return output, new_state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_output: Tensor, d_new_state: Tensor) -> tuple[Tensor | None, ...]:
        receptance, key, value, decay, bonus, starts, start_state, checkpoints = ctx.saved_tensors
        launch: _Launch = ctx.launch
        d_output, d_new_state = d_output.contiguous(), d_new_state.contiguous()
        # A second run adds to the first one's results: they must not be rounded before.
        of_keys = torch.float32 if launch.tiles.splits_keys else None
        d_receptance, d_key, d_decay = (torch.empty_like(x, dtype=of_keys) for x in (receptance, key, decay))
        d_value = torch.empty_like(value)
        d_state = torch.empty_like(d_new_state)
        span_gradients = launch.states(launch.num_spans, d_state)
        bonus_shape = (launch.rows, launch.heads, launch.num_spans, launch.head_size)
        d_bonus = torch.empty(bonus_shape, dtype=torch.float32, device=bonus.device)
        wants_start_state = launch.has_start_state and ctx.needs_input_grad[6]
        d_start_state = launch.states(launch.num_segments, d_state).zero_() if wants_start_state else d_state

        sizes, switches = launch.walk_sizes, dict(
            HEAD_SIZE=launch.head_size, DECAY_IS_RAW=launch.decay_is_raw, HAS_STARTS=launch.has_starts,
            PRECISION=launch.tiles.precision, **COMPILER_OPTIONS,
        )  # fmt: skip
        tiles = launch.tiles
        span_blocks = launch.plan.span_tokens // BLOCK_TOKENS.value
        with _on(receptance.device):
            end_gradients = d_new_state
            if launch.num_segments > 1:
                end_gradients = launch.states(launch.num_segments, d_state)
                decays = _segment_decays(launch, d_state)
                segment_state_gradients_kernel[launch.walk_grid](
                    receptance,
                    decay,
                    starts,
                    d_output,
                    end_gradients,
                    decays,
                    *sizes,
                    VALUE_TILE=tiles.values,
                    num_warps=STATE_WARPS,
                    **switches,
                )
                _scan(launch, d_new_state, end_gradients, decays, reverse=True)
            value_gradients_kernel[launch.walk_grid](
                receptance, key, decay, bonus, starts, d_output, end_gradients, d_value, d_state, d_start_state,
                span_gradients, *sizes,
                VALUE_TILE=tiles.values, SPAN_BLOCKS=span_blocks, CHANNELS=tiles.channels, LEVELS=tiles.levels,
                HAS_START_STATE=wants_start_state, num_warps=tiles.walk_warps, **switches,
            )  # fmt: skip
            grid = (launch.head_size // tiles.keys * launch.rows * launch.heads * launch.num_spans,)
            for parts in KEY_PARTS[tiles.splits_keys]:
                key_gradients_kernel[grid](
                    receptance, key, value, decay, bonus, starts, start_state, d_output, checkpoints, span_gradients,
                    d_receptance, d_key, d_decay, d_bonus, *sizes[:3],
                    KEY_TILE=tiles.keys, CHECKPOINT_BLOCKS=launch.plan.checkpoint_tokens // BLOCK_TOKENS.value,
                    SPAN_BLOCKS=span_blocks, HAS_START_STATE=launch.has_start_state, num_warps=tiles.key_warps,
                    **parts, **switches,
                )  # fmt: skip
        d_start = None
        if wants_start_state:
            by_row = d_start_state.view(launch.rows, launch.heads, *d_start_state.shape[1:])
            d_start = by_row.sum((0, 2)).to(start_state.dtype)
        d_bonus = d_bonus.sum((0, 2)).to(bonus.dtype)
        d_receptance, d_key, d_decay = d_receptance.to(receptance.dtype), d_key.to(key.dtype), d_decay.to(decay.dtype)
        return d_receptance, d_key, d_value, d_decay, d_bonus, d_state, d_start, None, None, None, None, None
