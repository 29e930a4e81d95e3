"""Read and write .safetensors files.

The safetensors library judges a header, after it has been checked for messages a person can use. Mapping is ours: torch
cannot map a file larger than the memory. Writing is ours: the library's does not name a full disk as such, copies each
tensor, and orders the metadata at random.
Source of the format: the README of huggingface/safetensors.
"""

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infctx.checkpoint.atomic import write_file_atomically
from infctx.checkpoint.mapped_memory import map_file
from infctx.checkpoint.raw_bytes import raw_bytes
from infctx.errors import CheckpointError
from infctx.model.tensors import StoredTensor

MAX_HEADER_BYTES = 32 << 20

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read one file; the tensors are mapped from it, and changing one never changes the file.

    Returns: tensors by name, metadata.
    Raises: CheckpointError naming the file.
    """
    header, start = _check_header(path)
    try:
        with safe_open(path, framework="np") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error)[:300]}. Fetch or write the file again.") from error
    data = map_file(path, expected="a .safetensors file")
    return {name: _tensor(name, header[name], data, start, path) for name in names}, metadata


def _tensor(name: str, facts: dict[str, Any], data: mmap.mmap, start: int, path: Path) -> Tensor:
    """One tensor of a file whose header the library has accepted: offsets, sizes and types agree."""
    if facts["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name}: its type {facts['dtype']} is none of {', '.join(_DTYPES)}.")
    dtype, (begin, end) = _DTYPES[facts["dtype"]], facts["data_offsets"]
    if begin == end:
        return torch.empty(facts["shape"], dtype=dtype)
    if (start + begin) % dtype.itemsize:
        # Other writers may not pad; kernels expect aligned numbers.
        flat = torch.frombuffer(bytearray(data[start + begin : start + end]), dtype=dtype)
    else:
        flat = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
    return flat.view(facts["shape"])


class Digest(Protocol):
    """One of hashlib's."""

    def update(self, data: bytes | memoryview, /) -> None: ...


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor | StoredTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    digest: Digest | None = None,
) -> None:
    """Write tensors and metadata, atomically; the same input gives the same bytes. Stored tensors are read one by one.

    Args: tensors: on any device and with any strides; those that share memory are written each by itself. digest: is
    fed all that the file shall hold, from memory, so that reading the file again shows whether it does.
    Raises: OSError if the disk is full or fails; an existing `path` is untouched then.
    """
    for name, tensor in tensors.items():
        is_sparse = isinstance(tensor, Tensor) and tensor.layout != torch.strided
        if tensor.dtype not in _DTYPE_NAMES or is_sparse or name == "__metadata__":
            raise CheckpointError(
                f"{path}: cannot hold tensor {name!r} ({tensor.dtype}{', sparse' if is_sparse else ''}); expected a "
                f"dense tensor of one of {', '.join(_DTYPE_NAMES.values())}, not called __metadata__. "
                "Convert or rename it."
            )
    stored = {name: x if isinstance(x, StoredTensor) else StoredTensor.of(x) for name, x in tensors.items()}
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    names = sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        tensor = stored[name]
        end = offset + tensor.num_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield raw_bytes(stored[name].read())

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            for block in blocks():
                file.write(block)
                if digest is not None:
                    digest.update(block)

    write_file_atomically(path, write)


def _check_header(path: Path) -> tuple[dict[str, Any], int]:
    """Catch what the library accepts or reports without a reason: cut-off files, huge headers, names given twice.

    Returns: the header, and where the numbers begin.
    """
    try:
        found_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if found_bytes < 8 or header_bytes > found_bytes - 8:
                raise CheckpointError(
                    f"{path}: truncated or not a .safetensors file: expected {8 + header_bytes} bytes of header, the "
                    f"file has {found_bytes}. Fetch the file again."
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: refused: a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read. "
                    "No model file needs more."
                )
            header = json.loads(file.read(header_bytes).decode("utf-8"), object_pairs_hook=_refuse_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not a table")
        ends = [row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"]
        expected_bytes = 8 + header_bytes + int(max(ends, default=0))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}. Check the path.") from error
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a .safetensors file: its header cannot be read ({str(error)[:160]!r}). "
            "Fetch the file again."
        ) from error
    if expected_bytes != found_bytes:
        raise CheckpointError(
            f"{path}: truncated or damaged: expected {expected_bytes} bytes, found {found_bytes}. Fetch the file again."
        )
    return header, 8 + header_bytes


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice")
    return table
