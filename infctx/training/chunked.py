"""The public functions over a tensor of tokens: the exact gradient of a Finch over a document of any length."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infctx.data.chunking import Chunk, CutWhenAsked
from infctx.model.state import ModelState
from infctx.shapes import Scalar, Starts, Tokens, TokenWeights
from infctx.training.bptt import ChunkObjective, Window, backward_through_windows, draws_random_numbers


class ChunkedStep(NamedTuple):
    """loss: weighted loss sum / weight total, 0-d, detached. state: after the last token, detached.
    initial_state_gradient: of the loss with respect to the state before the first token."""

    loss: Scalar
    state: ModelState
    initial_state_gradient: ModelState


def backward_through_chunks(
    model: nn.Module,
    tokens: Tokens,
    *,
    loss_weight: TokenWeights | None = None,
    starts: Starts | None = None,
    chunk_tokens: int = 1024,
    window: Window = "document",
) -> Scalar:
    """Add the gradient of the next-token loss to .grad of every trainable parameter, one chunk at a time.

    Args:
        model: what `load_model` returned, with or without adapters.
        tokens: int64 ids; tokens[:, 0] starts a document.
        loss_weight: weight of each token as a target; None = 1. A document's first token is nobody's target.
        starts: True at a document's first token.
        chunk_tokens: tokens in a chunk; need not divide T.
        window: "document" = exact, or the number of chunks whose borders the gradient crosses.
    Returns:
        Sum of weighted losses / sum of weights, 0-d, detached. Memory does not depend on T, boundary states aside.
    Raises:
        ValueError: nothing to learn (the weights sum to 0), or a shape or argument is wrong.
    """
    return chunked_step(
        model, tokens, loss_weight=loss_weight, starts=starts, chunk_tokens=chunk_tokens, window=window
    ).loss


def chunked_step(
    model: nn.Module,
    tokens: Tokens,
    *,
    state: ModelState | None = None,
    weight_total: float | None = None,
    loss_weight: TokenWeights | None = None,
    starts: Starts | None = None,
    chunk_tokens: int = 1024,
    window: Window = "document",
) -> ChunkedStep:
    """`backward_through_chunks` from a carried state, with the normaliser given from outside.

    Args:
        state: what an earlier step returned; None = fresh documents (the tuned initial state where there is one).
        weight_total: what the loss sum is divided by; None = the weights of this call. Give the sum over all calls
            of an optimizer step.
    Everything else is as in `backward_through_chunks`. tokens[:, 0] is nobody's target here either, also where it goes
    on from a carried state: what an earlier call ended with is not at hand to predict it.
    Raises:
        ValueError: weight_total is 0 or negative, or a shape or argument is wrong.
    """
    _check(tokens, loss_weight, starts, chunk_tokens, window)
    chunks = _TensorChunks(tokens, loss_weight, starts, chunk_tokens)
    if weight_total is None:
        weight_total = chunks.weight_total
    if not weight_total > 0:
        raise ValueError(f"nothing to learn: the weights of the targets sum to {weight_total}, expected more than 0")
    initial = model.fresh_state(tokens.shape[0]) if state is None else state
    result = backward_through_windows(
        ChunkObjective(model),
        chunks,
        initial.detach(),
        window=window,
        weight_total=weight_total,
        keeps_random_state=model.training and draws_random_numbers(model),
    )
    if state is None:
        # What is tuned of the initial state is a parameter, and every row began with it.
        pairs = zip(initial, result.initial_state_gradient, strict=True)
        tuned = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
        if tuned:
            torch.autograd.backward(*zip(*tuned, strict=True))
    loss = (result.loss_sum / weight_total).to(initial.wkv.dtype)
    return ChunkedStep(loss, result.state, result.initial_state_gradient)


class _TensorChunks(CutWhenAsked):
    """The chunks of whole tensors, each cut when it is asked for: copies would cost more than the tokens themselves."""

    def __init__(self, tokens: Tensor, loss_weight: Tensor | None, starts: Tensor | None, chunk_tokens: int) -> None:
        self._tokens, self._loss_weight, self._starts = tokens, loss_weight, starts
        self._chunk_tokens = chunk_tokens
        places = [self._place(i) for i in range(len(self))]
        # One copy to the host for all chunks: asking each chunk would synchronise the device each time.
        sums = torch.stack([_sum_and_any(self._weights(place)) for place in places]).cpu()
        self.weight_total = float(sums[:, 0].sum())
        self._has_loss = (sums[:, 1] > 0).tolist()
        self._has_start = [False] * len(self)
        if starts is not None:
            self._has_start = torch.stack([starts[:, place].any() for place in places]).tolist()

    def __len__(self) -> int:
        return -(-self._tokens.shape[1] // self._chunk_tokens)

    def cut(self, index: int) -> Chunk:
        """The chunk of this number."""
        place = self._place(index)
        ahead = self._tokens[:, place.start + 1 : place.stop + 1]
        return Chunk(
            tokens=self._tokens[:, place],
            targets=_padded(ahead, place),
            loss_weight=self._weights(place),
            starts=self._starts[:, place] if self._starts is not None and self._has_start[index] else None,
            index=index,
            has_loss=self._has_loss[index],
        )

    def _place(self, index: int) -> slice:
        begin = index * self._chunk_tokens
        return slice(begin, min(begin + self._chunk_tokens, self._tokens.shape[1]))

    def _weights(self, place: slice) -> Tensor:
        """The weight of each token's target, that is of the token after it; 0 behind the last."""
        ahead = slice(place.start + 1, place.stop + 1)
        if self._loss_weight is None:
            of_target = torch.ones(self._tokens[:, ahead].shape, device=self._tokens.device)
        else:
            of_target = self._loss_weight[:, ahead].to(self._tokens.device)
        if self._starts is not None:
            of_target = of_target.masked_fill(self._starts[:, ahead], 0.0)
        return _padded(of_target, place)


def _sum_and_any(weights: Tensor) -> Tensor:
    """The sum, and whether any is not 0, float64 [2]."""
    return torch.stack([weights.sum(dtype=torch.float64), (weights != 0).any().double()])


def _padded(ahead: Tensor, place: slice) -> Tensor:
    """With a 0 where the last token has nothing ahead of it."""
    return F.pad(ahead, (0, place.stop - place.start - ahead.shape[1]))


def _check(
    tokens: Tensor, loss_weight: Tensor | None, starts: Tensor | None, chunk_tokens: int, window: Window
) -> None:
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected int64 [B, T] with T >= 1, got {tokens.dtype} {list(tokens.shape)}")
    for name, tensor in (("loss_weight", loss_weight), ("starts", starts)):
        if tensor is not None and tensor.shape != tokens.shape:
            raise ValueError(f"{name}: expected shape {list(tokens.shape)} as tokens, got {list(tensor.shape)}")
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"starts: expected bool, got {starts.dtype}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    is_count = isinstance(window, int) and not isinstance(window, bool)
    if window != "document" and (not is_count or window < 1):
        raise ValueError(f'window: expected "document" or a number of chunks >= 1, got {window!r}')
