"""The values of a base matrix, whatever it is stored as, and of any other parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infctx.model.quantized_linear import QuantizedLinear


def base_weight(module: nn.Module) -> Tensor:
    """The values of a matrix that adapters are put on, outside any graph.

    Args:
        module: a Linear, plain or quantised, or an Embedding; not the adapter around it.
    Returns:
        float32 (float64 of a float64 matrix), [out, in] or [vocab, channels]; it may share the parameter's memory.
    """
    if isinstance(module, QuantizedLinear):
        return module.dequantized()
    return exact_values(module.weight)


def set_base_weight_(module: nn.Module, values: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Put other values into a matrix; dtype None = rounded to the dtype it is stored in."""
    module.weight.data = values.to(dtype or module.weight.dtype)


def parameter_values(model: nn.Module, name: str) -> Tensor:
    """The values of any parameter, quantised matrices among them, as `exact_values`."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.dequantized() if isinstance(owner, QuantizedLinear) else exact_values(model.get_parameter(name))


def exact_values(parameter: Tensor) -> Tensor:
    """The values of a parameter in float32 (float64 of a float64 one), outside any graph."""
    values = parameter.detach()
    return values.to(torch.promote_types(values.dtype, torch.float32))
