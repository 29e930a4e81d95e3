"""The recurrent state: everything a chunk needs to know of the tokens before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from infctx.model.config import FinchConfig


class ModelState(NamedTuple):
    """Three tensors for all layers, so that one copy moves a boundary; float32 (float64 in a float64 model).

    wkv: what the recurrence holds, key axis before value axis.
    att_shift, ffn_shift: the normalised input of time mix and channel mix at the last token.
    """

    wkv: Float[Tensor, "L B H N N"]
    att_shift: Float[Tensor, "L B C"]
    ffn_shift: Float[Tensor, "L B C"]

    @classmethod
    def zeros(cls, config: FinchConfig, rows: int, *, dtype: torch.dtype, device: torch.device | str) -> ModelState:
        """The state of `rows` fresh documents of a model without a tuned initial state."""
        heads, size = config.n_head, config.head_size
        return cls(
            torch.zeros(config.n_layer, rows, heads, size, size, dtype=dtype, device=device),
            torch.zeros(config.n_layer, rows, config.n_embd, dtype=dtype, device=device),
            torch.zeros(config.n_layer, rows, config.n_embd, dtype=dtype, device=device),
        )

    def detach(self) -> ModelState:
        """The same values outside any graph."""
        return ModelState(*(tensor.detach() for tensor in self))

    def to(self, device: torch.device | str) -> ModelState:
        """The same values on another device."""
        return ModelState(*(tensor.to(device) for tensor in self))


def state_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """float64 models keep a float64 state, all others float32: bf16 loses slow memory."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32
