"""GOLD: attention whose keys and values are made again from one small cache that all its layers share.

Of every token the cache holds its id and a vector of C/16 numbers, the compressed residual stream behind the recurrent
layers. From the token's embedding and that vector a key base is made (TokenCat), from it and the embedding each layer's
keys and values. Source: GoldFinch paper (arXiv 2407.12077), sections on the key cache and on GOLD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from infctx.model.cached_attention import KeyValueSource, attend
from infctx.model.config import FinchConfig
from infctx.model.layer_norm import LayerNorm
from infctx.model.linear import Linear
from infctx.model.rotary import rotate
from infctx.model.seen_tokens import SeenTokens
from infctx.model.time_parallel import TimeGroup
from infctx.model.token_shift import shift_behind, token_shift, vector_before
from infctx.shapes import Activations, LayerShift, Starts
from infctx_kernels.linear import linear

RMS_EPS = 1e-8


class TokenCat(nn.Module):
    """C channels to C/16, and, with the token's embedding beside them, back to the width of the attention."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__()
        self.compress = Linear(config.n_embd, config.cache_rank)
        self.decompress = Linear(config.n_embd + config.cache_rank, config.dim_att)


class CachedKeys:
    """The cache with a chunk's own tokens behind it, as what every GOLD layer makes its keys and values of.

    Args:
        seen: the tokens of both.
        past: the compressed vectors before the chunk; they may be on another device.
        own: of the chunk's tokens. Gradients flow into both.
        embedding: with its norm behind it, both as the model's first layer has them.
    """

    def __init__(
        self,
        seen: SeenTokens,
        past: Float[Tensor, "B P K"],
        own: Float[Tensor, "B T K"],
        *,
        embedding: nn.Embedding,
        embedding_norm: LayerNorm,
        token_cat: TokenCat,
    ) -> None:
        self.seen, self.past, self.own = seen, past, own
        self._embedding, self._embedding_norm, self._token_cat = embedding, embedding_norm, token_cat

    @property
    def norm_eps(self) -> float:
        """Of the norm behind the embedding."""
        return self._embedding_norm.eps

    def tensors(self) -> list[Tensor]:
        """What all layers make their keys and values of. Asked for in each layer: an engine may gather them there."""
        norm = self._embedding_norm
        shared = [self._embedding.weight, norm.weight, norm.bias, self._token_cat.decompress.weight]
        return [*shared, self.past, self.own]


class GoldTimeMix(nn.Module):
    """The attention half of a GOLD block: two full matrices, for queries and output."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__()
        channels, width = config.n_embd, config.dim_att
        self.n_head, self.head_size = config.n_head, config.head_size
        self.uses_rope = config.uses_rope
        self.query = Linear(channels, width)
        self.output = Linear(width, channels)
        eps = config.layer_norm_eps
        self.query_norm, self.key_norm = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.value_norm, self.output_norm = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.lerp_input = nn.Parameter(torch.empty(channels))
        self.lerp_query = nn.Parameter(torch.empty(channels))
        self.lerp_key = nn.Parameter(torch.empty(channels))
        self.lerp_value = nn.Parameter(torch.empty(channels))
        self.lerp_cache = nn.Parameter(torch.empty(channels))
        # Used as x @ P, stored [in, out]; lerp_cache_down has a group of columns for keys and one for values.
        self.lerp_query_down = nn.Parameter(torch.empty(channels, config.lerp_rank))
        self.lerp_query_up = nn.Parameter(torch.empty(config.lerp_rank, channels))
        self.lerp_cache_down = nn.Parameter(torch.empty(channels, 2 * config.lerp_rank))
        self.lerp_cache_up = nn.Parameter(torch.empty(2, config.lerp_rank, channels))
        self.key_down = nn.Parameter(torch.empty(channels, config.key_value_rank))
        self.key_up = nn.Parameter(torch.empty(config.key_value_rank, width))
        self.value_down = nn.Parameter(torch.empty(channels, config.key_value_rank))
        self.value_up = nn.Parameter(torch.empty(config.key_value_rank, width))
        # A document's first token has nothing to tune before it: its query sees one key alone.
        self.surrounding_backend: str | None = None
        self.time_group: TimeGroup | None = None

    def forward(
        self, hidden: Activations, shift: LayerShift, keys: CachedKeys, starts: Starts | None
    ) -> tuple[Activations, LayerShift]:
        """Attend to everything so far; hidden is the block's normalised input. Returns the output and the new shift."""
        before, after = vector_before(hidden, shift, self.time_group)
        query, source, tensors, _ = self.sides(hidden, before, keys, starts)
        mixed = attend(query, keys.seen.first, source, tensors)
        return self.closed(mixed), shift_behind(hidden, shift, after)

    def sides(
        self, hidden: Activations, before: LayerShift, keys: CachedKeys, starts: Starts | None
    ) -> tuple[Float[Tensor, "B T H N"], KeyValueSource, list[Tensor], list[Tensor]]:
        """The two sides of the attention: queries; the source of keys and values, and what it makes them of.

        And what the layer adds to the cache, which is nothing.
        """
        query = self.query_norm(self.query(self._query_input(hidden, before, starts)))
        query = query.unflatten(-1, (self.n_head, self.head_size))
        if self.uses_rope:
            query = rotate(query, keys.seen.offset + keys.seen.num_past)
        return query, *self.source(keys, hidden.dtype), []

    def source(self, keys: CachedKeys, dtype: torch.dtype) -> tuple[KeyValueSource, list[Tensor]]:
        """Of this layer's keys and values, and what it makes them of."""
        source = _LayerKeys(self, keys, dtype)
        return source, source.tensors

    def closed(self, mixed: Float[Tensor, "B T H N"]) -> Activations:
        """The output of what was attended to."""
        return self.output(self.output_norm(mixed.flatten(-2)))

    def _query_input(self, hidden: Tensor, before: Tensor, starts: Tensor | None) -> Tensor:
        backend, dtype = self.surrounding_backend, hidden.dtype
        (first,) = token_shift(hidden, before, self.lerp_input[None], starts=starts, backend=backend)
        low = torch.tanh(linear(first, self.lerp_query_down.t().to(dtype)))
        dynamic = linear(low, self.lerp_query_up.t().to(dtype))[None]
        (mixed,) = token_shift(hidden, before, self.lerp_query[None], dynamic=dynamic, starts=starts, backend=backend)
        return mixed


class _LayerKeys:
    """Keys and values of one layer: see `KeyValueSource`."""

    # Of the tensors: the embedding's rows and the cache are taken in parts, all others whole.
    EMBEDDING, PAST, OWN = 0, 4, 5

    def __init__(self, layer: GoldTimeMix, keys: CachedKeys, dtype: torch.dtype) -> None:
        self._seen, self._dtype, self._embedding_eps = keys.seen, dtype, keys.norm_eps
        self.num_keys, self.first_key = keys.seen.num_keys, keys.seen.first_key
        self._n_head, self._uses_rope = layer.n_head, layer.uses_rope
        self._norm_eps = layer.key_norm.eps
        own = (
            *(layer.lerp_cache, layer.lerp_cache_down, layer.lerp_cache_up, layer.lerp_key, layer.lerp_value),
            *(layer.key_down, layer.key_up, layer.value_down, layer.value_up),
            *(layer.key_norm.weight, layer.key_norm.bias, layer.value_norm.weight, layer.value_norm.bias),
        )
        self.tensors: list[Tensor] = [*keys.tensors(), *own]

    def leaves(self, begin: int, end: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        leaves = list(tensors)
        leaves[self.EMBEDDING] = F.embedding(self._ids(begin, end), tensors[self.EMBEDDING])
        past, own = self._parts(begin, end)
        leaves[self.PAST] = tensors[self.PAST][:, past].to(self._seen.device)
        leaves[self.OWN] = tensors[self.OWN][:, own]
        return leaves

    def build(self, begin: int, end: int, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # Outside autocast, which would choose other dtypes in the backward pass.
        with torch.autocast(self._seen.device.type, enabled=False):
            return self._build(begin, end, [leaf.to(self._dtype) for leaf in leaves])

    def add_(self, begin: int, end: int, gradients: Sequence[Tensor | None], totals: Sequence[Tensor | None]) -> None:
        past, own = self._parts(begin, end)
        for index, (gradient, total) in enumerate(zip(gradients, totals, strict=True)):
            if gradient is None or total is None:
                continue
            if index == self.EMBEDDING:
                total.index_add_(0, self._ids(begin, end).flatten(), gradient.flatten(0, 1))
            elif index == self.PAST:
                total[:, past] += gradient.to(total.device)
            elif index == self.OWN:
                total[:, own] += gradient
            else:
                total += gradient

    def _ids(self, begin: int, end: int) -> Tensor:
        # With the token before, for the shift.
        return self._seen.ids(max(0, begin - 1), end)

    def _parts(self, begin: int, end: int) -> tuple[slice, slice]:
        begin, border = max(0, begin - 1), self._seen.num_past
        return slice(begin, min(end, border)), slice(max(0, begin - border), max(0, end - border))

    def _build(self, begin: int, end: int, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        embedded, norm_weight, norm_bias, decompress, past, own, *of_layer = leaves
        lerp_cache, lerp_down, lerp_up, lerp_key, lerp_value, *of_layer = of_layer
        key_down, key_up, value_down, value_up, *norms = of_layer
        embedded = F.layer_norm(embedded, norm_weight.shape, norm_weight, norm_bias, self._embedding_eps)
        base = rms(F.linear(torch.cat([embedded, torch.cat([past, own], dim=1)], dim=-1), decompress))
        original = rms(embedded)
        is_start = self._seen.is_start(begin, end)[..., None]
        base, before_base = _shifted(base, is_start)
        original, before = _shifted(original, is_start)
        low = torch.tanh(torch.addcmul(original, before, lerp_cache) @ lerp_down)
        lerps = torch.matmul(low.unflatten(-1, (2, -1)).movedim(-2, 0), lerp_up[:, None])  # [2, B, n, C]
        key = base + before_base * (lerp_key + lerps[0])
        value = original + before * (lerp_value + lerps[1])
        key = key + torch.tanh(key @ key_down) @ key_up
        value = value + torch.tanh(value @ value_down) @ value_up
        key = F.layer_norm(key, norms[0].shape, norms[0], norms[1], self._norm_eps).unflatten(-1, (self._n_head, -1))
        value = F.layer_norm(value, norms[2].shape, norms[2], norms[3], self._norm_eps)
        value = value.unflatten(-1, (self._n_head, -1))
        return rotate(key, self._seen.offset + begin) if self._uses_rope else key, value


def rms(x: Tensor) -> Tensor:
    """Each vector divided by its root mean square, without a learned scale."""
    work = x if x.dtype == torch.float64 else x.float()
    return (work / (work.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + RMS_EPS)).to(x.dtype)


def _shifted(x: Tensor, is_start: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of a span, and the way from each to the one before; x has that before the span, if there is one."""
    num = is_start.shape[1]
    before = F.pad(x, (0, 0, 1, 0))[:, :num] if x.shape[1] == num else x[:, :num]
    x = x[:, -num:]
    return x, before.masked_fill(is_start, 0.0) - x
