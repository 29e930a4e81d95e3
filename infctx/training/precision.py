"""Which tensor has which dtype in a run.

fp32: everything float32. bf16: frozen weights are stored bf16; trainable weights, their gradients and the optimizer's
moments are float32; activations and matrix products are bf16; recurrent states are float32, unrounded. Quantised
matrices keep their codes and float32 scales in either.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]


def apply_precision_(model: nn.Module, precision: Precision) -> None:
    """Cast every parameter of floats for a run of this precision; call it when it is settled which ones are trained."""
    cast_parameters_(model, precision)
    model.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32


def cast_parameters_(module: nn.Module, precision: Precision) -> None:
    """Cast the parameters of a part of the model."""
    frozen_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for parameter in module.parameters():
        dtype = torch.float32 if parameter.requires_grad else frozen_dtype
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
