"""The sizes of a model. Everything is read from a checkpoint's tensors; nothing is assumed from a model's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Version = Literal["5.2", "6", "6c2", "goldfinch", "gptalpha"]
# What people call them.
NAMES: dict[Version, str] = {
    "5.2": "Eagle",
    "6": "Finch",
    "6c2": "Finch-C2",
    "goldfinch": "GoldFinch",
    "gptalpha": "GPTAlpha",
}
# What a block's time mix is.
BlockKind = Literal["5.2", "6", "6c2", "gold", "gptalpha"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinchConfig:
    """Sizes and version of a model: Finch ("6"), Eagle ("5.2"), Finch-C2 ("6c2"), GoldFinch or GPTAlpha.

    lerp_rank (D) and decay_rank (E) are the widths of Finch's low-rank pairs; 0 in Eagle, which has none.
    """

    version: Version
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int
    n_head: int
    dim_ffn: int
    lerp_rank: int = 0
    decay_rank: int = 0
    # The layers at the back that attend: GOLD's in a GoldFinch, GPTAlpha's in a GPTAlpha; 0 in the others.
    n_attention: int = 0
    # What the layers in front of them are.
    front: Literal["6", "6c2"] = "6c2"
    # Of Finch-C2's second value.
    value_rank: int = 0
    # Of GOLD's layers: of the low-rank terms of keys and values, and of what is cached of a token.
    key_value_rank: int = 0
    cache_rank: int = 0
    # The three that checkpoints do not tell: rotary positions in attention; Finch-C2's second value in the place of the
    # bonus; Finch-C2's keys weakened where the decay is slow.
    uses_rope: bool = False
    uses_value2: bool = True
    weakens_keys: bool = True
    # 1e-5 times the square of the divisor 8 that the first implementations applied before the norm.
    group_norm_eps: float = 64e-5
    layer_norm_eps: float = 1e-5

    @property
    def dim_att(self) -> int:
        """Width of the attention: heads times head size."""
        return self.n_head * self.head_size

    @property
    def name(self) -> str:
        """What people call such a model."""
        return NAMES[self.version]

    @property
    def n_recurrent(self) -> int:
        """Layers with a recurrence: all but those at the back that attend."""
        return self.n_layer - self.n_attention

    def kind(self, layer: int) -> BlockKind:
        """What the time mix of a layer is, counted from 0."""
        if self.version == "goldfinch":
            return self.front if layer < self.n_recurrent else "gold"
        if self.version == "gptalpha":
            return self.front if layer < self.n_recurrent else "gptalpha"
        return self.version

    @property
    def kinds(self) -> list[BlockKind]:
        """Of the layers, each once, in their order."""
        return list(dict.fromkeys(self.kind(layer) for layer in range(self.n_layer)))

    @property
    def cache_width(self) -> int:
        """Numbers that are cached of a token: GOLD's layers share C/16, GPTAlpha's have a key and a value each."""
        return self.cache_rank if self.version == "goldfinch" else 2 * self.dim_att * self.n_attention
