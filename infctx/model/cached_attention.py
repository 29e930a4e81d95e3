"""Softmax attention of a chunk over everything before it, a block of keys at a time: no matrix of T × T, no keys kept.

Keys and values are asked for block by block, in the forward pass and again in the backward pass, so that they are never
in memory together. What is kept for the backward pass is the queries, the output and one number for each of them.
Source: the online softmax of FlashAttention (arXiv 2205.14135), over keys that are computed instead of read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of the keys that are there at once.
KEYS_AT_ONCE = 512
# Of the scores of a tile, in float32 or float64.
SCORES_AT_ONCE = 2**22


@runtime_checkable
class KeyValueSource(Protocol):
    """Where keys and values come from. Differentiable tensors go in and out as lists of one order, `tensors`."""

    num_keys: int
    # Keys before it are seen by no query.
    first_key: int

    def leaves(self, begin: int, end: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the keys from `begin` to `end` are made of: one tensor for each of `tensors`, all of it or a part."""

    def build(self, begin: int, end: int, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, n, H, N]."""

    def add_(self, begin: int, end: int, gradients: Sequence[Tensor | None], totals: Sequence[Tensor | None]) -> None:
        """Add the gradients of `leaves` to those of `tensors`; None where nobody asks."""


def attend(
    query: Float[Tensor, "B T H N"], first: Int[Tensor, "B T"], source: KeyValueSource, tensors: Sequence[Tensor]
) -> Float[Tensor, "B T H N"]:
    """Causal attention; the last query's own place is that of the last key.

    Args:
        query: in any float dtype; its softmax is in float32, or float64 where it is.
        first: the place of the first key that each query sees, at most its own; keys behind its own it never sees.
        source: of keys and values, in the query's dtype.
        tensors: what the source makes them of; gradients flow into the query and into these.
    Returns:
        In the query's dtype.
    """
    return _Attention.apply(source, query, first, *tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: KeyValueSource, query: Tensor, first: Tensor, *tensors: Tensor) -> Tensor:
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        rows, num_queries, heads, size = query.shape
        output = query.new_zeros(rows, heads, num_queries, size, dtype=work)
        largest = query.new_full((rows, heads, num_queries, 1), -torch.inf, dtype=work)
        total = torch.zeros_like(largest)
        scaled = (query.to(work) * size**-0.5).transpose(1, 2)  # [B, H, T, N]
        for begin, end in _spans(source):
            key, value = source.build(begin, end, source.leaves(begin, end, tensors))
            key, value = (tensor.to(work).transpose(1, 2) for tensor in (key, value))
            for tile in _tiles(rows * heads, num_queries, source.num_keys, begin, end):
                scores = _scores(scaled[:, :, tile], key, first, tile, source.num_keys - num_queries, begin)
                seen = torch.maximum(largest[:, :, tile], scores.amax(-1, keepdim=True))
                # A query that has seen nothing yet: exp(-inf - -inf) would be no number.
                base = seen.masked_fill(seen == -torch.inf, 0.0)
                weights = torch.exp(scores - base)
                before = torch.exp(largest[:, :, tile] - base)
                total[:, :, tile] = total[:, :, tile] * before + weights.sum(-1, keepdim=True)
                output[:, :, tile] = output[:, :, tile] * before + weights @ value
                largest[:, :, tile] = seen
        output /= total
        ctx.source = source
        result = output.transpose(1, 2).to(query.dtype).contiguous()
        ctx.save_for_backward(query, first, result, largest + total.log(), *tensors)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, first, output, log_sum, *tensors = ctx.saved_tensors
        source, needed = ctx.source, ctx.needs_input_grad[3:]
        work, scale = log_sum.dtype, query.shape[-1] ** -0.5
        rows, num_queries, heads, _ = query.shape
        gradient, query_by_head, output = (
            tensor.to(work).transpose(1, 2) for tensor in (gradient, query, output)
        )  # [B, H, T, N]
        shared = (gradient * output).sum(-1, keepdim=True)
        scaled = query_by_head * scale
        d_query = torch.zeros_like(scaled)
        totals = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)]
        for begin, end in _spans(source):
            with torch.enable_grad():
                leaves = [
                    leaf.detach().requires_grad_(need)
                    for leaf, need in zip(source.leaves(begin, end, tensors), needed, strict=True)
                ]
                made = source.build(begin, end, leaves)
            key, value = (tensor.detach().to(work).transpose(1, 2) for tensor in made)
            d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
            for tile in _tiles(rows * heads, num_queries, source.num_keys, begin, end):
                scores = _scores(scaled[:, :, tile], key, first, tile, source.num_keys - num_queries, begin)
                weights = torch.exp(scores - log_sum[:, :, tile])
                d_value += weights.mT @ gradient[:, :, tile]
                d_scores = weights * (gradient[:, :, tile] @ value.mT - shared[:, :, tile])
                d_query[:, :, tile] += d_scores @ key * scale
                d_key += d_scores.mT @ scaled[:, :, tile]
            asked = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            if asked:
                # Where only the cache is asked for, GOLD's values, made of the embeddings alone, have no graph.
                pairs = [(tensor, d) for tensor, d in zip(made, (d_key, d_value), strict=True) if tensor.requires_grad]
                of_made = [d.transpose(1, 2).to(tensor.dtype) for tensor, d in pairs]
                found = iter(torch.autograd.grad([t for t, _ in pairs], asked, of_made, allow_unused=True))
                source.add_(begin, end, [next(found) if need else None for need in needed], totals)
        return None, d_query.transpose(1, 2).to(query.dtype), None, *totals


def _spans(source: KeyValueSource) -> list[tuple[int, int]]:
    begins = range(source.first_key, source.num_keys, KEYS_AT_ONCE)
    return [(begin, min(begin + KEYS_AT_ONCE, source.num_keys)) for begin in begins]


def _tiles(rows_and_heads: int, num_queries: int, num_keys: int, begin: int, end: int) -> list[slice]:
    """The queries that may see keys of this span, some at a time."""
    earliest = max(0, begin - (num_keys - num_queries))
    size = max(1, SCORES_AT_ONCE // (rows_and_heads * (end - begin)))
    return [slice(at, min(at + size, num_queries)) for at in range(earliest, num_queries, size)]


def _scores(scaled: Tensor, key: Tensor, first: Tensor, tile: slice, offset: int, begin: int) -> Tensor:
    """[B, H, queries, keys], -inf where a query does not see a key."""
    keys = torch.arange(begin, begin + key.shape[2], device=key.device)
    own = torch.arange(tile.start, tile.stop, device=key.device) + offset
    is_seen = (keys <= own[:, None]) & (keys >= first[:, tile, None])  # [B, queries, keys]
    return (scaled @ key.mT).masked_fill(~is_seen[:, None], -torch.inf)
