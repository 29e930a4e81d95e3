"""One chunk, held by several ranks: each has a slice of its tokens, and together they compute what one would.

The ranks of a time group hold the slices of every chunk in order. Before a chunk all of them have the same state, to
the bit, and so they have behind it. In the backward pass the gradient of the state behind the chunk is given to all of
them alike; it, and the gradient of the state before the chunk, belong to the total loss of the group. A rank's
gradients of the parameters are its own slice's part: their sum over the ranks is the whole.

Two things cross from slice to slice in a layer: the last hidden vector, for the token shifts, and the state of the
recurrence. For the latter every rank tells the others what its slice does to any state (infctx_kernels/wkv6/
slice_summary.py); each then carries the state past all slices, and runs the ordinary operator on its own from the state
that enters it. What is sent does not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx.model.config import FinchConfig
from infctx.shapes import LayerShift, LayerWkv, Starts
from infctx_kernels import wkv6_from_raw_decay
from infctx_kernels.wkv6.slice_summary import carry, summarise_reads, summarise_writes


class Gathering(NamedTuple):
    """A gather under way. gathered: [P, ...], one entry for each rank; to be read after `wait` only."""

    gathered: Tensor
    work: torch.distributed.Work

    def wait(self) -> Tensor:
        """What all ranks gave, in their order."""
        self.work.wait()
        return self.gathered


class TimeGroup:
    """The ranks that share each chunk; rank 0 has its first tokens. All that the model sends goes through here.

    Every rank must run the same chunks in the same way: with or without a graph, a loss, recomputed layers, starts.

    Attributes:
        rank, size: of this process in the group, and how many there are.
        bytes_received: by this rank from the others, so far.
    """

    def __init__(self, process_group: torch.distributed.ProcessGroup | None, *, rank: int, size: int) -> None:
        assert 0 <= rank < size, f"rank {rank} of {size}"
        self.rank, self.size = rank, size
        self.bytes_received = 0
        self._process_group = process_group

    def start_gather(self, mine: Tensor) -> Gathering:
        """Begin to collect a tensor of the same shape and dtype from every rank."""
        mine = mine.contiguous()
        gathered = mine.new_empty(self.size, *mine.shape)
        self.bytes_received += (self.size - 1) * mine.numel() * mine.element_size()
        # Both as one line of numbers: backends do not agree on more dimensions.
        work = _all_gather()(gathered.view(-1), mine.view(-1), group=self._process_group, async_op=True)
        return Gathering(gathered, work)

    def gather(self, mine: Tensor) -> Tensor:
        """A tensor of the same shape and dtype from every rank: [P, ...]."""
        return self.start_gather(mine).wait()

    def exchange(self, last: LayerShift, shift: LayerShift) -> tuple[LayerShift, LayerShift]:
        """Give this slice's last hidden vector to the rank behind, and the chunk's last one to all.

        Args:
            last: hidden at the slice's last token.
            shift: the shift state before the chunk, the same on every rank.
        Returns:
            What stands before the slice's first token, and the shift state behind the chunk, the same on every rank;
            both in the dtype of `shift`.
        """
        return _Exchange.apply(last, shift, self)


def _all_gather() -> Callable[..., torch.distributed.Work]:
    # What torch calls it from 2.13 on, where the former name warns.
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    return getattr(torch.distributed, name)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: Tensor, shift: Tensor, group: TimeGroup) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.dtype = group, last.dtype
        every_last = group.gather(last)
        before = shift if group.rank == 0 else every_last[group.rank - 1]
        # Copies: a state must not be a view of anything larger.
        return before.to(shift.dtype, copy=True), every_last[-1].to(shift.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, before_gradient: Tensor, after_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        group = ctx.group
        every_before = group.gather(before_gradient)
        # The gradient of the state behind the chunk is one that all ranks know: only the rank that made it takes it.
        is_last = group.rank == group.size - 1
        last_gradient = after_gradient if is_last else every_before[group.rank + 1]
        return last_gradient.to(ctx.dtype), every_before[0].clone(), None


class SlicedWkv6:
    """The recurrence over a chunk, begun when key, value and decay are known: the rest is computed while ranks talk."""

    def __init__(
        self,
        group: TimeGroup,
        key: Tensor,
        value: Tensor,
        raw_decay: Tensor,
        state: LayerWkv,
        *,
        starts: Starts | None,
        start_state: Tensor | None,
        backend: str | None,
    ) -> None:
        """Arguments as in `wkv6_from_raw_decay`, of this rank's slice; state: before the chunk, the same on each."""
        self._group, self._state, self._starts, self._start_state = group, state, starts, start_state
        self._key, self._value, self._raw_decay, self._backend = key, value, raw_decay, backend
        decay, written = summarise_writes(
            key, value, raw_decay, dtype=state.dtype, starts=starts, start_state=start_state, backend=backend
        )
        self._gathering = group.start_gather(torch.cat([written, decay[..., None]], dim=-1))

    def run(self, receptance: Tensor, bonus: Tensor) -> tuple[Tensor, LayerWkv]:
        """The slice's output, and the state behind the chunk, bit for bit the same on every rank."""
        group = self._group
        every_slice = self._gathering.wait()  # [P, B, H, N, N + 1]
        decays = every_slice[..., -1].clone()
        after, entering = self._state.detach(), []
        for rank in range(group.size):
            entering.append(after)
            after = carry(after, decays[rank], every_slice[rank, ..., :-1])
        output, own_after = wkv6_from_raw_decay(
            receptance,
            self._key,
            self._value,
            self._raw_decay,
            bonus,
            entering[group.rank],
            starts=self._starts,
            start_state=self._start_state,
            backend=self._backend,
        )
        constants = (after, decays, receptance, self._raw_decay, self._starts)
        return _Join.apply(output, own_after, self._state, *constants, group, self._backend)


class _Join(torch.autograd.Function):
    """Makes of the operator on a slice, from a constant state, the operator on the chunk from the state before it.

    Forward it puts the chunk's state in the place of the slice's. Backward it finds the gradient of the state behind
    the slice, which the operator's own backward pass needs, and that of the state before the chunk.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, own_after: Tensor, state: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        after, *needed, ctx.group, ctx.backend = arguments
        ctx.dtype = state.dtype
        ctx.save_for_backward(*needed)
        return output, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor, after_gradient: Tensor) -> tuple[Tensor | None, ...]:
        decays, receptance, raw_decay, starts = ctx.saved_tensors
        group = ctx.group
        read = summarise_reads(
            receptance, output_gradient, raw_decay, dtype=ctx.dtype, starts=starts, backend=ctx.backend
        )
        every_read = group.gather(read)
        gradient, behind = after_gradient, []
        for rank in reversed(range(group.size)):
            behind.append(gradient)
            gradient = carry(gradient, decays[rank], every_read[rank])
        return output_gradient, behind[group.size - 1 - group.rank], gradient, *[None] * 7


def bytes_per_chunk(config: FinchConfig, rows: int, ranks: int, *, hidden_bytes: int, is_backward: bool = False) -> int:
    """What each rank receives in one pass through one chunk, of any number of tokens.

    Per layer, from each of the other ranks. Forward: two hidden vectors [B, C] in the dtype of the activations, and
    decay [B, H, N] and writes [B, H, N, N] of a slice in that of the state. Backward: two gradients [B, C] and the
    reads [B, H, N, N], in that of the state. A chunk in sweep 1 is one forward pass; in sweep 2 one forward (two where
    layers are recomputed) and one backward.

    Args:
        rows: B.
        ranks: of the time group.
        hidden_bytes: of one activation: 2, 4 or 8.
        is_backward: of the backward pass; else of the forward pass.
    """
    # The state is float64 with float64 activations and float32 with all others.
    state_bytes = max(4, hidden_bytes)
    matrices = config.n_head * config.head_size**2 * state_bytes
    if is_backward:
        a_row = 2 * config.n_embd * state_bytes + matrices
    else:
        a_row = 2 * config.n_embd * hidden_bytes + matrices + config.dim_att * state_bytes
    return config.n_layer * (ranks - 1) * rows * a_row
