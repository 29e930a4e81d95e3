"""The public functions over a tensor of tokens: the exact gradient of a Finch over a document of any length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from infctx.data.chunking import Chunk
from infctx.model.state import ModelState
from infctx.shapes import Scalar, Starts, Tokens, TokenWeights
from infctx.training.bptt import ChunkObjective, Window, backward_through_windows, has_dropout


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
    weights = _target_weights(tokens, loss_weight, starts)
    if weight_total is None:
        weight_total = float(weights.sum(dtype=torch.float64))
    if not weight_total > 0:
        raise ValueError(f"nothing to learn: the weights of the targets sum to {weight_total}, expected more than 0")
    chunks = _cut(tokens, weights, starts, chunk_tokens)
    initial = model.fresh_state(tokens.shape[0]) if state is None else state
    result = backward_through_windows(
        ChunkObjective(model),
        chunks,
        initial.detach(),
        window=window,
        weight_total=weight_total,
        keeps_random_state=model.training and has_dropout(model),
    )
    if state is None and initial.wkv.requires_grad:
        # The tuned initial state is a parameter, and every row began with it.
        torch.autograd.backward([initial.wkv], [result.initial_state_gradient.wkv])
    loss = (result.loss_sum / weight_total).to(initial.wkv.dtype)
    return ChunkedStep(loss, result.state, result.initial_state_gradient)


def _target_weights(tokens: Tensor, loss_weight: Tensor | None, starts: Tensor | None) -> Tensor:
    """The weight of each token's target, that is of the token after it; float, 0 for the last."""
    of_token = torch.ones(tokens.shape, device=tokens.device) if loss_weight is None else loss_weight.to(tokens.device)
    if starts is not None:
        of_token = of_token.masked_fill(starts, 0.0)
    return torch.cat([of_token[:, 1:], torch.zeros_like(of_token[:, :1])], dim=1)


def _cut(tokens: Tensor, weights: Tensor, starts: Tensor | None, chunk_tokens: int) -> list[Chunk]:
    targets = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    # One copy to the host for all chunks: asking each chunk would synchronise the device each time.
    with_loss = (weights != 0).any(0).cpu()
    with_start = None if starts is None else starts.any(0).cpu()
    chunks = []
    for index, first in enumerate(range(0, tokens.shape[1], chunk_tokens)):
        place = slice(first, first + chunk_tokens)
        chunk_starts = starts[:, place] if with_start is not None and bool(with_start[place].any()) else None
        chunks.append(
            Chunk(
                tokens=tokens[:, place],
                targets=targets[:, place],
                loss_weight=weights[:, place],
                starts=chunk_starts,
                index=index,
                has_loss=bool(with_loss[place].any()),
            )
        )
    return chunks


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
