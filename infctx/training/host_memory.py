"""Memory of the host: the most that was used, and what was freed and is not given back."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable

import torch

# Often enough that little gathers; seldom enough that taking the pages anew is not seen in the time.
EVERY_SECONDS = 10.0


class HeapTrimmer:
    """Gives back to the system, from time to time, what the allocator keeps between the temporaries of the chunks.

    glibc hands out tensors of up to 32 MB from a heap with holes that no two chunks fill in the same way: over a
    thousand chunks a process of 600 MB grows by a quarter, though nothing is held. On other systems, and where the
    tensors are on a GPU, it does nothing.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._trim = _malloc_trim() if device.type == "cpu" else None
        self._clock = clock
        self._trimmed_at = clock()

    def tick(self) -> bool:
        """Trim if it is time; returns whether it did."""
        if self._trim is None or self._clock() - self._trimmed_at < EVERY_SECONDS:
            return False
        self._trim(0)
        self._trimmed_at = self._clock()
        return True


def trim_heap() -> None:
    """Give back what is free of the heap, where the system's allocator can."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    return trim


def peak_host_bytes() -> int:
    """The most that the process has had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
