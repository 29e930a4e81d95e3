"""Which implementation runs: one pure function decides, and says why another cannot."""

from __future__ import annotations

import functools
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

    CPP = "cpp"
    TORCH = "torch"
    REFERENCE = "reference"


FASTEST_FIRST = (Backend.CPP, Backend.TORCH, Backend.REFERENCE)


def _runs_anywhere(device: torch.device, head_size: int, dtype: torch.dtype) -> str | None:
    return None


# For each backend: the reason why it cannot run on this device with this head size and input dtype, or None.
RUNS_ON: dict[Backend, Callable[[torch.device, int, torch.dtype], str | None]] = {
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
    refusals = {backend: RUNS_ON[backend](device, head_size, dtype) for backend in FASTEST_FIRST}
    usable = [backend for backend in FASTEST_FIRST if refusals[backend] is None]
    if wanted is None:
        if device.type == "cpu" and usable[0] is not Backend.CPP and (reason := library.why_not()) is not None:
            _say_once(reason)
        return usable[0]
    names = ", ".join(usable)
    if wanted not in set(Backend):
        raise BackendError(f"backend {wanted!r} does not exist. Usable on {device}: {names}.")
    backend = Backend(wanted)
    if refusals[backend] is not None:
        raise BackendError(f"backend {wanted!r} cannot run on {device}: {refusals[backend]}. Usable here: {names}.")
    return backend
