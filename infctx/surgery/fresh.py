"""Tensors that come from no file, and are the same each time they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.model.tensors import ModelTensors, StoredTensor

# Of the second matrix of a low-rank pair whose first is zero: as in a model trained from scratch.
LOW_RANK_BOUND = 0.01


class FreshTensor(StoredTensor):
    """A tensor that has nothing of any model in it."""

    __slots__ = ()


class Origins(NamedTuple):
    """Parameters of a model that was made of another: as they were, computed from what was there, and new ones."""

    kept: int
    changed: int
    fresh: int


def origins_of(result: ModelTensors, source: ModelTensors) -> Origins:
    """Where the parameters of a model come from that was made of another one; no tensor is read."""
    theirs = {id(tensor) for tensor in source.tensors.values()}
    kept = sum(tensor.num_elements for tensor in result.tensors.values() if id(tensor) in theirs)
    fresh = sum(tensor.num_elements for tensor in result.tensors.values() if isinstance(tensor, FreshTensor))
    return Origins(kept, result.num_parameters - kept - fresh, fresh)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Random numbers of a tensor's own: they depend neither on the other tensors nor on the order of reading."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fresh(shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> StoredTensor:
    """What `read` gives, in this shape and dtype."""
    return FreshTensor(shape, dtype, lambda: read().reshape(shape).to(dtype))


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    """A tensor of zeros."""
    return FreshTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def small_random(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int, name: str) -> StoredTensor:
    """Uniform numbers in ±LOW_RANK_BOUND, drawn in float32."""

    def read() -> Tensor:
        drawn = torch.empty(shape).uniform_(-LOW_RANK_BOUND, LOW_RANK_BOUND, generator=generator_for(seed, name))
        return drawn.to(dtype)

    return FreshTensor(shape, dtype, read)
