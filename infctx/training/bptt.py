"""Backpropagation through the chunks of a document: exact inside a window, in memory of one chunk.

Two sweeps over a window of chunks. Sweep 1 runs without a graph and banks the state before every chunk. Sweep 2 goes
from the last chunk to the first, recomputes one chunk with a graph, and calls backward on one scalar:

    objective = loss sum of the chunk / weight total of the step + Σ over state tensors <d state after, state after>

`d state after` is what the chunk behind it found; the gradient of the state before becomes the next one's. Parameters
accumulate their gradients over the chunks. A window of one chunk is classical truncated backpropagation and needs no
sweep 1. State values always cross every border; gradients cross only the borders inside a window.

The same code serves `backward_through_chunks`, `chunked_step` and the training loop, on every engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from infctx.data.chunking import Chunk
from infctx.model.state import ModelState
from infctx.shapes import Scalar, Starts, Targets, Tokens, TokenWeights
from infctx.training.boundary_store import Bank, BoundaryPlan
from infctx.training.loss import weighted_loss_sum

Window = int | Literal["document"]


class ChunkObjective(nn.Module):
    """One chunk as one call, head and loss inside: the only thing an engine wraps, and the only thing anybody calls.

    The state travels as three tensors, so that nothing on the way can mistake it for activations and round it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._has_dropout = has_dropout(model)

    def forward(
        self,
        tokens: Tokens,
        targets: Targets,
        loss_weight: TokenWeights,
        starts: Starts | None,
        wkv: Tensor,
        att_shift: Tensor,
        ffn_shift: Tensor,
        *,
        with_loss: bool,
    ) -> tuple[Scalar, Tensor, Tensor, Tensor]:
        """Weighted loss sum of the chunk (0 without a loss) and the state after it."""
        state = ModelState(wkv, att_shift, ffn_shift)
        # With dropout the whole of it runs, so that a chunk draws the same random numbers in both sweeps.
        if not with_loss and not (self._has_dropout and self.model.training):
            return wkv.new_zeros(()), *self.model.advance(tokens, state, starts=starts)
        hidden, state = self.model.forward_hidden(tokens, state, starts=starts)
        if not with_loss:
            return wkv.new_zeros(()), *state
        vocab_size = self.model.config.vocab_size
        return weighted_loss_sum(hidden, self.model.head, targets, loss_weight, vocab_size=vocab_size), *state


class ChunkedResult(NamedTuple):
    """loss_sum: weighted, not divided, detached. state: after the last chunk. initial_state_gradient: of the loss
    divided by the weight total, with respect to the state before the first chunk."""

    loss_sum: Tensor
    state: ModelState
    initial_state_gradient: ModelState


def backward_through_windows(
    objective: Callable[..., tuple[Tensor, ...]],
    chunks: Sequence[Chunk],
    state: ModelState,
    *,
    window: Window,
    weight_total: float,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    keeps_random_state: bool = False,
    boundaries: BoundaryPlan = BoundaryPlan(),  # noqa: B008 (frozen)
) -> ChunkedResult:
    """Add the gradient of loss sum / weight_total to every trainable parameter's .grad.

    Args:
        objective: a ChunkObjective, wrapped by an engine or not.
        chunks: consecutive chunks of the same rows, on the device of the model.
        state: before the first chunk; values only.
        window: chunks whose borders the gradient crosses, counted from the first; "document" = all.
        weight_total: of the whole optimizer step, over all rows, groups and ranks; > 0.
        backward: called with one scalar for each chunk.
        keeps_random_state: replay the random numbers of sweep 1 in sweep 2 (needed with dropout).
        boundaries: where the states between the chunks of a window are kept.
    """
    length = len(chunks) if window == "document" else window
    replay = RandomReplay(state.wkv.device) if keeps_random_state else None
    loss_sum = state.wkv.new_zeros((), dtype=torch.float64)
    initial_gradient = None
    for first in range(0, len(chunks), length):
        part = chunks[first : first + length]
        bank = Bank(boundaries, len(part), _advance(objective, part, replay))
        bank.fill(state)
        adjoint: list[Tensor] | None = None
        for i in reversed(range(len(part))):
            leaves = [tensor.detach().requires_grad_() for tensor in bank.take(i)]
            with _replayed(replay, i):
                chunk_loss, *after = _call(objective, part[i], leaves, with_loss=part[i].has_loss)
            scalar = chunk_loss / weight_total
            if adjoint is None:
                state = ModelState(*after).detach()
                # Tied in with weight 0, so that a chunk without a loss still has a graph to go backward through.
                adjoint = [torch.zeros_like(tensor) for tensor in after]
            scalar = scalar + sum((tensor * gradient).sum() for tensor, gradient in zip(after, adjoint, strict=True))
            backward(scalar)
            adjoint = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
            loss_sum += chunk_loss.detach()
        if replay is not None:
            replay.leave_window()
        if initial_gradient is None:
            initial_gradient = ModelState(*adjoint)
    return ChunkedResult(loss_sum, state, initial_gradient)


@torch.no_grad()
def forward_through_chunks(
    objective: Callable[..., tuple[Tensor, ...]], chunks: Sequence[Chunk], state: ModelState, *, with_loss: bool = True
) -> tuple[Tensor, ModelState]:
    """The weighted loss sum (float64) and the state after the last chunk, without any gradient."""
    loss_sum = state.wkv.new_zeros((), dtype=torch.float64)
    for chunk in chunks:
        chunk_loss, *after = _call(objective, chunk, state, with_loss=with_loss and chunk.has_loss)
        loss_sum += chunk_loss
        state = ModelState(*after)
    return loss_sum, state


def _advance(
    objective: Callable[..., tuple[Tensor, ...]], chunks: Sequence[Chunk], replay: RandomReplay | None
) -> Callable[[int, ModelState], ModelState]:
    """Sweep 1 over one chunk: the state after it, without a graph and without a loss."""

    @torch.no_grad()
    def advance(index: int, state: ModelState) -> ModelState:
        if replay is not None:
            replay.enter(index)
        _, *after = _call(objective, chunks[index], state, with_loss=False)
        return ModelState(*after)

    return advance


def _call(
    objective: Callable[..., tuple[Tensor, ...]], chunk: Chunk, state: Sequence[Tensor], *, with_loss: bool
) -> tuple[Tensor, ...]:
    return objective(chunk.tokens, chunk.targets, chunk.loss_weight, chunk.starts, *state, with_loss=with_loss)


class RandomReplay:
    """Random numbers of each chunk of a window, so that dropout falls on the same places in both sweeps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: list[tuple[Tensor, Tensor | None]] = []
        self._after_window: tuple[Tensor, Tensor | None] | None = None

    def enter(self, chunk: int) -> None:
        """Put the generators where they were when this chunk of the window first ran, or remember where they are."""
        if chunk < len(self._before):
            self._write(self._before[chunk])
        else:
            self._before.append(self._read())

    def leave(self, chunk: int) -> None:
        """After the chunk's forward in sweep 2; the window's last chunk has gone furthest."""
        if chunk == len(self._before) - 1:
            self._after_window = self._read()

    def leave_window(self) -> None:
        """Continue after the window as if its chunks had run once."""
        assert self._after_window is not None
        self._write(self._after_window)
        self._before.clear()

    def _read(self) -> tuple[Tensor, Tensor | None]:
        on_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), on_device

    def _write(self, states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self._device)


@contextmanager
def _replayed(replay: RandomReplay | None, chunk: int) -> Iterator[None]:
    if replay is None:
        yield
        return
    replay.enter(chunk)
    yield
    replay.leave(chunk)


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass of the model in training draws random numbers."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
