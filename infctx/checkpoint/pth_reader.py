"""Read the .pth files of torch.save without torch.load: no code of the file runs, and the tensors stay on disk.

Source of the format: torch/serialization.py. A zip file with the records `NAME/data.pkl` (the table of tensors),
`NAME/data/KEY` (the numbers of each storage) and, since torch 2.1, `NAME/byteorder`.
"""

import mmap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from infctx.checkpoint.mapped_memory import map_file
from infctx.checkpoint.tensor_pickle import StorageReference, TensorRecord, read_tensor_pickle
from infctx.checkpoint.zip_entries import ZipEntry, list_zip_entries, skip_local_header
from infctx.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20
MAX_DIMENSIONS = 16
_LARGEST_INT = 2**62


def read_pth(path: Path | str) -> dict[str, Tensor]:
    """Read a flat dict of name -> tensor written by torch.save (torch >= 1.6).

    Returns: the tensors in the file's order, mapped from it: a page is read when first touched. Changing a tensor
    changes memory only, never the file. Tensors that shared a storage still do.
    Raises: CheckpointError for anything but a whole file of dense tensors.
    """
    path = Path(path)
    data = map_file(path, expected="a .pth file")
    _check_magic(data, path)
    try:
        entries = list_zip_entries(data, path)
    except CheckpointError as error:
        expected = _expected_bytes(data, path)
        if expected is None or expected <= len(data):
            raise
        raise CheckpointError(
            f"{path}: truncated: expected more than {expected} bytes, found {len(data)}. Fetch the file again."
        ) from error
    folder, pickle_entry = _find_pickle(entries, path)
    order = entries.get(f"{folder}/byteorder")
    if order is not None and data[order.start : order.start + min(order.size, 16)] != b"little":
        found = data[order.start : order.start + min(order.size, 16)]
        raise CheckpointError(
            f"{path}: byte order {found!r}; expected b'little'. Save the file again on a little-endian machine."
        )
    if pickle_entry.size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: refused: its data.pkl has {pickle_entry.size} bytes; at most {MAX_PICKLE_BYTES} are read. "
            "Expected a flat dict of name -> tensor."
        )
    pickled = data[pickle_entry.start : pickle_entry.start + pickle_entry.size]
    records = _check_table(read_tensor_pickle(pickled, path), path)
    storages = _Storages(data=data, entries=entries, folder=folder, path=path)
    return {name: storages.build(name, record) for name, record in records.items()}


def _check_magic(data: mmap.mmap, path: Path) -> None:
    if data[:4] == b"PK\x03\x04":
        return
    if data[:1] == b"\x80" or data[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: written in the format of torch before 1.6, which cannot be read without running its code. "
            "If you trust it, load it with an old torch and save it again with torch >= 1.6."
        )
    raise CheckpointError(
        f"{path}: not a .pth file, or damaged: it starts with {data[:4]!r}; expected b'PK\\x03\\x04'. "
        "Give a .pth written by torch.save, or a .safetensors file."
    )


def _expected_bytes(data: mmap.mmap, path: Path) -> int | None:
    """How many bytes the storages of a cut-off file would take: its first record is the table of tensors."""
    start = skip_local_header(data, 0)
    if start is None or b"/data.pkl" not in data[:start]:
        return None
    try:
        table = read_tensor_pickle(data[start : start + MAX_PICKLE_BYTES], path)
    except CheckpointError:
        return None
    if not isinstance(table, dict):
        return None
    records = [record for record in table.values() if isinstance(record, TensorRecord)]
    storages = [record.storage for record in records if isinstance(record.storage, StorageReference)]
    sizes = {storage.key: storage.num_elements * storage.dtype.itemsize for storage in storages}
    return sum(sizes.values())


def _find_pickle(entries: dict[str, ZipEntry], path: Path) -> tuple[str, ZipEntry]:
    found = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CheckpointError(
            f"{path}: not a .pth file: expected one record NAME/data.pkl, found {len(found)} among {len(entries)} "
            "records. Give a file written by torch.save."
        )
    return found[0].removesuffix("/data.pkl"), entries[found[0]]


def _check_table(table: object, path: Path) -> dict[str, TensorRecord]:
    """Accept a flat dict of name -> tensor; say what the file holds instead."""
    if not isinstance(table, dict):
        kind = "a single tensor" if isinstance(table, TensorRecord) else f"a {type(table).__name__}"
        raise CheckpointError(
            f"{path}: expected a dict of name -> tensor, found {kind}. Save the model's state_dict()."
        )
    if "_strategy" in table or "_version" in table:
        raise CheckpointError(
            f"{path}: this is a file converted by the rwkv package (its weights are rescaled and transposed for one "
            "device); use the original .pth."
        )
    for name, value in table.items():
        if isinstance(value, TensorRecord):
            continue
        kind = type(value).__name__
        if isinstance(value, dict):
            inside = ", ".join(repr(str(key)[:80]) for key in list(value)[:5])
            kind += f" with the keys {inside}{', ...' if len(value) > 5 else ''}" if value else " without keys"
        keys = ", ".join(repr(key[:80]) for key in list(table)[:5]) + (", ..." if len(table) > 5 else "")
        raise CheckpointError(
            f"{path}: key {name[:80]!r} holds a {kind}; expected a tensor under every key (found the keys {keys}). "
            "Save the tensors alone, as a flat dict of name -> tensor."
        )
    return table


@dataclass(frozen=True, kw_only=True, slots=True)
class _Storages:
    """The storages of one mapped file; each is wrapped once, so tensors that shared one still do."""

    data: mmap.mmap
    entries: dict[str, ZipEntry]
    folder: str
    path: Path
    opened: dict[StorageReference, Tensor] = field(default_factory=dict)

    def build(self, name: str, record: TensorRecord) -> Tensor:
        """The tensor that `record` describes, after checking every number of it against its storage."""
        storage, offset, size, stride = record.storage, record.offset, record.size, record.stride
        if not isinstance(storage, StorageReference):
            raise self._refusal(name, f"storage of type {type(storage).__name__}")
        if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
            raise self._refusal(name, "size and stride are not two tuples of one length")
        numbers = (offset, *size, *stride)
        if len(size) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < _LARGEST_INT for n in numbers):
            raise self._refusal(name, f"expected at most {MAX_DIMENSIONS} dimensions, none negative or huge")
        flat = self._open(name, storage)
        if 0 in size:
            return self._empty(name, size, storage.dtype)
        assert isinstance(offset, int)
        last = offset
        span = 1
        for step, length in sorted((step, length) for length, step in zip(size, stride, strict=True) if length > 1):
            if step < span:
                raise self._refusal(name, f"size {size} with stride {stride}: elements overlap (an expanded view)")
            span = step * (length - 1) + span
            last += step * (length - 1)
        if last >= storage.num_elements:
            raise self._refusal(
                name, f"reaches element {last} of a storage that has {storage.num_elements} (size {size})"
            )
        return flat.as_strided(size, stride, offset)

    def _empty(self, name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(size, dtype=dtype)
        except RuntimeError as error:
            raise self._refusal(name, f"size {size}") from error

    def _open(self, name: str, storage: StorageReference) -> Tensor:
        if storage in self.opened:
            return self.opened[storage]
        entry = self.entries.get(f"{self.folder}/data/{storage.key}")
        if entry is None:
            raise self._refusal(name, f"its record {f'data/{storage.key[:80]}'!r} is missing")
        num_bytes = storage.num_elements * storage.dtype.itemsize
        if num_bytes != entry.size:
            raise self._refusal(name, f"expected {num_bytes} bytes of numbers, found {entry.size}")
        if num_bytes == 0:
            flat = torch.empty(0, dtype=storage.dtype)
        elif entry.start % storage.dtype.itemsize:
            # torch.save aligns its records; a file zipped again may not, and kernels expect aligned numbers.
            copy = bytearray(self.data[entry.start : entry.start + num_bytes])
            flat = torch.frombuffer(copy, dtype=storage.dtype)
        else:
            flat = torch.frombuffer(self.data, dtype=storage.dtype, count=storage.num_elements, offset=entry.start)
        self.opened[storage] = flat
        return flat

    def _refusal(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: tensor {name[:80]!r} is damaged or not dense: {what[:300]}. "
            "Fetch the file again, or save its tensors again with .contiguous()."
        )
