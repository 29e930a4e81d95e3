"""Backpropagation through the chunks of a document: exact inside a window, in memory of one chunk.

Two sweeps over a window of chunks. Sweep 1 runs without a graph and banks the state before every chunk. Sweep 2 goes
from the last chunk to the first, recomputes one chunk with a graph, and calls backward on one scalar:

    objective = loss sum of the chunk / weight total of the step + Σ over state tensors <d state after, state after>

`d state after` is what the chunk behind it found; the gradient of the state before becomes the next one's. Parameters
accumulate their gradients over the chunks. Of what layers with attention have cached of a chunk, the gradient is added
up over all chunks behind it, before its own turn comes: see `window_cache`. A window of one chunk is classical
truncated backpropagation and needs no sweep 1. State values always cross every border; gradients cross only the borders
inside a window.

The same code serves `backward_through_chunks`, `chunked_step` and the training loop, on every engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from infctx.data.chunking import Chunk
from infctx.model.state import ModelState
from infctx.shapes import Scalar, Starts, Targets, Tokens, TokenWeights
from infctx.training.boundary_store import Bank, BoundaryPlan
from infctx.training.loss import CROSS_ENTROPY, LossTerms, weighted_loss_sum
from infctx.training.random_replay import RandomReplay, replayed
from infctx.training.set_losses import add_set_losses, sum_by_set
from infctx.training.step_place import WalkPlace, WindowsPlace
from infctx.training.window_cache import WindowCache

Window = int | Literal["document"]


class ChunkObjective(nn.Module):
    """One chunk as one call, head and loss inside: the only thing an engine wraps, and the only thing anybody calls.

    The state travels as its tensors, so that nothing on the way can mistake it for activations and round it.
    """

    def __init__(self, model: nn.Module, *, terms: LossTerms = CROSS_ENTROPY) -> None:
        super().__init__()
        self.model = model
        self._has_dropout = has_dropout(model)
        self._terms = terms

    def forward(
        self,
        tokens: Tokens,
        targets: Targets,
        loss_weight: TokenWeights,
        starts: Starts | None,
        *state: Tensor,
        with_loss: bool,
        sets: UInt8[Tensor, "B T"] | None = None,
        num_sets: int = 1,
        most_tokens: int = 0,
    ) -> tuple[Scalar, *tuple[Tensor, ...]]:
        """Weighted loss sum of the chunk (0 without a loss) and the tensors of the state after it.

        Of a state with a cache, that after it has the cache of the chunk alone: see `ModelState.followed_by`.

        With `sets`, the set of each target, one more follows: the part of each set in the sum, float64 [num_sets],
        through which no gradient flows. most_tokens: see `weighted_loss_sum`.
        """
        before = ModelState(*state)
        with in_compute_dtype(self.model, before.wkv.device):
            return self._forward(tokens, targets, loss_weight, starts, before, with_loss, sets, num_sets, most_tokens)

    def _forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        loss_weight: Tensor,
        starts: Tensor | None,
        state: ModelState,
        with_loss: bool,
        sets: Tensor | None,
        num_sets: int,
        most_tokens: int,
    ) -> tuple[Tensor, ...]:
        wkv = state.wkv
        of_sets = [] if sets is None else [wkv.new_zeros(num_sets, dtype=torch.float64)]
        # With dropout the whole of it runs, so that a chunk draws the same random numbers in both sweeps. Noise on the
        # embeddings is drawn first, and the same either way.
        if not with_loss and not (self._has_dropout and self.model.training):
            return wkv.new_zeros(()), *self.model.advance_chunk(tokens, state, starts=starts), *of_sets
        hidden, state = self.model.forward_chunk(tokens, state, starts=starts)
        if not with_loss:
            return wkv.new_zeros(()), *state, *of_sets
        loss = weighted_loss_sum(
            hidden,
            self.model.head,
            targets,
            loss_weight,
            vocab_size=self.model.config.vocab_size,
            # They shape the training, and are no part of what a validation measures.
            terms=self._terms if self.model.training else CROSS_ENTROPY,
            backend=self.model.surrounding_backend,
            with_token_losses=sets is not None,
            most_tokens=most_tokens,
        )
        if sets is None:
            return loss, *state
        loss, token_losses = loss
        return loss, *state, sum_by_set(token_losses, sets.flatten(), num_sets)


def in_compute_dtype(model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bf16 where the model computes so, whatever its weights are stored in.

    Entered inside of what an engine wraps: DeepSpeed switches off what is entered outside.
    """
    if model.compute_dtype != torch.bfloat16:
        return nullcontext()
    # Its cache would keep a copy in bf16 of every trained matrix, though each is used once.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


class ChunkedResult(NamedTuple):
    """loss_sum: weighted, not divided, detached. state: after the last chunk. initial_state_gradient: of the loss
    divided by the weight total, with respect to the state before the first chunk. largest_difference: 0-d, between the
    states that sweep 1 banked and those that sweep 2 computed again, beside the largest of each; 0 on a CPU.
    set_losses: the part of each set in loss_sum, float64 [sets]; None where the chunks tell no sets."""

    loss_sum: Tensor
    state: ModelState
    initial_state_gradient: ModelState
    largest_difference: Tensor
    set_losses: Tensor | None


def backward_through_windows(
    objective: Callable[..., tuple[Tensor, ...]],
    chunks: Sequence[Chunk],
    start: ModelState | WindowsPlace,
    *,
    window: Window,
    weight_total: float,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    keeps_random_state: bool = False,
    boundaries: BoundaryPlan = BoundaryPlan(),  # noqa: B008 (frozen)
    before_chunk: Callable[[Callable[[], WindowsPlace], WalkPlace], None] | None = None,
    expect: Callable[[bool], bool] | None = None,
) -> ChunkedResult:
    """Add the gradient of loss sum / weight_total to every trainable parameter's .grad.

    Args:
        objective: a ChunkObjective, wrapped by an engine or not.
        chunks: consecutive chunks of the same rows.
        start: the state before the first chunk (values only), on the device of the model; or a place that an earlier
            call was left at, with .grad as it was there.
        window: chunks whose borders the gradient crosses, counted from the first; "document" = all.
        weight_total: of the whole optimizer step, over all rows, groups and ranks; > 0.
        backward: called with one scalar for each chunk.
        keeps_random_state: replay the random numbers of sweep 1 in sweep 2 (needed where `draws_random_numbers`).
        boundaries: where the states between the chunks of a window are kept.
        before_chunk: called before every chunk of either sweep with a function that tells the place, to go on from it,
            and where that is, for people; may raise.
        expect: of an engine: called before the forward pass of every chunk in sweep 2, with whether that
            is the last; answers whether its backward pass has to reach every trained parameter, with a gradient of 0 if
            need be. What an engine's pass misses, it may silently leave out, or take from the step before.
    """
    length = len(chunks) if window == "document" else min(window, len(chunks))
    walk = _Walk(
        objective, chunks, length, weight_total, backward, keeps_random_state, boundaries, before_chunk, expect
    )
    return walk.run(start)


class _Walk:
    """Both sweeps through every window, as an object so that it can tell where it is."""

    def __init__(
        self,
        objective: Callable[..., tuple[Tensor, ...]],
        chunks: Sequence[Chunk],
        length: int,
        weight_total: float,
        backward: Callable[[Tensor], None],
        keeps_random_state: bool,
        plan: BoundaryPlan,
        before_chunk: Callable[[Callable[[], WindowsPlace], WalkPlace], None] | None,
        expect: Callable[[bool], bool] | None,
    ) -> None:
        self._objective, self._chunks, self._length = objective, chunks, length
        self._weight_total, self._backward, self._plan = weight_total, backward, plan
        self._keeps_random_state = keeps_random_state
        self._before_chunk, self._expect = before_chunk, expect

    def run(self, start: ModelState | WindowsPlace) -> ChunkedResult:
        if isinstance(start, ModelState):
            self._begin(start)
        else:
            self._go_on_from(start)
        while True:
            if not self._in_sweep_2:
                self._sweep_1()
            self._sweep_2()
            assert self._state_after is not None
            assert self._adjoint is not None
            state_after = self._whole(self._num_chunks, self._state_after)
            if self._initial_gradient is None:
                before = () if self._cache is None else self._cache.gradient_before()
                self._initial_gradient = ModelState(*self._adjoint, *before)
            if self._first + self._length >= len(self._chunks):
                break
            self._enter_window(self._first + self._length)
            state_after = state_after.trimmed()
            self._begin_window(state_after)
            # The cache of the window before would stay with it.
            del state_after
        return ChunkedResult(
            self._loss_sum, state_after, self._initial_gradient, self._largest_difference, self._set_losses
        )

    def place(self) -> WindowsPlace:
        """Where it is; called between two chunks."""
        boundaries = list(self._bank.held())
        if not self._in_sweep_2 and (not boundaries or boundaries[-1][0] != self._next):
            # A thinned bank did not want it, but sweep 1 goes on from it.
            boundaries.append((self._next, self._state))
        return WindowsPlace(
            first=self._first,
            next=self._next,
            in_sweep_2=self._in_sweep_2,
            boundaries=boundaries,
            adjoint=self._adjoint,
            state_after=self._state_after if self._adjoint is not None else None,
            cache=self._cache.to_tensors() if self._cache is not None else {},
            loss_sum=self._loss_sum,
            initial_gradient=self._initial_gradient,
            largest_difference=self._largest_difference,
            random=self._replay.to_list() if self._replay is not None else [],
            set_losses=self._set_losses,
        )

    def _begin(self, state: ModelState) -> None:
        self._loss_sum = state.wkv.new_zeros((), dtype=torch.float64)
        self._set_losses: Tensor | None = None
        self._largest_difference = state.wkv.new_zeros(())
        self._initial_gradient: ModelState | None = None
        self._state_after: ModelState | None = None
        self._replay = RandomReplay(state.wkv.device) if self._keeps_random_state else None
        self._cache: WindowCache | None = None
        self._enter_window(0)
        self._begin_window(state)

    def _begin_window(self, state: ModelState) -> None:
        if state.has_cache:
            # None of its chunks is longer than the first.
            num_tokens = self._num_chunks * self._chunks[self._first].tokens.shape[1]
            self._cache = WindowCache(state, on_host=self._plan.cache_on_host, num_tokens=num_tokens)
        self._keep_boundary(0, state.recurrent)

    def _go_on_from(self, place: WindowsPlace) -> None:
        recurrent = place.boundaries[-1][1]
        self._begin(recurrent)
        if place.cache:
            self._cache = WindowCache.from_tensors(place.cache, recurrent, on_host=self._plan.cache_on_host)
        self._loss_sum += place.loss_sum
        self._set_losses = place.set_losses
        self._largest_difference = place.largest_difference
        self._initial_gradient = place.initial_gradient
        self._enter_window(place.first)
        if self._replay is not None:
            # The last chunk has run in sweep 2, and gone furthest, where there is an adjoint.
            self._replay.from_list(place.random, has_left_window=place.adjoint is not None)
        self._in_sweep_2, self._next = place.in_sweep_2, place.next
        self._adjoint, self._state_after = place.adjoint, place.state_after
        if place.in_sweep_2:
            self._bank.put_back(place.boundaries)
        else:
            self._bank.put_back(place.boundaries[:-1])
            self._keep_boundary(*place.boundaries[-1])

    def _enter_window(self, first: int) -> None:
        self._first, self._next, self._in_sweep_2 = first, 0, False
        self._num_chunks = min(self._length, len(self._chunks) - first)
        self._bank = Bank(self._plan, self._num_chunks)
        self._adjoint: ModelState | None = None
        self._banked_after: ModelState | None = None

    def _keep_boundary(self, index: int, state: ModelState) -> None:
        self._next, self._state = index, state
        self._bank.put(index, state)

    def _whole(self, index: int, recurrent: ModelState) -> ModelState:
        """The state before a chunk of the window, with what is cached there."""
        return recurrent if self._cache is None else self._cache.before(index, recurrent)

    def _sweep_1(self) -> None:
        """From the front, without a graph. The last chunk is not run: sweep 2 begins with it."""
        while self._next < self._num_chunks - 1:
            self._keep_boundary(self._next + 1, self._advance(self._next, self._state))
        self._in_sweep_2 = True
        # The bank holds it, or it has had its use.
        del self._state

    def _sweep_2(self) -> None:
        """From the back, each chunk again with a graph, and backward through it."""
        while self._next >= 0:
            # First, so that a walk which is left at every pause still gets on.
            self._bank.have_at_hand(self._next, self._advance)
            self._pause()
            before = self._bank.take(self._next, self._advance)
            leaves = self._whole(self._next, before).leaves()
            is_last = self._next == 0 and self._first + self._length >= len(self._chunks)
            reaches_all = self._expect is not None and self._expect(is_last)
            with replayed(self._replay, self._next):
                chunk = self._chunks[self._first + self._next]
                chunk_loss, after, set_losses = run_chunk(self._objective, chunk, leaves, reaches_all=reaches_all)
            self._compare(after.recurrent)
            scalar = chunk_loss / self._weight_total
            if self._adjoint is None:
                self._state_after = after.recurrent.detach()
                # Tied in with weight 0, so that a chunk without a loss still has a graph to go backward through.
                self._adjoint = ModelState(*(torch.zeros_like(tensor) for tensor in after.recurrent))
            products = list(zip(after.recurrent, self._adjoint, strict=True))
            if self._cache is not None:
                products.append((after.cached, self._cache.gradient_of(self._next, after)))
            self._backward(scalar + sum((tensor * gradient).sum() for tensor, gradient in products))
            if self._cache is not None:
                # Not before, while the graph holds parts of it.
                self._cache.put(self._next, after)
                self._cache.add_gradient(self._next, leaves.cached.grad)
            self._adjoint = ModelState(
                *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves.recurrent)
            ).detach()
            self._loss_sum += chunk_loss.detach()
            self._set_losses = add_set_losses(self._set_losses, set_losses)
            self._banked_after = before
            self._next -= 1
            # They would stay until the next chunk has run, with the cache's gradient.
            del leaves, after, products
        if self._replay is not None:
            self._replay.leave_window()

    @torch.no_grad()
    def _compare(self, after: Sequence[Tensor]) -> None:
        """How far the state is from the one that sweep 1 found here, without asking the device for the answer."""
        if self._banked_after is not None:
            for found, banked in zip(after, self._banked_after, strict=True):
                if not banked.numel():  # no layer with a recurrence
                    continue
                smallest = torch.finfo(banked.dtype).tiny
                difference = (found - banked).abs().amax() / banked.abs().amax().clamp(min=smallest)
                self._largest_difference = torch.maximum(self._largest_difference, difference)

    @torch.no_grad()
    def _advance(self, index: int, state: ModelState) -> ModelState:
        """One chunk without a graph and without a loss: the state after it."""
        self._pause()
        if self._replay is not None:
            self._replay.enter(index)
        chunk, before = self._chunks[self._first + index], self._whole(index, state)
        after = run_chunk(self._objective, chunk, before, with_loss=False).state
        if self._cache is not None:
            self._cache.put(index, after)
        return after.recurrent

    def _pause(self) -> None:
        if self._before_chunk is not None:
            here = WalkPlace(self._first, self._first + self._next, self._in_sweep_2)
            self._before_chunk(self.place, here)


@torch.no_grad()
def forward_through_chunks(
    objective: Callable[..., tuple[Tensor, ...]], chunks: Sequence[Chunk], state: ModelState, *, with_loss: bool = True
) -> tuple[Tensor, ModelState]:
    """The weighted loss sum (float64) and the state after the last chunk, without any gradient."""
    loss_sum = state.wkv.new_zeros((), dtype=torch.float64)
    for chunk in chunks:
        chunk_loss, after, _ = run_chunk(objective, chunk, state, with_loss=with_loss)
        state = state.followed_by(after)
        loss_sum += chunk_loss
    return loss_sum, state


class ChunkOutputs(NamedTuple):
    """What a ChunkObjective gave for a chunk. state: its cache is that of the chunk alone. set_losses: None without
    sets, and where no loss was asked for."""

    loss: Tensor
    state: ModelState
    set_losses: Tensor | None


def run_chunk(
    objective: Callable[..., tuple[Tensor, ...]],
    chunk: Chunk,
    state: Sequence[Tensor],
    *,
    with_loss: bool = True,
    reaches_all: bool = False,
) -> ChunkOutputs:
    """Call the objective with a chunk, on the device of the state.

    Args:
        reaches_all: leave nothing out, also where all of it is 0: the head, and the initial state of documents.
    """
    chunk = chunk.to(state[0].device)
    starts = chunk.starts
    if reaches_all and starts is None:
        starts = torch.zeros_like(chunk.tokens, dtype=torch.bool)
    inputs = (chunk.tokens, chunk.targets, chunk.loss_weight, starts, *state)
    tells_sets = with_loss and chunk.sets is not None
    with_loss = with_loss and (chunk.has_loss or reaches_all)
    if not tells_sets:
        loss, *after = objective(*inputs, with_loss=with_loss, most_tokens=chunk.most_tokens)
        return ChunkOutputs(loss, ModelState(*after), None)
    loss, *after, set_losses = objective(
        *inputs, with_loss=with_loss, sets=chunk.sets, num_sets=chunk.num_sets, most_tokens=chunk.most_tokens
    )
    return ChunkOutputs(loss, ModelState(*after), set_losses)


def has_dropout(model: nn.Module) -> bool:
    """Whether dropout is anywhere in the model."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a forward pass of the model in training does: for dropout, or for noise on the embeddings."""
    return model.embedding_noise > 0 or has_dropout(model)
