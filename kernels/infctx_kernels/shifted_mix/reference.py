"""The mixes in torch operations: exact in float64, on any device. Every other backend is compared with it."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_mix_reference(
    hidden: Tensor, carried: Tensor, weights: Tensor, dynamic: Tensor | None, starts: Tensor | None
) -> Tensor:
    """Mix in hidden's dtype, each operation rounded to it; shapes as in `op.shifted_mix`."""
    previous = torch.cat([carried.to(hidden.dtype)[:, None], hidden[:, :-1]], dim=1)
    if starts is not None:
        previous = previous.masked_fill(starts[..., None], 0.0)
    amount = weights.to(hidden.dtype)[:, None, None]
    if dynamic is not None:
        amount = amount + dynamic
    return hidden + (previous - hidden) * amount  # [M, B, T, C]
