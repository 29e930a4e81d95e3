"""What the operators around the recurrence share: which implementation runs, and what they say of wrong arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import torch
from torch import Tensor

from infctx_kernels.cpu import library
from infctx_kernels.dispatch import BackendError, why_not_triton

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A program walks over tokens one after the other: few enough that every multiprocessor has work, many enough that the
# partial sums of the weights' gradients, one for each program, stay small beside the activations.
FEWEST_TOKENS, MOST_TOKENS = 8, 64
ENOUGH_PROGRAMS = 1024
# Products fuse with sums. Said at every launch: Triton's default depends on its version, and it warns without.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


class SurroundingBackend(StrEnum):
    """The implementations. A new one joins here, in FASTEST_FIRST, in RUNS_ON and in the RUNNERS of each op.py."""

    TRITON = "triton"
    CPP = "cpp"
    TORCH = "torch"
    REFERENCE = "reference"


FASTEST_FIRST = (
    SurroundingBackend.TRITON,
    SurroundingBackend.CPP,
    SurroundingBackend.TORCH,
    SurroundingBackend.REFERENCE,
)


def _runs_anywhere(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    return None


def _why_not_triton(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if torch.float64 in dtypes:
        return "it computes in float32, the tensors are torch.float64"
    return why_not_triton(device)


def _why_not_cpp(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if device.type != "cpu":
        return "it runs on CPUs only"
    if torch.float64 in dtypes:
        return "it computes in float32, the tensors are torch.float64"
    return library.why_not()


# For each backend: the reason why it cannot run on this device with tensors of these dtypes, or None.
RUNS_ON: dict[SurroundingBackend, Callable[[torch.device, tuple[torch.dtype, ...]], str | None]] = {
    SurroundingBackend.TRITON: _why_not_triton,
    SurroundingBackend.CPP: _why_not_cpp,
    SurroundingBackend.TORCH: _runs_anywhere,
    SurroundingBackend.REFERENCE: _runs_anywhere,
}


def choose_surrounding(
    wanted: str | None, *, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> SurroundingBackend:
    """Pick the fastest backend that can run here, or the wanted one.

    Args:
        wanted: a backend's name, or None for the fastest; Triton's interpreter, which is slow, must be asked for.
        device: where the tensors are.
        dtypes: of the activations.
    Raises:
        BackendError: the wanted backend does not exist or cannot run here; names the reason and the ones that can.
    """
    if wanted is None:
        candidates = [b for b in FASTEST_FIRST if b is not SurroundingBackend.TRITON or device.type == "cuda"]
        return next(backend for backend in candidates if RUNS_ON[backend](device, dtypes) is None)
    refusal = RUNS_ON[SurroundingBackend(wanted)](device, dtypes) if wanted in set(SurroundingBackend) else None
    if wanted in set(SurroundingBackend) and refusal is None:
        return SurroundingBackend(wanted)
    names = ", ".join(backend for backend in FASTEST_FIRST if RUNS_ON[backend](device, dtypes) is None)
    if refusal is None:
        raise BackendError(f"backend {wanted!r} does not exist. Usable on {device}: {names}.")
    raise BackendError(f"backend {wanted!r} cannot run on {device}: {refusal}. Usable here: {names}.")


def check_tensors(
    first_name: str, first: Tensor, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]
) -> None:
    """Compare shapes with those expected and devices with the first tensor's; None stands for an absent tensor.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as {first_name}, got {tensor.device}")


def check_float(name: str, tensor: Tensor | None) -> None:
    """Raises ValueError, naming the argument, where its dtype is none of FLOAT_DTYPES."""
    if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected a dtype of fp32, bf16, fp16, fp64, got {tensor.dtype}")


def tokens_per_program(num_tokens: int, *, column_blocks: int) -> int:
    """How many tokens a program of a kernel takes where `column_blocks` programs share a token: a power of two."""
    share = max(1, num_tokens * column_blocks // ENOUGH_PROGRAMS)
    return min(MOST_TOKENS, max(FEWEST_TOKENS, 1 << (share.bit_length() - 1)))
