"""The layers that attend, for one token of each row: keys and values of the tokens before are made once and kept.

They follow from the cache, which alone is the state: where the step is given another state than it gave back last, they
are made again. Where they would take more memory than they may, every token makes them anew, a block at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.model.block import AttentionBlock
from infctx.model.cached_attention import KEYS_AT_ONCE
from infctx.model.finch import Finch
from infctx.model.gold import CachedKeys
from infctx.model.seen_tokens import SeenTokens, mark_starts
from infctx.model.state import ModelState

# Of keys and values that are kept, of all layers and rows.
READY_BYTES = 2 * 2**30
_ROOM = 256


class AttentionStep:
    """The last layers of a model at one token a row.

    Args:
        ready_bytes: what keys and values may take that are kept.
    """

    def __init__(self, model: Finch, *, ready_bytes: int = READY_BYTES) -> None:
        self._model, self._config = model, model.config
        self._blocks: list[AttentionBlock] = list(model.blocks[model.config.n_recurrent :])
        self._ready_bytes = ready_bytes
        self._given_back: Tensor | None = None

    def advance_(self, x: Tensor, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """The residual stream [B, C] behind these layers, and the state behind the tokens; its shifts are changed.

        Args:
            x: [B, C] behind the layers with a recurrence. tokens: [B].
        """
        if state.cached is not self._given_back:
            self._take_up(state)
        place = state.num_cached
        own = mark_starts(tokens[:, None], None, is_first=place == 0)
        if place == 0:
            self._first = torch.zeros_like(self._first)
        self._make_room(place + 1)
        self._tokens[:, :, place] = own[:, 0]
        x = x[:, None]
        if self._model.token_cat is not None:
            self._vectors[:, :, place] = self._model.token_cat.compress(x)[:, 0]
        first = self._config.n_recurrent
        for number, block in enumerate(self._blocks):
            shifts = state.att_shift[first + number], state.ffn_shift[first + number]
            x = self._layer_(number, block, x, own, shifts, place)
        cache = (self._tokens[:, :, : place + 1], self._vectors[:, :, : place + 1])
        self._given_back = cache[1]
        return x[:, 0], ModelState(*state.recurrent, *cache)

    def _layer_(
        self, number: int, block: AttentionBlock, x: Tensor, own: Tensor, shifts: tuple[Tensor, Tensor], place: int
    ) -> Tensor:
        att_shift, ffn_shift = shifts
        hidden, time_mix = block.time_mix_norm(x), block.time_mix
        if self._keys is None:
            inputs = self._inputs(number, own, 0, place)
            mixed, new_shift, *kept = time_mix(hidden, att_shift, *inputs, None)
            if kept:
                self._own_vectors(number)[:, place] = kept[0][:, 0]
        else:
            # The token before is all that the new one's key and value need of those in the cache.
            begin = max(0, place - 1)
            inputs = self._inputs(number, own, begin, place)
            query, source, tensors, kept = time_mix.sides(hidden, att_shift, *inputs, None)
            if kept:
                self._own_vectors(number)[:, place] = kept[0][:, 0]
            spot = place - begin, place - begin + 1
            made = source.build(*spot, source.leaves(*spot, tensors))
            for all_of_them, new in zip((self._keys[number], self._values[number]), made, strict=True):
                all_of_them[:, :, place] = new[:, 0]
            mixed, new_shift = time_mix.closed(self._attend(number, query, place)), hidden[:, -1]
        att_shift.copy_(new_shift)
        x = x + mixed
        mixed, new_shift = block.channel_mix(block.channel_mix_norm(x), ffn_shift, None)
        ffn_shift.copy_(new_shift)
        return x + mixed

    def _attend(self, number: int, query: Tensor, place: int) -> Tensor:
        keys, values = (part[number][:, :, self._begin : place + 1] for part in (self._keys, self._values))
        mask = None
        if not self._is_same_begin:
            places = torch.arange(self._begin, place + 1, device=query.device)
            mask = (places >= self._first[:, None])[:, None, None]
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, mask).transpose(1, 2)

    def _inputs(self, number: int, own: Tensor, begin: int, place: int) -> tuple[object, ...]:
        """What a layer's time mix is told of the tokens from `begin` on."""
        seen = SeenTokens(self._tokens[0, :, begin:place], own, offset=begin)
        if self._model.token_cat is None:
            return seen, self._own_vectors(number)[:, begin:place]
        model = self._model
        keys = CachedKeys(
            seen,
            self._vectors[0, :, begin:place],
            self._vectors[0, :, place : place + 1],
            embedding=model.embedding,
            embedding_norm=model.input_norm,
            token_cat=model.token_cat,
        )
        return (keys,)

    def _own_vectors(self, number: int) -> Tensor:
        """What GPTAlpha's layer has cached: [B, capacity, 2A]."""
        width = 2 * self._config.dim_att
        return self._vectors[0, :, :, number * width : (number + 1) * width]

    def _take_up(self, state: ModelState) -> None:
        """Begin with a state that this step has not given back."""
        num, rows = state.num_cached, state.cached_tokens.shape[1]
        device, dtype = self._model.embedding.weight.device, self._model.activation_dtype
        self._tokens, self._vectors = state.cached_tokens.to(device), state.cached.to(device)
        places = torch.arange(num, device=device)
        begins = torch.where(self._tokens[0] < 0, places, 0)
        self._first = begins.amax(dim=1) if num else torch.zeros(rows, dtype=torch.int64, device=device)
        self._begin = int(self._first.min())
        self._is_same_begin = bool((self._first == self._begin).all())
        self._keys = self._values = None
        heads, size = self._config.n_head, self._config.head_size
        self._bytes_each = 2 * len(self._blocks) * rows * heads * size * torch.empty(0, dtype=dtype).element_size()
        if (num + _ROOM) * self._bytes_each > self._ready_bytes:
            return
        empty = torch.empty(rows, heads, num, size, dtype=dtype, device=device)
        self._keys = [torch.empty_like(empty) for _ in self._blocks]
        self._values = [torch.empty_like(empty) for _ in self._blocks]
        if num == 0:
            return
        # The last of them stands for the chunk's own, of which there has to be one.
        own = self._tokens[0, :, num - 1 :]
        for number, block in enumerate(self._blocks):
            inputs = self._inputs(number, own, 0, num - 1)
            if self._model.token_cat is None:
                inputs = (*inputs, self._own_vectors(number)[:, num - 1 : num])
            source, tensors = block.time_mix.source(*inputs, dtype)
            for begin in range(self._begin, num, KEYS_AT_ONCE):
                end = min(begin + KEYS_AT_ONCE, num)
                made = source.build(begin, end, source.leaves(begin, end, tensors))
                for all_of_them, new in zip((self._keys[number], self._values[number]), made, strict=True):
                    all_of_them[:, :, begin:end] = new.transpose(1, 2)

    def _make_room(self, num_tokens: int) -> None:
        capacity = self._tokens.shape[2]
        if num_tokens <= capacity:
            return
        more = max(_ROOM, capacity // 4)
        self._tokens, self._vectors = (_longer(part, more) for part in (self._tokens, self._vectors))
        if self._keys is None:
            return
        if (capacity + more) * self._bytes_each > self._ready_bytes:
            self._keys = self._values = None
            return
        self._keys = [_longer(part, more) for part in self._keys]
        self._values = [_longer(part, more) for part in self._values]


def _longer(tensor: Tensor, more: int) -> Tensor:
    """With room for more tokens, which are on axis 2."""
    longer = tensor.new_empty(*tensor.shape[:2], tensor.shape[2] + more, *tensor.shape[3:])
    longer[:, :, : tensor.shape[2]] = tensor
    return longer
