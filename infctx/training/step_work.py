"""How far a step is, and what a run still has to do, counted in tokens of a row that each sweep goes through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infctx.data.chunking import RowChunks
from infctx.data.step_source import StepData
from infctx.model.finch import Finch
from infctx.training.step_place import WalkPlace


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepTokens:
    """Tokens of a row through each sweep: `forward` without a graph, `backward` with one."""

    forward: float = 0.0
    backward: float = 0.0

    def plus(self, other: SweepTokens, times: float = 1.0) -> SweepTokens:
        """Their sum; the other one so many times."""
        return SweepTokens(
            forward=self.forward + times * other.forward, backward=self.backward + times * other.backward
        )

    def work(self, backward_cost: float) -> float:
        """In tokens of sweep 1: one of sweep 2 takes `backward_cost` times as long."""
        return self.forward + backward_cost * self.backward


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkPlace:
    """The chunk of a step that is to be run next.

    Attributes:
        step: under way, counted from 1.
        group, chunk, window: counted from 0; num_groups, num_chunks (of the group), num_windows: there are.
        in_sweep_2: it is run for its gradient, from the last chunk of the window to the first.
        token: where the chunk begins in the rows; chunk_tokens: its length.
        num_tokens: of the group's rows, padding included. step_tokens: real ones, of the whole step and all ranks.
        done, total: of the step, all its groups.
    """

    step: int
    group: int
    num_groups: int
    chunk: int
    num_chunks: int
    window: int
    num_windows: int
    in_sweep_2: bool
    token: int
    chunk_tokens: int
    num_tokens: int
    step_tokens: int
    done: SweepTokens
    total: SweepTokens


class StepWork:
    """The chunks of a step, so that any place in it can be told in microseconds.

    Args:
        step: its number, counted from 1.
        window: in chunks as the source cut them.
    """

    def __init__(self, step: int, data: StepData, window: int | str) -> None:
        self._step, self._step_tokens = step, data.num_tokens
        self._groups = [_Group(group.chunks, window) for group in data.groups]
        self._before = [SweepTokens()]
        for group in self._groups:
            self._before.append(self._before[-1].plus(group.total))

    def place(self, group: int, walk: WalkPlace) -> ChunkPlace:
        """The place of a walk through one of the groups."""
        own = self._groups[group]
        begin = own.begin(walk.chunk)
        return ChunkPlace(
            step=self._step,
            group=group,
            num_groups=len(self._groups),
            chunk=walk.chunk,
            num_chunks=own.num_chunks,
            window=walk.window_first // own.length,
            num_windows=own.num_windows,
            in_sweep_2=walk.in_sweep_2,
            token=begin,
            chunk_tokens=own.begin(walk.chunk + 1) - begin,
            num_tokens=own.num_tokens,
            step_tokens=self._step_tokens,
            done=self._before[group].plus(own.done(walk)),
            total=self._before[-1],
        )


class _Group:
    """The windows of one group of rows."""

    def __init__(self, chunks: RowChunks, window: int | str) -> None:
        self._chunks, self.num_tokens, self.num_chunks = chunks, chunks.num_tokens, len(chunks)
        in_pieces = self.num_chunks if isinstance(window, str) else window * chunks.pieces_per_chunk
        self.length = min(in_pieces, self.num_chunks)
        self.num_windows = -(-self.num_chunks // self.length)
        # Of a window that is not the last: sweep 1 leaves out its last chunk.
        self._in_window = self.begin(self.length - 1)
        last_window = (self.num_windows - 1) * self.length
        in_last = self.begin(self.num_chunks - 1) - self.begin(last_window)
        forward = (self.num_windows - 1) * self._in_window + in_last
        self.total = SweepTokens(forward=forward, backward=self.num_tokens)

    def begin(self, chunk: int) -> int:
        """The token where a chunk begins; of the one behind the last, where the rows end."""
        chunks = self._chunks
        whole, piece = divmod(chunk, chunks.pieces_per_chunk)
        return min(whole * chunks.chunk_tokens + piece * chunks.piece_tokens, self.num_tokens)

    def done(self, walk: WalkPlace) -> SweepTokens:
        """What lies behind, windows before this one included."""
        first = self.begin(walk.window_first)
        forward = walk.window_first // self.length * self._in_window
        if not walk.in_sweep_2:
            return SweepTokens(forward=forward + self.begin(walk.chunk) - first, backward=first)
        end = min(walk.window_first + self.length, self.num_chunks)
        forward += self.begin(end - 1) - first
        return SweepTokens(forward=forward, backward=first + self.begin(end) - self.begin(walk.chunk + 1))


def sweep_tokens(
    lengths: Iterable[tuple[npt.NDArray[np.int64], float]], *, chunk_tokens: int, window: int | str
) -> SweepTokens:
    """What rows of these lengths cost both sweeps.

    Args:
        lengths: tokens of groups of rows, their padding included, all at least 1; and how many times they come.
        chunk_tokens, window: as in the recipe's bptt section.
    """
    total = SweepTokens()
    for tokens, times in lengths:
        chunks = -(-tokens // chunk_tokens)
        length = chunks if isinstance(window, str) else np.minimum(chunks, window)
        windows = -(-chunks // length)
        # All chunks but the last of each window; the last of all is the only one that may be short.
        forward = (chunks - windows) * chunk_tokens
        total = total.plus(SweepTokens(forward=float(forward.sum()), backward=float(tokens.sum())), times)
    return total


def guess_backward_cost(model: Finch) -> float:
    """How many times as long a token may take in sweep 2 as in sweep 1, until that is measured.

    Matrix products are counted: a forward pass is 1, the gradient of what goes through is 1 and that of the trained
    weights their share. Sweep 1 leaves out the head; in sweep 2 layers may run forward once more.
    """
    products = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding."))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_head = sum(p.numel() for p in model.head.parameters())
    # A rank may hold nothing of either.
    without_head = max(0.1, 1 - of_head / max(1, products))
    forward_again = without_head if model.recomputes_layers else 0.0
    return (2 + min(1.0, trained / max(1, products)) + forward_again) / without_head
