"""What layers with attention hold beside activations: the cache and its gradient, and the busiest moment of attention.

Keys and values are there a block at a time, so that nothing of the size tokens × tokens is: what grows with the
document is the cache and its gradient alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from infctx.model import cached_attention
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.planning.activations import is_trained
from infctx.training.cache_place import NUMBER_BYTES, SUMS_AT_ONCE, cache_bytes

# Tensors of the size keys × channels, of those made at once: the graph that keys and values of a block come out of,
# where all of it is trained and where it is not, with what the block before has left; and while it is made. Counted
# with `LiveBytes` on a CPU, in float32 and bf16, to one or two of them.
_GOLD_TRAINED, _GOLD_FROZEN, _GOLD_MADE, _GPTALPHA = 25, 11, 20, 12
# Tiles of scores: with those of the tile before; and those alone.
_TILES, _TILES_LEFT = 5, 3
# Of each token in the cache, while a chunk is run: its id, and the place where its document begins.
_SEEN_BYTES = 4 + 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """What is cached in training.

    window_tokens: of each row, behind the last chunk of a window; each has a gradient. kept_tokens: in all caches of
    the row's place at once, those that wait for a later step among them. on_host: not on the device.
    """

    window_tokens: int = 0
    kept_tokens: int = 0
    on_host: bool = False

    def vectors(self, config: FinchConfig, rows: int) -> int:
        """Bytes of the cache."""
        return cache_bytes(config, rows=rows, num_tokens=self.kept_tokens)

    def gradient(self, config: FinchConfig, rows: int) -> int:
        """Bytes of its gradient, which is added up over the chunks."""
        return rows * self.window_tokens * config.cache_width * NUMBER_BYTES

    def sums(self, config: FinchConfig, rows: int, *, num_layers: int | None = None) -> int:
        """Bytes of what a chunk adds to it.

        Args:
            num_layers: of which the backward pass has come through; None = of all, with the copy that they become.
        """
        if num_layers is None:
            return SUMS_AT_ONCE * self.gradient(config, rows)
        # GOLD's layers have one cache, and add to the whole of it.
        share = 1 if config.version == "goldfinch" else config.n_attention
        return min(num_layers, share) * self.gradient(config, rows) // share


def chunk_cache_bytes(config: FinchConfig, hidden_bytes: int) -> int:
    """Of a token of the chunk: what it adds to the cache, and the gradient of that."""
    return config.cache_width * (hidden_bytes + NUMBER_BYTES)


def attention_bytes(model: Finch, cache: CachePlan, *, num_tokens: int, rows: int, hidden_bytes: int) -> int:
    """What the backward pass of one layer's attention holds beyond what was kept, but for the cache's gradient.

    Args:
        num_tokens: of all rows of the chunk.
    """
    config = model.config
    width, wide = config.dim_att, NUMBER_BYTES
    keys = max(cache.window_tokens, num_tokens // rows)
    at_once = min(cached_attention.KEYS_AT_ONCE, keys)
    tile = wide * min(cached_attention.SCORES_AT_ONCE, config.n_head * at_once * num_tokens)
    # Scaled queries and their gradient; output, query and the output's gradient once more, where they are not so wide.
    of_queries = num_tokens * width * (2 * wide + hidden_bytes + (3 * wide if hidden_bytes < wide else 0))
    block = rows * at_once * width * wide
    if config.version == "goldfinch":
        # All of it is learnt, or of the keys' way to the cache no more than the gradient that goes there.
        is_learnt = model.blocks[-1].time_mix.value_down.requires_grad or is_trained(model.embedding)
        units = _GOLD_TRAINED if is_learnt else _GOLD_FROZEN
        graph = max(_TILES * tile + units * block, _TILES_LEFT * tile + _GOLD_MADE * block)
    else:
        graph = _TILES * tile + _GPTALPHA * block
    own = num_tokens * config.cache_width * hidden_bytes // (1 if config.version == "goldfinch" else config.n_attention)
    return of_queries + graph + own + _shared_gradient_bytes(model) + rows * keys * _SEEN_BYTES


def _shared_gradient_bytes(model: Finch) -> int:
    """Sums for what all of GOLD's layers make their keys of: gradients of a layer's own are counted, as any."""
    if model.token_cat is None:
        return 0
    shared = (model.embedding.weight, model.token_cat.decompress.weight)
    # Each layer gives one for the whole; what those behind it gave waits.
    both = 2 if model.config.n_attention > 1 else 1
    return both * sum(parameter.numel() * NUMBER_BYTES for parameter in shared if parameter.requires_grad)
