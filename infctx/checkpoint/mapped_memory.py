"""Memory of mapped files, given back as soon as a tensor has been passed on.

Pages of a mapped file count as used memory until the system wants them back. A conversion that touches every page of a
28 GB file once would look, and under a memory limit be treated, as if it needed 28 GB.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

from infctx.model.tensors import StoredTensor

# Linux's advice that a range is not needed soon. Unlike MADV_DONTNEED it loses nothing: changed pages stay.
_MADV_PAGEOUT = 21


def streamed(tensor: Tensor) -> StoredTensor:
    """A mapped tensor that is copied out of its file each time it is read, and leaves no pages behind."""

    def read() -> Tensor:
        copy = tensor.clone()
        release_pages(tensor)
        return copy

    return StoredTensor(tuple(tensor.shape), tensor.dtype, read)


def release_pages(tensor: Tensor) -> None:
    """Let the system take back the whole pages of a tensor; its values stay what they are. Linux only, else nothing."""
    if not sys.platform.startswith("linux") or not tensor.numel():
        return
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if tensor.is_contiguous() and length > 0:
        # An old kernel refuses the advice; the pages then stay until somebody needs the memory.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_PAGEOUT)
