"""The .pth writer: what torch.load and zip tools make of its files, and what it keeps in memory."""

from __future__ import annotations

import gc
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.weights import read_tensors, write_pth
from infctx.errors import CheckpointError
from infctx.model.tensors import StoredTensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def some_tensors() -> dict[str, Tensor]:
    tensors = {f"t{i}": (torch.randn(3, i + 1) * 10).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {"z.first": torch.randn(5), **tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("limit", [None, 40])
def test_torch_reads_the_same_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mapped: bool, limit: int | None
) -> None:
    if limit is not None:  # Entries larger than this get the headers of files above 4 GB.
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    tensors = some_tensors()
    write_pth(tmp_path / "x.pth", tensors)
    found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=is_mapped)
    ours = read_tensors(tmp_path / "x.pth")[0]
    assert list(found) == list(ours) == list(tensors)
    for name, tensor in tensors.items():
        for read in (found[name], ours[name]):
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read, tensor), name


@pytest.mark.parametrize("limit", [None, 40])
def test_numbers_are_aligned_and_checksums_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    if limit is not None:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path = tmp_path / "x.pth"
    write_pth(path, some_tensors())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
    assert [entry.filename for entry in entries][:2] == ["archive/data.pkl", "archive/byteorder"]
    assert len(entries) == 3 + len(some_tensors())
    for entry in entries:
        name_bytes, extra_bytes = (
            int.from_bytes(content[entry.header_offset + at : entry.header_offset + at + 2], "little")
            for at in (26, 28)
        )
        assert (entry.header_offset + 30 + name_bytes + extra_bytes) % 64 == 0, entry.filename


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read() -> Tensor:
        gc.collect()
        assert [reference for reference in alive if reference() is not None] == []
        tensor = torch.randn(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    stored = {f"t{i}": StoredTensor((1000,), torch.float32, read) for i in range(4)}
    write_pth(tmp_path / "x.pth", stored)
    assert len(alive) == 4
    assert len(torch.load(tmp_path / "x.pth", weights_only=True)) == 4


def test_a_dtype_of_no_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a'.*complex64.*float32"):
        write_pth(tmp_path / "x.pth", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
