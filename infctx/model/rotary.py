"""Rotary positions: pairs of lanes turned by an angle that grows with the place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROPE_BASE = 10_000.0


def rotate(x: Float[Tensor, "B T H N"], begin: int) -> Float[Tensor, "B T H N"]:
    """Lanes 2p and 2p + 1 turned by place · 10000^(-2p/N), from place `begin` on; only differences of places matter."""
    size, work = x.shape[-1], torch.float64
    places = torch.arange(begin, begin + x.shape[1], dtype=work, device=x.device)
    rates = ROPE_BASE ** (-torch.arange(0, size, 2, dtype=work, device=x.device) / size)
    angles = (places[:, None] * rates)[None, :, None]  # [1, T, 1, N / 2]
    cos, sin = (part.to(x.dtype) for part in (angles.cos(), angles.sin()))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
