"""Tensors that come from no file, and are the same each time they are read."""

from __future__ import annotations

import hashlib

import torch

from infctx.model.tensors import StoredTensor

# Of the second matrix of a low-rank pair whose first is zero: as in a model trained from scratch.
LOW_RANK_BOUND = 0.01


def generator_for(seed: int, name: str) -> torch.Generator:
    """Random numbers of a tensor's own: they depend neither on the other tensors nor on the order of reading."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    """A tensor of zeros."""
    return StoredTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def small_random(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int, name: str) -> StoredTensor:
    """Uniform numbers in ±LOW_RANK_BOUND, drawn in float32."""

    def read() -> torch.Tensor:
        drawn = torch.empty(shape).uniform_(-LOW_RANK_BOUND, LOW_RANK_BOUND, generator=generator_for(seed, name))
        return drawn.to(dtype)

    return StoredTensor(shape, dtype, read)
