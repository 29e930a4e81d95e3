"""GPTAlpha: softmax attention with the token shift and the low-rank mixes of Finch; its keys and values are cached.

Source: GoldFinch paper (arXiv 2407.12077), section on GPTAlpha time mixing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


class GPTAlphaTimeMix(nn.Module):
    """The attention half of a GPTAlpha block."""

    # The receptance is the query here.
    MIX_ORDER = ("receptance", "key", "value")

    def __init__(self, config: FinchConfig) -> None:
        super().__init__()
        channels, width = config.n_embd, config.dim_att
        self.n_head, self.head_size = config.n_head, config.head_size
        self.uses_rope = config.uses_rope
        self.query = Linear(channels, width)
        self.key = Linear(channels, width)
        self.value = Linear(channels, width)
        self.output = Linear(width, channels)
        eps = config.layer_norm_eps
        self.receptance_norm, self.key_norm = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.value_norm, self.output_norm = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.lerp_input = nn.Parameter(torch.empty(channels))
        self.lerp_receptance = nn.Parameter(torch.empty(channels))
        self.lerp_key = nn.Parameter(torch.empty(channels))
        self.lerp_value = nn.Parameter(torch.empty(channels))
        # Used as x @ P, stored [in, out]; three groups of `lerp_rank` columns in MIX_ORDER.
        self.lerp_down = nn.Parameter(torch.empty(channels, 3 * config.lerp_rank))
        self.lerp_up = nn.Parameter(torch.empty(3, config.lerp_rank, channels))
        # What a document's first token takes for the one before it; None = zeros.
        self.initial_shift: nn.Parameter | None = None
        self.surrounding_backend: str | None = None
        self.time_group: TimeGroup | None = None

    def forward(
        self,
        hidden: Activations,
        shift: LayerShift,
        seen: SeenTokens,
        past: Float[Tensor, "B P W"],
        starts: Starts | None,
    ) -> tuple[Activations, LayerShift, Float[Tensor, "B T W"]]:
        """Attend to everything so far; hidden is the block's normalised input.

        Args:
            past: key and value of the tokens before the chunk, before their rotation.
        Returns:
            The output, the new shift, and key and value of the chunk's tokens, for the cache.
        """
        before, after = vector_before(hidden, shift, self.time_group)
        query, source, tensors, (own,) = self.sides(hidden, before, seen, past, starts)
        return self.closed(attend(query, seen.first, source, tensors)), shift_behind(hidden, shift, after), own

    def sides(
        self, hidden: Activations, before: LayerShift, seen: SeenTokens, past: Tensor, starts: Starts | None
    ) -> tuple[Float[Tensor, "B T H N"], KeyValueSource, list[Tensor], list[Tensor]]:
        """The two sides of the attention: queries; the source of keys and values, and what it makes them of.

        And what the layer adds to the cache: [B, T, 2A], alone.
        """
        query, key, value = self._mix(hidden, before, starts)
        query = self.receptance_norm(self.query(query)).unflatten(-1, (self.n_head, self.head_size))
        if self.uses_rope:
            query = rotate(query, seen.offset + seen.num_past)
        own = torch.cat([self.key_norm(self.key(key)), self.value_norm(self.value(value))], dim=-1)
        return query, _LayerKeys(self, seen, hidden.dtype), [past, own], [own]

    def source(
        self, seen: SeenTokens, past: Tensor, own: Tensor, dtype: torch.dtype
    ) -> tuple[KeyValueSource, list[Tensor]]:
        """Of this layer's keys and values, and what it makes them of, where the chunk's are there already."""
        return _LayerKeys(self, seen, dtype), [past, own]

    def closed(self, mixed: Float[Tensor, "B T H N"]) -> Activations:
        """The output of what was attended to."""
        return self.output(self.output_norm(mixed.flatten(-2)))

    def _mix(self, hidden: Tensor, before: Tensor, starts: Tensor | None) -> tuple[Tensor, ...]:
        rows, num_tokens, channels = hidden.shape
        backend, start = self.surrounding_backend, self.initial_shift
        (first,) = token_shift(hidden, before, self.lerp_input[None], starts=starts, start=start, backend=backend)
        low = torch.tanh(linear(first, self.lerp_down.t().to(hidden.dtype)))
        low = low.view(rows * num_tokens, 3, -1).transpose(0, 1)  # [3, B·T, D]
        dynamic = torch.bmm(low, self.lerp_up.to(low.dtype)).view(3, rows, num_tokens, channels)
        static = torch.stack([getattr(self, f"lerp_{name}") for name in self.MIX_ORDER])
        return token_shift(hidden, before, static, dynamic=dynamic, starts=starts, start=start, backend=backend)


class _LayerKeys:
    """Keys and values of one layer, which are there already: see `KeyValueSource`."""

    PAST, OWN = 0, 1

    def __init__(self, layer: GPTAlphaTimeMix, seen: SeenTokens, dtype: torch.dtype) -> None:
        self.num_keys, self.first_key = seen.num_keys, seen.first_key
        self._border, self._device, self._dtype, self._offset = seen.num_past, seen.device, dtype, seen.offset
        self._n_head, self._uses_rope = layer.n_head, layer.uses_rope

    def leaves(self, begin: int, end: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        past, own = self._parts(begin, end)
        return [tensors[self.PAST][:, past].to(self._device), tensors[self.OWN][:, own]]

    def build(self, begin: int, end: int, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        both = torch.cat([leaf.to(self._dtype) for leaf in leaves], dim=1)
        key, value = (part.unflatten(-1, (self._n_head, -1)) for part in both.chunk(2, dim=-1))
        return rotate(key, self._offset + begin) if self._uses_rope else key, value

    def add_(self, begin: int, end: int, gradients: Sequence[Tensor | None], totals: Sequence[Tensor | None]) -> None:
        for gradient, total, place in zip(gradients, totals, self._parts(begin, end), strict=True):
            if gradient is not None and total is not None:
                total[:, place] += gradient.to(total.device)

    def _parts(self, begin: int, end: int) -> tuple[slice, slice]:
        border = self._border
        return slice(begin, min(end, border)), slice(max(0, begin - border), max(0, end - border))
