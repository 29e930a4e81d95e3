"""The public operator: checks what it is given and chooses a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from infctx_kernels.group_norm_gate.reference import group_norm_gate_reference
from infctx_kernels.surrounding import SurroundingBackend, check_float, check_tensors, choose_surrounding


def _triton(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    from infctx_kernels.group_norm_gate.triton_op import GroupNormGate

    return GroupNormGate.apply(x, gate, weight, bias, eps)


def _cpp(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    from infctx_kernels.group_norm_gate.cpp_op import group_norm_gate_cpp

    return group_norm_gate_cpp(x, gate, weight, bias, eps=eps)


# Each takes what `group_norm_gate` takes, checked.
RUNNERS: dict[SurroundingBackend, Callable[..., Tensor]] = {
    SurroundingBackend.TRITON: _triton,
    SurroundingBackend.CPP: _cpp,
    SurroundingBackend.TORCH: group_norm_gate_reference,
    SurroundingBackend.REFERENCE: group_norm_gate_reference,
}


def group_norm_gate(
    x: Float[Tensor, "B T H N"],
    gate: Float[Tensor, "B T A"],
    weight: Float[Tensor, " A"],
    bias: Float[Tensor, " A"],
    *,
    eps: float,
    backend: str | None = None,
) -> Float[Tensor, "B T A"]:
    """Normalise each token's heads, scale and shift (A = H · N channels), and multiply by silu(gate).

    Args:
        x: what the recurrence returned; B, T, H >= 1, N >= 2. All four tensors: fp32, bf16, fp16, fp64, each its own.
        gate: before its silu.
        weight, bias: of the norm.
        eps: added to the variance, > 0.
        backend: a name of `SurroundingBackend`; None = the fastest that can run here.
    Returns:
        The product in gate's dtype; the statistics are float32 (float64 with float64 x). Backends triton and
        cpp stay in float32 and round once, the others round the norm and the silu to gate's dtype before they multiply.
        Gradients flow into all four tensors.
    Raises:
        ValueError: a shape, dtype or device is wrong. BackendError: the backend cannot run here.
    Source: Eagle and Finch paper, output of time mixing.
    """
    _check(x, gate, weight, bias, eps)
    chosen = choose_surrounding(backend, device=x.device, dtypes=(x.dtype, gate.dtype))
    with torch.autocast(x.device.type, enabled=False):
        return RUNNERS[chosen](x, gate, weight, bias, eps=eps)


def _check(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    if x.dim() != 4 or 0 in x.shape or x.shape[3] < 2:
        # One value minus its mean is nothing.
        raise ValueError(f"x: expected [B, T, H, N], none of them 0 and N >= 2, got {list(x.shape)}")
    rows, num_tokens, heads, size = x.shape
    expected = {
        "gate": (gate, (rows, num_tokens, heads * size)),
        "weight": (weight, (heads * size,)),
        "bias": (bias, (heads * size,)),
    }
    check_tensors("x", x, expected)
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight), ("bias", bias)):
        check_float(name, tensor)
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps: expected a finite number > 0, got {eps}")
