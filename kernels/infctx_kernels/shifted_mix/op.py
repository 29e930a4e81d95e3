"""The public operator: checks what it is given and chooses a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from infctx_kernels.shifted_mix.reference import shifted_mix_reference
from infctx_kernels.surrounding import SurroundingBackend, check_float, check_tensors, choose_surrounding

MOST_MIXES = 5


def _reference(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    return shifted_mix_reference(*arguments).unbind(0)


def _reference_stacked(*arguments: Tensor | None) -> Tensor:
    return shifted_mix_reference(*arguments)


def _triton(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    from infctx_kernels.shifted_mix.triton_op import SeparateShiftedMix

    return SeparateShiftedMix.apply(*arguments)


def _triton_stacked(*arguments: Tensor | None) -> Tensor:
    from infctx_kernels.shifted_mix.triton_op import ShiftedMix

    return ShiftedMix.apply(*arguments)


def _cpp(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    from infctx_kernels.shifted_mix.cpp_op import separate_shifted_mix_cpp

    return separate_shifted_mix_cpp(*arguments)


def _cpp_stacked(*arguments: Tensor | None) -> Tensor:
    from infctx_kernels.shifted_mix.cpp_op import shifted_mix_cpp

    return shifted_mix_cpp(*arguments)


# Each takes (hidden, carried, weights, dynamic, starts), checked, and returns [M, B, T, C], or M times [B, T, C].
RUNNERS: dict[SurroundingBackend, Callable[..., Tensor]] = {
    SurroundingBackend.TRITON: _triton_stacked,
    SurroundingBackend.CPP: _cpp_stacked,
    SurroundingBackend.TORCH: _reference_stacked,
    SurroundingBackend.REFERENCE: _reference_stacked,
}
SEPARATE_RUNNERS: dict[SurroundingBackend, Callable[..., tuple[Tensor, ...]]] = {
    SurroundingBackend.TRITON: _triton,
    SurroundingBackend.CPP: _cpp,
    SurroundingBackend.TORCH: _reference,
    SurroundingBackend.REFERENCE: _reference,
}


def shifted_mix(
    hidden: Float[Tensor, "B T C"],
    carried: Float[Tensor, "B C"],
    weights: Float[Tensor, "M C"],
    *,
    dynamic: Float[Tensor, "M B T C"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "M B T C"]:
    """Move each token towards the one before it: hidden + (previous - hidden) · (weights + dynamic), M times.

    Args:
        hidden: normalised input of a mix; fp32, bf16, fp16, fp64; B, T, C >= 1.
        carried: hidden of the token before the first, any float dtype; used rounded to hidden's dtype.
        weights: how far each of the M mixes moves, M from 1 to 5; any float dtype.
        dynamic: what a token adds to the weights, in hidden's dtype; None = nothing.
        starts: True at a document's first token, which sees zeros instead of the token before it.
        backend: a name of `SurroundingBackend`; None = the fastest that can run here.
    Returns:
        The mixes in hidden's dtype. Backends triton and cpp compute in float32 and round once, the others round each
        operation to hidden's dtype. Gradients flow into hidden, carried, weights and dynamic.
    Raises:
        ValueError: a shape, dtype or device is wrong. BackendError: the backend cannot run here.
    Source: Eagle and Finch paper, token shift and its data-dependent interpolation.
    """
    _check(hidden, carried, weights, dynamic, starts)
    chosen = choose_surrounding(backend, device=hidden.device, dtypes=(hidden.dtype,))
    with torch.autocast(hidden.device.type, enabled=False):
        return RUNNERS[chosen](hidden, carried, weights, dynamic, starts)


def shifted_mix_unbound(
    hidden: Float[Tensor, "B T C"],
    carried: Float[Tensor, "B C"],
    weights: Float[Tensor, "M C"],
    *,
    dynamic: Float[Tensor, "M B T C"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B T C"], ...]:
    """`shifted_mix(...).unbind(0)`, without the copy that stacks the M gradients on the way back."""
    _check(hidden, carried, weights, dynamic, starts)
    chosen = choose_surrounding(backend, device=hidden.device, dtypes=(hidden.dtype,))
    with torch.autocast(hidden.device.type, enabled=False):
        return SEPARATE_RUNNERS[chosen](hidden, carried, weights, dynamic, starts)


def _check(hidden: Tensor, carried: Tensor, weights: Tensor, dynamic: Tensor | None, starts: Tensor | None) -> None:
    if hidden.dim() != 3 or 0 in hidden.shape:
        raise ValueError(f"hidden: expected [B, T, C], none of them 0, got {list(hidden.shape)}")
    rows, num_tokens, channels = hidden.shape
    if weights.dim() != 2 or not 1 <= weights.shape[0] <= MOST_MIXES:
        raise ValueError(f"weights: expected [M, C] with M from 1 to {MOST_MIXES}, got {list(weights.shape)}")
    num_mixes = weights.shape[0]
    expected = {
        "carried": (carried, (rows, channels)),
        "weights": (weights, (num_mixes, channels)),
        "dynamic": (dynamic, (num_mixes, rows, num_tokens, channels)),
        "starts": (starts, (rows, num_tokens)),
    }
    check_tensors("hidden", hidden, expected)
    for name, tensor in (("hidden", hidden), ("carried", carried), ("weights", weights)):
        check_float(name, tensor)
    if dynamic is not None and dynamic.dtype != hidden.dtype:
        raise ValueError(f"dynamic: expected {hidden.dtype} as hidden, got {dynamic.dtype}")
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"starts: expected bool, got {starts.dtype}")
