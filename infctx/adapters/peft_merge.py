"""The value of one matrix with an adapter of peft folded in, without changing anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infctx.adapters.base_weight import base_weight
from infctx.adapters.principal import ADAPTER


@torch.no_grad()
def merged_weight(layer: nn.Module) -> Tensor:
    """The base matrix and what the adapter adds to it, float32 (float64 in a float64 model).

    Args:
        layer: peft's LoRA or MiSS layer, around a matrix of any storage.
    Source: DoRA (Liu et al. 2024), eq. 5; MiSS (Kang and Yin 2025), section 3; the additions are computed by peft.
    """
    base = layer.get_base_layer()
    weight = base_weight(base)
    if hasattr(layer, "miss_block"):
        if layer.miss_fn == "bat":
            return weight + layer.get_delta_weight(ADAPTER, weight)
        # It answers with the whole weight, and may write over what it is given.
        return layer.get_delta_weight_miss(ADAPTER, weight.clone())
    merged = weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)
    if ADAPTER not in layer.lora_magnitude_vector:
        return merged
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight
    axis = length_axis(base)
    return merged * (magnitude / torch.linalg.vector_norm(merged, dim=axis)).unsqueeze(axis)


@torch.no_grad()
def set_exact_magnitude_(layer: nn.Module) -> None:
    """Let a fresh DoRA's lengths be those of the matrix in float32: peft rounds them to the dtype it is stored in."""
    base = layer.get_base_layer()
    lengths = torch.linalg.vector_norm(base_weight(base), dim=length_axis(base))
    layer.lora_magnitude_vector[ADAPTER].weight.data = lengths


def length_axis(base: nn.Module) -> int:
    """The axis that DoRA takes lengths along: over a matrix's inputs, over an embedding's ids."""
    return 0 if isinstance(base, nn.Embedding) else 1
