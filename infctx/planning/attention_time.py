"""Arithmetic of layers with attention that grows with what is before a chunk: pairs of queries and keys, and keys.

A chunk's queries meet every key before them. GOLD's keys and values are made again for each chunk, from all that is
cached; GPTAlpha's are there.
"""

from __future__ import annotations

from dataclasses import dataclass

from infctx.model import cached_attention
from infctx.model.finch import Finch
from infctx.planning.activations import is_trained


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionFlops:
    """Floating-point operations of all layers that attend.

    pair: of a query and a key, forward; backward are 2.5 times as many, with the scores computed again. key: of the key
    and the value of one token in the cache, forward; key_gradient: of their backward pass alone. tail_tokens: of each
    chunk that sweep 1 has to take through these layers; None = all. tail_token: of one of them, but for its pairs.
    """

    pair: int = 0
    key: int = 0
    key_gradient: int = 0
    tail_tokens: int | None = None
    tail_token: int = 0

    def of_document(self, walk: Walk, *, is_recomputed: bool) -> int:
        """Of a document, both sweeps."""
        pairs, keys = walk.both_sweeps()
        forwards = 1 + is_recomputed
        # Behind them the backward pass makes the keys once more, and multiplies five times where forward are two.
        flops = pairs * (2 * forwards + 5) * self.pair // 2 + keys * ((forwards + 1) * self.key + self.key_gradient)
        pairs, keys = walk.sweep_1(self.tail_tokens)
        flops += pairs * self.pair + keys * self.key
        tail = min(self.tail_tokens or 0, walk.chunk_tokens)
        return flops + walk.num_sweep_1 * tail * self.tail_token


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """The chunks of a document.

    cached_before: tokens before it. window: chunks; None = all. sweeps: times that sweep 1 goes over a window.
    """

    document_tokens: int
    chunk_tokens: int
    cached_before: int = 0
    window: int | None = None
    sweeps: int = 1

    @property
    def _num_full(self) -> int:
        return self.document_tokens // self.chunk_tokens

    @property
    def _num_chunks(self) -> int:
        return -(-self.document_tokens // self.chunk_tokens)

    @property
    def _ends(self) -> range:
        """Full chunks at the end of a window that the document goes on behind."""
        window = self.window or self._num_chunks
        return range(window - 1, self._num_chunks - 1, window)

    @property
    def num_sweep_1(self) -> int:
        """Runs of a chunk in sweep 1: all but the last of each window."""
        return self.sweeps * (self._num_chunks - len(self._ends) - 1)

    def both_sweeps(self) -> tuple[int, int]:
        """Pairs, and keys that chunks see, of every chunk once."""
        pairs, keys = self._of(range(self._num_full), self.chunk_tokens)
        if rest := self.document_tokens % self.chunk_tokens:
            more = self._of(range(self._num_full, self._num_full + 1), rest)
            pairs, keys = pairs + more[0], keys + more[1]
        return pairs, keys

    def sweep_1(self, tail_tokens: int | None) -> tuple[int, int]:
        """The same of sweep 1, whose chunks are all full."""
        every = self._of(range(self._num_chunks - 1), self.chunk_tokens)
        ends = self._of(self._ends, self.chunk_tokens)
        pairs, keys = every[0] - ends[0], every[1] - ends[1]
        if tail_tokens is not None:
            pairs = min(tail_tokens, self.chunk_tokens) * keys
        return self.sweeps * pairs, self.sweeps * keys

    def _of(self, indices: range, num_tokens: int) -> tuple[int, int]:
        # Not one by one: there may be thousands of millions.
        numbers = len(indices) * (indices[0] + indices[-1]) // 2 if indices else 0
        before = len(indices) * self.cached_before + self.chunk_tokens * numbers
        return before * num_tokens + len(indices) * own_pairs(num_tokens), before + len(indices) * num_tokens


def own_pairs(num_tokens: int) -> int:
    """Of a chunk with its own keys: queries before a block of keys leave it out, those inside take all of it."""
    size = cached_attention.KEYS_AT_ONCE
    return sum(min(size, num_tokens - begin) * (num_tokens - begin) for begin in range(0, num_tokens, size))


def attention_flops(model: Finch, *, of_layers: int) -> AttentionFlops:
    """Count those of a model whose trained parameters are marked.

    Args:
        of_layers: for a token, forward through all layers that attend, but for pairs and keys.
    """
    config = model.config
    pair = 4 * config.dim_att * config.n_attention
    if model.token_cat is None:
        return AttentionFlops(pair=pair)
    key = gradient = 0
    # Without a gradient for the embeddings, only the keys' way to the cache has one.
    is_whole = is_trained(model.embedding) or is_trained(model.input_norm)
    for block in model.blocks[config.n_recurrent :]:
        layer = block.time_mix
        to_cache = (model.token_cat.decompress.weight, layer.key_down, layer.key_up)
        others = (layer.lerp_cache_down, layer.lerp_cache_up, layer.value_down, layer.value_up)
        key += sum(weight.numel() for weight in (*to_cache, *others))
        asked = (*to_cache, *others) if is_whole or layer.value_down.requires_grad else to_cache
        gradient += sum(weight.numel() * (1 + weight.requires_grad) for weight in asked)
    return AttentionFlops(
        pair=pair, key=2 * key, key_gradient=2 * gradient, tail_tokens=model.num_tail, tail_token=of_layers
    )
