"""Adapters as RWKV-PEFT writes them, with random values: flat dicts of tensors under official names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

MATRICES = [f"att.{name}" for name in ("receptance", "key", "value", "gate", "output")] + [
    f"ffn.{name}" for name in ("key", "receptance", "value")
]


def random_adapter(
    base: dict[str, Tensor], kind: str, *, rank: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """kind: lora, start (PiSSA's second file), disha, bat or state. base: a model's official tensors."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

    layers = 1 + max(int(name.split(".")[1]) for name in base if name.startswith("blocks."))
    tensors = {}
    for i in range(layers):
        if kind == "state":
            heads, size = base[f"blocks.{i}.att.time_faaaa"].shape
            tensors[f"blocks.{i}.att.time_state"] = values(heads, size, size)
            continue
        for matrix in MATRICES:
            name = f"blocks.{i}.{matrix}"
            rows, columns = base[f"{name}.weight"].shape
            if kind == "disha":
                tensors[f"{name}.disha"] = values(rank, rows)
            elif kind == "bat":
                tensors[f"{name}.disha"] = values(columns // rank, rank, rank)
            else:
                start = "init_" if kind == "start" else ""
                prefix = "model." if kind == "start" else ""
                tensors[f"{prefix}{name}.{start}lora_A"] = values(rank, columns)
                tensors[f"{prefix}{name}.{start}lora_B"] = values(rows, rank)
    return tensors


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., dict[str, Tensor]]:
    return random_adapter
