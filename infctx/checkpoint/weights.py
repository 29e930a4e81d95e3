"""Model files in and out: .pth, .safetensors, folders of .safetensors shards, and GGUF (in)."""

import json
from pathlib import Path

from torch import Tensor

from infctx.checkpoint.gguf_reader import MAGIC as GGUF_MAGIC
from infctx.checkpoint.gguf_reader import read_gguf, tokenizer_of_vocabulary
from infctx.checkpoint.mapped_memory import streamed
from infctx.checkpoint.pth_reader import read_pth
from infctx.checkpoint.pth_writer import write_pth
from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from infctx.errors import CheckpointError
from infctx.model.tensors import StoredTensor

# Key of a file's metadata: which tokenizer the model's ids belong to.
TOKENIZER_KEY = "infctx.tokenizer"

__all__ = ["read_stored", "read_tensors", "write_pth", "write_safetensors"]

# The one file of a folder, and the index of its shards; the second pair is what older models come as.
_FOLDER_FILES = ((SINGLE_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_MAX_INDEX_BYTES = 64 << 20


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a model file, or a folder with model.safetensors or its shards, whatever the file is called.

    Returns: tensors by name, mapped from the file (see `read_pth`; quantised ones of a GGUF file in float32); the
    file's metadata as texts, {} for a .pth.
    Raises: CheckpointError naming the file, what was expected and what was found.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if _is_gguf(path):
        stored, metadata = _read_gguf(path, is_streamed=False)
        return {name: tensor.read() for name, tensor in stored.items()}, metadata
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".pth":
        return read_pth(path), {}
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04"):
        return read_pth(path), {}
    if start[8:] == b"{":
        return read_safetensors(path)
    raise CheckpointError(
        f"{path}: is neither a .pth nor a .safetensors nor a GGUF file (it starts with {start!r}). Give a model with "
        f"one of those suffixes, or a folder with {SINGLE_FILE} or {INDEX_FILE}."
    )


def read_stored(path: Path | str, *, is_streamed: bool = False) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """`read_tensors`, each tensor to be read when it is needed.

    Args: is_streamed: reading one gives a copy and leaves no memory behind.
    """
    path = Path(path)
    if path.is_file() and _is_gguf(path):
        return _read_gguf(path, is_streamed=is_streamed)
    tensors, metadata = read_tensors(path)
    wrap = streamed if is_streamed else StoredTensor.of
    return {name: wrap(tensor) for name, tensor in tensors.items()}, metadata


def _is_gguf(path: Path) -> bool:
    if path.suffix in (".gguf", ".pth", ".safetensors"):
        return path.suffix == ".gguf"
    try:
        with path.open("rb") as file:
            return file.read(4) == GGUF_MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}. Check model.path.") from error


def _read_gguf(path: Path, *, is_streamed: bool) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    tensors, values = read_gguf(path, is_streamed=is_streamed)
    metadata = {key: str(value) for key, value in values.items() if not isinstance(value, tuple)}
    tokenizer = tokenizer_of_vocabulary(values)
    if tokenizer is not None:
        metadata.setdefault(TOKENIZER_KEY, tokenizer)
    return tensors, metadata


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    for single, index in _FOLDER_FILES:
        if (folder / single).is_file():
            return read_tensors(folder / single)
        if (folder / index).is_file():
            return _read_shards(folder, index, suffix=Path(single).suffix)
    found = sorted(entry.name for entry in folder.iterdir())[:8]
    raise CheckpointError(
        f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE} in the folder, found {found or 'nothing'}. "
        "Give a model file or a folder that holds one."
    )


def _read_shards(folder: Path, index: str, *, suffix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    shard_of = _read_index(folder / index, suffix=suffix)
    for shard in sorted(set(shard_of.values())):
        found_tensors, found_metadata = read_tensors(folder / shard)
        wanted = {name for name, file in shard_of.items() if file == shard}
        wrong = sorted(found_tensors.keys() ^ wanted)
        if wrong:
            raise CheckpointError(
                f"{folder / shard}: tensor {wrong[0]!r} is in only one of this file and {index} "
                f"({len(wrong)} such). Fetch both again."
            )
        tensors.update(found_tensors)
        metadata.update(found_metadata)
    return tensors, metadata


def _read_index(path: Path, *, suffix: str) -> dict[str, str]:
    """Which shard each tensor is in."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {_MAX_INDEX_BYTES} bytes")
        shard_of = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(shard_of, dict) or not shard_of:
            raise ValueError("weight_map is not a table of names")
        for shard in shard_of.values():
            if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(suffix):
                raise ValueError(f"{str(shard)[:80]!r} is not the name of a {suffix} file in the same folder")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error)[:200]}. Fetch the file again.") from error
    return shard_of
