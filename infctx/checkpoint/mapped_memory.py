"""Files mapped into memory, which is given back as soon as a tensor has been passed on.

Pages of a mapped file count as used memory until the system wants them back. A conversion that touches every page of a
28 GB file once would look, and under a memory limit be treated, as if it needed 28 GB.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import stat
import sys
from pathlib import Path

from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.tensors import StoredTensor

# Linux's advice that a range is not needed soon. Unlike MADV_DONTNEED it loses nothing: changed pages stay.
_MADV_PAGEOUT = 21
# Without it the kernel refuses a file larger than its memory, since all of it might be changed. Named in Python 3.13;
# the number is that of x86 and Arm.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)


def map_file(path: Path, *, expected: str) -> mmap.mmap:
    """Map a whole file; changing the memory never changes the file.

    Args: expected: what it should be, for the message.
    Raises: CheckpointError if it cannot be read, is empty, or is no regular file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise CheckpointError(f"{path}: is {kind}; expected {expected}.")
        if status.st_size == 0:
            raise CheckpointError(f"{path}: truncated: the file is empty (0 bytes). Fetch the file again.")
        with path.open("rb") as file:
            if not sys.platform.startswith("linux"):
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}. Check the path.") from error


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
