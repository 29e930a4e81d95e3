"""The values of a layer that an adapter stands on, however they are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infctx.model.quantized_linear import QuantizedLinear


def base_weight(module: nn.Module) -> Tensor:
    """The weight that a base layer computes with, float32 and detached.

    Args:
        module: a matrix, plain or quantised, or an embedding.
    Returns:
        [out, in] of a matrix, [vocab, channels] of an embedding; a new tensor where it is stored in another form.
    """
    if isinstance(module, QuantizedLinear):
        return module.dequantized()
    assert isinstance(module, nn.Linear | nn.Embedding), type(module)
    return module.weight.detach().to(torch.float32)
