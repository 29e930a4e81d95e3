"""A model as named tensors that are read when they are needed: what conversion and surgery work on.

A 14B model does not fit into the memory of the machines it is converted on. Whatever reads, changes or writes a model
file passes one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.model.config import FinchConfig


class StoredTensor(NamedTuple):
    """A tensor that is read, or computed, each time it is asked for; nothing of it is kept.

    read gives a tensor of this shape and dtype on the CPU. It may be mapped from a file: never change it in place.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """One that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredTensor:
        """The same after `change`, a function that depends on nothing but its tensor's shape, dtype and values."""
        return combined([self], lambda tensors: change(tensors[0]))

    def to(self, dtype: torch.dtype) -> StoredTensor:
        """The same in another dtype."""
        return StoredTensor(self.shape, dtype, lambda: self.read().to(dtype))

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self.num_elements * self.dtype.itemsize


def combined(parts: Sequence[StoredTensor], change: Callable[[list[Tensor]], Tensor]) -> StoredTensor:
    """One tensor made of several; `change` is run once on tensors without values to learn the shape and dtype."""
    outcome = change([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts])
    return StoredTensor(tuple(outcome.shape), outcome.dtype, lambda: change([part.read() for part in parts]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTensors:
    """A whole model. tensors: under official names, in official order and shapes (`finch_keys.key_rows`).

    tokenizer: its name, where something says it. origin: the file, for messages.
    """

    config: FinchConfig
    tensors: Mapping[str, StoredTensor]
    tokenizer: str | None = None
    origin: str = "the model"

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors.values())
