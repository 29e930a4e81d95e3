"""The matrix product of a linear layer, by the faster of the two libraries that torch carries for CPUs.

torch multiplies float32 matrices with MKL, which on processors not made by Intel leaves AVX-512 unused. oneDNN, which
torch has for bfloat16, uses it: twice as fast there, with the same float32 arithmetic.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many rows the product is a reading of the weight, and preparing oneDNN takes longer.
FEWEST_ROWS = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, as `torch.nn.functional.linear` without bias.

    Args:
        x: [.., in], any dtype.
        weight: [out, in], same dtype and device.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if rows < FEWEST_ROWS or not x.dtype == weight.dtype == torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight)
    # A product that another part of torch is to look into (functorch, tracing, autocast) stays torch's own.
    if not onednn_is_faster() or torch.is_autocast_enabled("cpu") or type(weight) not in (Tensor, torch.nn.Parameter):
        return F.linear(x, weight)
    # Reshaped out here, and only where it must be: what a function of autograd returns as a view, this one or another
    # that calls it, could not be changed in place.
    flat = _OneDnnLinear.apply(x.reshape(rows, -1), weight)
    return flat if x.dim() == 2 else flat.view(*x.shape[:-1], -1)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 on which MKL does not use it."""
    if platform.machine() != "x86_64" or not (
        torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    ):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    return facts.get("vendor_id") != "GenuineIntel" and "avx512f" in facts.get("flags", "").split()


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        gradient_of_x = _OneDnnLinear.apply(gradient, weight.t()) if wants_x else None
        return gradient_of_x, _OneDnnLinear.apply(gradient.t(), x.t()) if wants_weight else None
