"""The sizes of a model. Everything is read from a checkpoint's tensors; nothing is assumed from a model's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Version = Literal["5.2", "6"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinchConfig:
    """Sizes and version of a Finch ("6") or Eagle ("5.2") model.

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
    # Of GOLD's layers: of the low-rank terms of keys and values, and of what is cached of a token.
    key_value_rank: int = 0
    cache_rank: int = 0
    # Checkpoints do not say so.
    uses_rope: bool = False
    # 1e-5 times the square of the divisor 8 that the first implementations applied before the norm.
    group_norm_eps: float = 64e-5
    layer_norm_eps: float = 1e-5

    @property
    def dim_att(self) -> int:
        """Width of the attention: heads times head size."""
        return self.n_head * self.head_size
