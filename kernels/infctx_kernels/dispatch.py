"""Which implementation runs: one pure function decides, and says why another cannot."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from enum import StrEnum

import torch

from infctx_kernels.cpu import library
from infctx_kernels.wkv6 import cpp


class BackendError(Exception):
    """A backend that was asked for by name cannot run here."""


class Backend(StrEnum):
    """The implementations of the recurrence. A new one joins here, in FASTEST_FIRST, in RUNS_ON and in op.RUNNERS."""

    TRITON = "triton"
    CPP = "cpp"
    TORCH = "torch"
    REFERENCE = "reference"


FASTEST_FIRST = (Backend.TRITON, Backend.CPP, Backend.TORCH, Backend.REFERENCE)


# Those that Triton's kernels are made for.
TRITON_HEAD_SIZES = (16, 32, 64, 128)
SMALLEST_COMPUTE_CAPABILITY = (8, 0)


def why_not_triton(device: torch.device) -> str | None:
    """The reason why Triton cannot run on a device, or None. On a CPU its interpreter can, when it is on; for tests."""
    if not _has_triton():
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        needed = SMALLEST_COMPUTE_CAPABILITY
        if found >= needed:
            return None
        return f"it needs compute capability {'.'.join(map(str, needed))}, the device has {'.'.join(map(str, found))}"
    if device.type == "cpu" and _triton_interprets():
        return None
    return "it needs a CUDA device"


@functools.cache
def _has_triton() -> bool:
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _triton_interprets() -> bool:
    # Importing Triton takes up to seconds: only where somebody asks for it.
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _why_not_triton(device: torch.device, head_size: int, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    if head_size not in TRITON_HEAD_SIZES:
        return f"it takes heads of {', '.join(map(str, TRITON_HEAD_SIZES))} channels, these have {head_size}"
    return why_not_triton(device)


def _runs_anywhere(device: torch.device, head_size: int, dtype: torch.dtype) -> str | None:
    return None


# For each backend: the reason why it cannot run on this device with this head size and input dtype, or None.
RUNS_ON: dict[Backend, Callable[[torch.device, int, torch.dtype], str | None]] = {
    Backend.TRITON: _why_not_triton,
    Backend.CPP: cpp.why_not,
    Backend.TORCH: _runs_anywhere,
    Backend.REFERENCE: _runs_anywhere,
}


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger("infctx_kernels").warning("the cpp backend cannot run, torch does instead: %s", reason)


def choose_backend(
    wanted: str | None, *, device: torch.device, head_size: int, dtype: torch.dtype = torch.float32
) -> Backend:
    """Pick the fastest backend that can run here, or the wanted one.

    Args:
        wanted: a backend's name, or None for the fastest.
        device: where the tensors are.
        head_size: N, the width of one head.
        dtype: of receptance, key and value.
    Raises:
        BackendError: the wanted backend does not exist or cannot run here; names the reason and the ones that can.
    """
    if wanted is None:
        # Triton's interpreter is slow, and has to be asked for.
        candidates = [backend for backend in FASTEST_FIRST if backend is not Backend.TRITON or device.type == "cuda"]
        chosen = next(backend for backend in candidates if RUNS_ON[backend](device, head_size, dtype) is None)
        if device.type == "cpu" and chosen is not Backend.CPP and (reason := library.why_not()) is not None:
            _say_once(reason)
        return chosen
    # Asked for at every call: the others are looked at, which may take importing Triton, only for an error.
    refusal = RUNS_ON[Backend(wanted)](device, head_size, dtype) if wanted in set(Backend) else None
    if wanted in set(Backend) and refusal is None:
        return Backend(wanted)
    names = ", ".join(backend for backend in FASTEST_FIRST if RUNS_ON[backend](device, head_size, dtype) is None)
    if refusal is None:
        raise BackendError(f"backend {wanted!r} does not exist. Usable on {device}: {names}.")
    raise BackendError(f"backend {wanted!r} cannot run on {device}: {refusal}. Usable here: {names}.")
