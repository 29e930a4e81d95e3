"""What is the machine's fault, and what is not."""

from __future__ import annotations

import errno

import pytest
import torch

from infctx.errors import machine_fault


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_disks(number: int) -> None:
    fault = machine_fault(OSError(number, "what it says", "/a/file"))
    assert fault == "The disk failed: what it says (/a/file)."


def test_memory() -> None:
    assert "Out of memory" in machine_fault(MemoryError())
    assert "Out of memory" in machine_fault(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert "Out of memory" in machine_fault(raised.value)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), FileNotFoundError(errno.ENOENT, "no", "f")])
def test_other_errors_are_not(error: Exception) -> None:
    assert machine_fault(error) is None
