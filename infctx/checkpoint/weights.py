"""Model files in and out: .pth, .safetensors, and folders of .safetensors shards."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from infctx.checkpoint.atomic import write_file_atomically
from infctx.checkpoint.pth_reader import read_pth
from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.errors import CheckpointError

__all__ = ["read_tensors", "write_pth", "write_safetensors"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a model file, or a folder with model.safetensors or its shards, whatever the file is called.

    Returns: tensors by name, mapped from the file (see `read_pth`); the file's metadata, {} for a .pth.
    Raises: CheckpointError naming the file, what was expected and what was found.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".pth":
        return read_pth(path), {}
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}. Check model.path.") from error
    if start.startswith(b"PK\x03\x04"):
        return read_pth(path), {}
    if start[8:] == b"{":
        return read_safetensors(path)
    raise CheckpointError(
        f"{path}: is neither a .pth nor a .safetensors file (it starts with {start!r}). Give a model with one of those "
        f"suffixes, or a folder with {_SINGLE} or {_INDEX}."
    )


def write_pth(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain dict of name -> tensor with torch.save, atomically, in the order given.

    Each tensor is written dense and by itself: no shared storage, no gradient, on the CPU.
    Raises: OSError if the disk is full or fails; an existing `path` is untouched then.
    """

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            sink = _Sink(file.write)
            try:
                torch.save(_separate(tensors), sink)
            except RuntimeError as error:
                # torch's writer turns "no space left" into its own complaint about a position.
                raise sink.error or error from error

    write_file_atomically(path, write)


class _Sink:
    """What torch.save writes into; remembers the error that torch hides."""

    def __init__(self, write_bytes: Callable[[bytes], int]) -> None:
        self._write_bytes = write_bytes
        self.error: OSError | None = None

    def write(self, block: bytes) -> int:
        try:
            return self._write_bytes(block)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Asked for by torch.save; closing the file flushes it."""


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own storage each, copied only where needed: torch.save writes a view's whole storage."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        storage = dense.untyped_storage()
        address = storage.data_ptr()
        if storage.nbytes() != dense.numel() * dense.element_size() or address in seen:
            dense = dense.clone()
        if address:
            seen.add(address)
        separate[name] = dense
    return separate


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if (folder / _SINGLE).is_file():
        return read_safetensors(folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        raise CheckpointError(
            f"{folder}: expected {_SINGLE} or {_INDEX} in the folder, found {found or 'nothing'}. "
            "Give a model file or a folder that holds one."
        )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    shard_of = _read_index(folder / _INDEX)
    for shard in sorted(set(shard_of.values())):
        found_tensors, found_metadata = read_safetensors(folder / shard)
        wanted = {name for name, file in shard_of.items() if file == shard}
        wrong = sorted(found_tensors.keys() ^ wanted)
        if wrong:
            raise CheckpointError(
                f"{folder / shard}: tensor {wrong[0]!r} is in only one of this file and {_INDEX} "
                f"({len(wrong)} such). Fetch both again."
            )
        tensors.update(found_tensors)
        metadata.update(found_metadata)
    return tensors, metadata


def _read_index(path: Path) -> dict[str, str]:
    """Which shard each tensor is in."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {_MAX_INDEX_BYTES} bytes")
        shard_of = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(shard_of, dict) or not shard_of:
            raise ValueError("weight_map is not a table of names")
        for shard in shard_of.values():
            if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
                raise ValueError(f"{str(shard)[:80]!r} is not the name of a .safetensors file in the same folder")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error)[:200]}. Fetch the file again.") from error
    return shard_of
