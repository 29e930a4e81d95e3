"""A layer of the model: a time mix and a channel mix, of a kind that the catalog names."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from infctx.model.catalog import ATTENTION_PARTS, RECURRENT_PARTS
from infctx.model.config import BlockKind, FinchConfig
from infctx.model.gold import CachedKeys
from infctx.model.layer_norm import LayerNorm
from infctx.model.seen_tokens import SeenTokens
from infctx.shapes import Activations, LayerShift, LayerWkv, Starts


class Block(nn.Module):
    """One layer: time mix and channel mix, each on a normalised copy of the residual stream."""

    def __init__(self, config: FinchConfig, kind: BlockKind, *, has_initial_state: bool) -> None:
        super().__init__()
        time_mix, channel_mix = RECURRENT_PARTS[kind]
        self.time_mix_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.time_mix = time_mix(config, has_initial_state=has_initial_state)
        self.channel_mix_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.channel_mix = channel_mix(config)

    def forward(
        self, x: Activations, wkv: LayerWkv, att_shift: LayerShift, ffn_shift: LayerShift, starts: Starts | None
    ) -> tuple[Activations, LayerWkv, LayerShift, LayerShift]:
        """Run one layer; returns the residual stream and the layer's three new states."""
        mixed, att_shift, wkv = self.time_mix(self.time_mix_norm(x), att_shift, wkv, starts)
        x = x + mixed
        mixed, ffn_shift = self.channel_mix(self.channel_mix_norm(x), ffn_shift, starts)
        return x + mixed, wkv, att_shift, ffn_shift

    def advance(
        self, x: Activations, wkv: LayerWkv, att_shift: LayerShift, ffn_shift: LayerShift, starts: Starts | None
    ) -> tuple[LayerWkv, LayerShift, LayerShift]:
        """The three new states alone: the channel mix's output is not computed, it has no part in them."""
        mixed, att_shift, wkv = self.time_mix(self.time_mix_norm(x), att_shift, wkv, starts)
        last = self.channel_mix_norm((x + mixed)[:, -1])
        return wkv, att_shift, self.channel_mix.advance(last, ffn_shift)


class AttentionBlock(nn.Module):
    """A layer that attends to what came before, in the place of a recurrence."""

    def __init__(self, config: FinchConfig, kind: BlockKind) -> None:
        super().__init__()
        time_mix, channel_mix = ATTENTION_PARTS[kind]
        self.time_mix_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.time_mix = time_mix(config)
        self.channel_mix_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.channel_mix = channel_mix(config)

    def forward(
        self,
        x: Activations,
        keys: CachedKeys | SeenTokens,
        past: Float[Tensor, "B P W"] | None,
        att_shift: LayerShift,
        ffn_shift: LayerShift,
        starts: Starts | None,
    ) -> tuple[Tensor, ...]:
        """Run one layer.

        Args:
            keys: what GOLD makes its keys of, or the tokens that GPTAlpha may see.
            past: GPTAlpha's keys and values before the chunk.
        Returns:
            The residual stream [B, T, C], the layer's two new states [B, C], and of GPTAlpha the chunk's keys and
            values [B, T, 2A].
        """
        hidden, own = self.time_mix_norm(x), []
        if isinstance(keys, CachedKeys):
            mixed, att_shift = self.time_mix(hidden, att_shift, keys, starts)
        else:
            mixed, att_shift, *own = self.time_mix(hidden, att_shift, keys, past, starts)
        x = x + mixed
        mixed, ffn_shift = self.channel_mix(self.channel_mix_norm(x), ffn_shift, starts)
        return x + mixed, att_shift, ffn_shift, *own
