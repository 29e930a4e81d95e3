"""Write .pth files as torch.save does, one tensor in memory at a time.

torch.save wants every tensor at once. The file is a plain zip: a pickled table of names, shapes and storage keys, then
the numbers of each storage. Source of the format: torch/serialization.py.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch._utils
from torch import Tensor

from infctx.checkpoint.atomic import write_file_atomically
from infctx.checkpoint.raw_bytes import raw_bytes
from infctx.errors import CheckpointError
from infctx.model.tensors import StoredTensor

# torch aligns every record's numbers to this, so that a file can be mapped.
_ALIGNMENT = 64
# Extra fields of a zip entry: torch's padding, and what zipfile adds for an entry above its 32-bit limit.
_PADDING_ID = 0x4246
_ZIP64_BYTES = 20
_FOLDER = "archive"
_VERSION = b"3\n"

_STORAGE_CLASSES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class _Storage(NamedTuple):
    """Stands for the numbers of one tensor in the pickled table."""

    dtype: torch.dtype
    key: str
    num_elements: int


class _Entry:
    """Stands for one tensor in the pickled table."""

    def __init__(self, tensor: StoredTensor, key: str) -> None:
        strides = torch.empty(tensor.shape, device="meta").stride()
        storage = _Storage(tensor.dtype, key, tensor.num_elements)
        self.arguments = (storage, 0, tensor.shape, strides, False, OrderedDict())


class _TablePickler(pickle.Pickler):
    """Writes each entry as the call by which torch.load makes a tensor, each storage as its reference."""

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        if not isinstance(value, _Storage):
            return None
        return ("storage", _STORAGE_CLASSES[value.dtype], value.key, "cpu", value.num_elements)

    def reducer_override(self, value: object) -> object:
        if isinstance(value, _Entry):
            return (torch._utils._rebuild_tensor_v2, value.arguments)
        return NotImplemented


def write_pth(path: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
    """Write a dict of name -> tensor, atomically, in the order given, as torch.save would.

    Each tensor is written dense and by itself: no shared storage, no gradient.
    Raises: CheckpointError for a dtype the format cannot hold. OSError if the disk is full or fails; an existing `path`
    is untouched then.
    """
    stored = {name: x if isinstance(x, StoredTensor) else StoredTensor.of(x.detach()) for name, x in tensors.items()}
    for name, tensor in stored.items():
        if tensor.dtype not in _STORAGE_CLASSES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORAGE_CLASSES)
            raise CheckpointError(f"{path}: cannot hold tensor {name!r} of {tensor.dtype}; expected one of {known}.")
    table = io.BytesIO()
    pickler = _TablePickler(table, protocol=2)
    pickler.dump({name: _Entry(tensor, str(key)) for key, (name, tensor) in enumerate(stored.items())})

    def write(unfinished: Path) -> None:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, "data.pkl", table.getbuffer())
            _add(archive, "byteorder", memoryview(b"little"))
            for key, tensor in enumerate(stored.values()):
                _add(archive, f"data/{key}", raw_bytes(tensor.read()))
            _add(archive, "version", memoryview(_VERSION))

    write_file_atomically(path, write)


def _add(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    entry = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    entry.file_size = len(content)
    header = 30 + len(entry.filename) + 4
    if entry.file_size * 1.05 > zipfile.ZIP64_LIMIT:
        header += _ZIP64_BYTES
    assert archive.fp is not None
    padding = -(archive.fp.tell() + header) % _ALIGNMENT
    entry.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    with archive.open(entry, "w") as file:
        file.write(content)
