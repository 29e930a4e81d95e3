"""The state: everything a chunk needs to know of the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infctx.model.config import FinchConfig

RECURRENT_FIELDS = ("wkv", "att_shift", "ffn_shift")
CACHE_FIELDS = ("cached_tokens", "cached")


class ModelState(tuple[Tensor, ...]):
    """Three tensors for all layers, so that one copy moves a boundary; two more in a model with attention.

    Rows are on the second axis of each. The three are float32 (float64 in a float64 model):

    wkv: what the recurrence holds, key axis before value axis, [layers with a recurrence, B, H, N, N].
    att_shift, ffn_shift: the normalised input of time mix and channel mix at the last token, [L, B, C].

    And of every token so far, where layers attend:

    cached_tokens: int32 [1, B, P]; the id, or ~id (negative) of a document's first token.
    cached: [1, B, P, K], what keys and values are made of; see `FinchConfig.cache_width`.
    """

    __slots__ = ()

    def __new__(cls, wkv: Tensor, att_shift: Tensor, ffn_shift: Tensor, *cache: Tensor) -> ModelState:
        """Make one of three tensors, or of five."""
        assert len(cache) in (0, len(CACHE_FIELDS)), "a cache has tokens and vectors"
        return super().__new__(cls, (wkv, att_shift, ffn_shift, *cache))

    def __getnewargs__(self) -> tuple[Tensor, ...]:  # type: ignore[override]  # of a tuple: what copies are made with
        return tuple(self)

    @classmethod
    def zeros(cls, config: FinchConfig, rows: int, *, dtype: torch.dtype, device: torch.device | str) -> ModelState:
        """The state of `rows` fresh documents of a model without a tuned initial state."""
        heads, size = config.n_head, config.head_size
        recurrent = (
            torch.zeros(config.n_recurrent, rows, heads, size, size, dtype=dtype, device=device),
            torch.zeros(config.n_layer, rows, config.n_embd, dtype=dtype, device=device),
            torch.zeros(config.n_layer, rows, config.n_embd, dtype=dtype, device=device),
        )
        if not config.n_attention:
            return cls(*recurrent)
        return cls(
            *recurrent,
            torch.zeros(1, rows, 0, dtype=torch.int32, device=device),
            torch.zeros(1, rows, 0, config.cache_width, dtype=dtype, device=device),
        )

    @property
    def wkv(self) -> Tensor:
        """What the recurrence holds."""
        return self[0]

    @property
    def att_shift(self) -> Tensor:
        """The input of the time mix at the last token."""
        return self[1]

    @property
    def ffn_shift(self) -> Tensor:
        """The input of the channel mix at the last token."""
        return self[2]

    @property
    def has_cache(self) -> bool:
        """Whether it is of a model with attention."""
        return len(self) > len(RECURRENT_FIELDS)

    @property
    def cached_tokens(self) -> Tensor:
        """The tokens so far, in a model with attention."""
        return self[3]

    @property
    def cached(self) -> Tensor:
        """What keys and values are made of, in a model with attention."""
        return self[4]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return (*RECURRENT_FIELDS, *CACHE_FIELDS)[: len(self)]

    @property
    def recurrent(self) -> ModelState:
        """The part that does not grow."""
        return ModelState(*self[: len(RECURRENT_FIELDS)])

    @property
    def cache(self) -> tuple[Tensor, ...]:
        """The part that grows: two tensors, or none."""
        return self[len(RECURRENT_FIELDS) :]

    @property
    def num_cached(self) -> int:
        """Tokens in the cache."""
        return self.cached_tokens.shape[2] if self.has_cache else 0

    def detach(self) -> ModelState:
        """The same values outside any graph."""
        return ModelState(*(tensor.detach() for tensor in self))

    def leaves(self) -> ModelState:
        """The same values, whose gradients are asked for; ids have none."""
        return ModelState(*(t.detach().requires_grad_(t.is_floating_point()) for t in self))

    def to(self, device: torch.device | str) -> ModelState:
        """The same values on another device."""
        return ModelState(*(tensor.to(device) for tensor in self))

    def followed_by(self, chunk: ModelState) -> ModelState:
        """The state after a chunk, from one whose cache is of the chunk alone; gradients flow into both caches."""
        if not self.has_cache:
            return chunk
        pairs = zip(self.cache, chunk.cache, strict=True)
        return ModelState(*chunk.recurrent, *(torch.cat([old, new.to(old)], dim=2) for old, new in pairs))

    def without_cache(self) -> ModelState:
        """With a cache of no tokens, in a model with attention: for documents that have ended."""
        # Of a slice the whole would stay in memory.
        return ModelState(*self.recurrent, *(part[:, :, :0].clone() for part in self.cache))

    def trimmed(self) -> ModelState:
        """Without what only documents that have ended in every row needed; asks the device for a number."""
        if not self.num_cached:
            return self
        places = torch.arange(self.num_cached, device=self.cached_tokens.device)
        begins = torch.where(self.cached_tokens < 0, places, 0).amax(dim=2)
        begin = int(begins.min())
        # Of a slice the whole would stay in memory.
        return self if begin == 0 else ModelState(*self.recurrent, *(part[:, :, begin:].clone() for part in self.cache))


def join_rows(states: Sequence[ModelState]) -> ModelState:
    """The rows of several states in one. The shorter caches begin with tokens of documents that have ended."""
    longest = max(state.num_cached for state in states)
    padded = [_padded(state, longest - state.num_cached) for state in states]
    return ModelState(*(torch.cat(parts, dim=1) for parts in zip(*padded, strict=True)))


def _padded(state: ModelState, num_tokens: int) -> ModelState:
    if num_tokens == 0:
        return state
    tokens, vectors = state.cache
    padding = (
        torch.full((*tokens.shape[:2], num_tokens), ~0, dtype=tokens.dtype, device=tokens.device),
        vectors.new_zeros(*vectors.shape[:2], num_tokens, vectors.shape[3]),
    )
    joined = (torch.cat([before, part], dim=2) for before, part in zip(padding, state.cache, strict=True))
    return ModelState(*state.recurrent, *joined)


def state_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """float64 models keep a float64 state, all others float32: bf16 loses slow memory."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32
