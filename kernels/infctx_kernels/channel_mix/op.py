"""The public operators: check what they are given and choose a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from infctx_kernels.channel_mix.reference import sigmoid_gate_reference, squared_relu_reference
from infctx_kernels.surrounding import SurroundingBackend, check_float, check_tensors, choose_surrounding


def _squared_relu_triton(x: Tensor) -> Tensor:
    from infctx_kernels.channel_mix.triton_op import SquaredRelu

    return SquaredRelu.apply(x)


def _sigmoid_gate_triton(receptance: Tensor, value: Tensor) -> Tensor:
    from infctx_kernels.channel_mix.triton_op import SigmoidGate

    return SigmoidGate.apply(receptance, value)


def _squared_relu_cpp(x: Tensor) -> Tensor:
    from infctx_kernels.channel_mix.cpp_op import squared_relu_cpp

    return squared_relu_cpp(x)


def _sigmoid_gate_cpp(receptance: Tensor, value: Tensor) -> Tensor:
    from infctx_kernels.channel_mix.cpp_op import sigmoid_gate_cpp

    return sigmoid_gate_cpp(receptance, value)


SQUARED_RELU_RUNNERS: dict[SurroundingBackend, Callable[[Tensor], Tensor]] = {
    SurroundingBackend.TRITON: _squared_relu_triton,
    SurroundingBackend.CPP: _squared_relu_cpp,
    SurroundingBackend.TORCH: squared_relu_reference,
    SurroundingBackend.REFERENCE: squared_relu_reference,
}
SIGMOID_GATE_RUNNERS: dict[SurroundingBackend, Callable[[Tensor, Tensor], Tensor]] = {
    SurroundingBackend.TRITON: _sigmoid_gate_triton,
    SurroundingBackend.CPP: _sigmoid_gate_cpp,
    SurroundingBackend.TORCH: sigmoid_gate_reference,
    SurroundingBackend.REFERENCE: sigmoid_gate_reference,
}


def squared_relu(x: Float[Tensor, ...], *, backend: str | None = None) -> Float[Tensor, ...]:
    """relu(x)², of which only x is kept for the backward pass.

    Args:
        x: fp32, bf16, fp16, fp64; any shape.
        backend: a name of `SurroundingBackend`; None = the fastest that can run here.
    Raises:
        ValueError: the dtype is none of these. BackendError: the backend cannot run here.
    Source: Eagle and Finch paper, channel mixing.
    """
    check_float("x", x)
    chosen = choose_surrounding(backend, device=x.device, dtypes=(x.dtype,))
    with torch.autocast(x.device.type, enabled=False):
        return SQUARED_RELU_RUNNERS[chosen](x)


def sigmoid_gate(
    receptance: Float[Tensor, "*S"], value: Float[Tensor, "*S"], *, backend: str | None = None
) -> Float[Tensor, "*S"]:
    """sigmoid(receptance) · value.

    Args:
        receptance, value: one shape and one dtype of fp32, bf16, fp16, fp64.
        backend: a name of `SurroundingBackend`; None = the fastest that can run here. Backends triton and cpp
            round once, the others round the sigmoid to the dtype too.
    Raises:
        ValueError: a shape, dtype or device is wrong. BackendError: the backend cannot run here.
    Source: Eagle and Finch paper, channel mixing.
    """
    check_tensors("receptance", receptance, {"value": (value, tuple(receptance.shape))})
    check_float("receptance", receptance)
    if value.dtype != receptance.dtype:
        raise ValueError(f"value: expected {receptance.dtype} as receptance, got {value.dtype}")
    chosen = choose_surrounding(backend, device=receptance.device, dtypes=(receptance.dtype,))
    with torch.autocast(receptance.device.type, enabled=False):
        return SIGMOID_GATE_RUNNERS[chosen](receptance, value)
