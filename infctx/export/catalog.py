"""Format name -> how it is written. A new format adds a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from infctx.checkpoint.atomic import replace_directory
from infctx.checkpoint.model_file import tensors_of
from infctx.checkpoint.shards import INDEX_FILE, SHARD_PATTERN, SINGLE_FILE
from infctx.errors import CheckpointError
from infctx.export.fla import prepare_fla, write_fla
from infctx.export.gguf import as_read_back, prepare_gguf, write_prepared_gguf
from infctx.export.hugging_face import prepare_hugging_face, write_hugging_face
from infctx.export.official import (
    prepare_pth,
    prepare_safetensors,
    write_official_pth,
    write_official_safetensors,
)
from infctx.export.options import ExportDtype, ExportOptions
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors


class Format(NamedTuple):
    """prepare: source -> the tensors that will be in the file, in official form. write: those into a path, which is a
    folder that exists where the format has folders; returns sentences for the user. read_back: what those tensors are
    read as, where the file does not hold their values."""

    prepare: Callable[[ModelTensors, ExportOptions], ModelTensors]
    write: Callable[[ModelTensors, Path, ExportOptions], list[str]]
    has_folder: bool = False
    read_back: Callable[[ModelTensors, ExportOptions], ModelTensors] = lambda source, options: source


FORMATS = {
    "pth": Format(prepare_pth, write_official_pth),
    "safetensors": Format(prepare_safetensors, write_official_safetensors),
    "hf": Format(prepare_hugging_face, write_hugging_face, has_folder=True),
    "fla": Format(prepare_fla, write_fla, has_folder=True),
    "gguf": Format(prepare_gguf, write_prepared_gguf, read_back=as_read_back),
}
_SUFFIXES = {".pth": "pth", ".safetensors": "safetensors", ".gguf": "gguf"}
# What an export leaves in a folder: nothing else is ever replaced.
_OWN_FILES = (
    *(SINGLE_FILE, INDEX_FILE, SHARD_PATTERN),
    *("config.json", "generation_config.json", "tokenizer_config.json", "rwkv_vocab_v20230424.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
    *("configuration_rwkv*.py", "modeling_rwkv*.py", "hf_rwkv_tokenizer.py", "__pycache__"),
)


def save_model(
    model: Finch,
    path: str | Path,
    *,
    format: str = "pth",
    dtype: ExportDtype = torch.bfloat16,
    tokenizer: str | None = None,
) -> None:
    """Write a model, whole or not at all; an existing output of the same kind is replaced.

    Args:
        path: a file, for hf and fla a folder; for safetensors either.
        format: a name of FORMATS.
        dtype: of every tensor in the file.
        tokenizer: its name, recorded where the format has a place for it.
    Raises:
        CheckpointError: an unknown format, something the format cannot hold, or the folder above does not exist.
        OSError: the disk is full or fails.
    """
    path = Path(path)
    check_output(path, format=format, force=True)
    options = ExportOptions(dtype=dtype)
    write_prepared(FORMATS[format].prepare(tensors_of(model, tokenizer=tokenizer), options), path, format, options)


def write_prepared(source: ModelTensors, path: Path, format: str, options: ExportOptions) -> list[str]:
    """Write what `prepare` returned, whole or not at all; returns sentences for the user."""
    chosen = FORMATS[format]
    if not is_folder_output(path, format=format):
        return chosen.write(source, path, options)
    notes: list[str] = []
    replace_directory(path, lambda folder: notes.extend(chosen.write(source, folder, options)), overwrite=True)
    return notes


def is_folder_output(path: Path, *, format: str) -> bool:
    """Whether the export becomes a folder: safetensors is one where the name does not end in .safetensors."""
    return FORMATS[format].has_folder or (format == "safetensors" and path.suffix != ".safetensors")


def format_of(path: Path, format: str | None) -> str:
    """The format that was asked for, or the one the output's name ends in.

    Raises: CheckpointError if neither says it.
    """
    if format is not None:
        return format
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(
            f"{path}: its name says no format; expected it to end in {', '.join(_SUFFIXES)}. "
            f"Give --format, one of {', '.join(FORMATS)}."
        )
    return _SUFFIXES[path.suffix]


def check_output(path: Path, *, format: str, force: bool) -> None:
    """Refuse a format that does not exist and an output that does, before any work is done.

    Raises:
        CheckpointError: an unknown format, an output that exists without force, a folder with files no export wrote, or
        a folder above that does not exist.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format {format!r}: expected one of {', '.join(FORMATS)}.")
    if _SUFFIXES.get(path.suffix, format) != format:
        raise CheckpointError(
            f"{path}: a name that ends in {path.suffix} is expected to hold that format, not {format}. "
            f"Give format {path.suffix[1:]}, or another name."
        )
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    if path.is_dir():
        _check_folder(path, format=format, force=force)
    elif path.exists() and (not force or FORMATS[format].has_folder):
        raise CheckpointError(f"{path}: exists. Give another path, or --force to replace a file.")


def _check_folder(path: Path, *, format: str, force: bool) -> None:
    if not is_folder_output(path, format=format):
        raise CheckpointError(f"{path}: exists and is a folder; {format} is one file. Give another path.")
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _OWN_FILES)]
    if foreign:
        raise CheckpointError(
            f"{path}: exists and holds {foreign[0]!r}, which no export wrote; a folder is replaced as a whole. "
            "Give another path."
        )
    if names and not force:
        raise CheckpointError(f"{path}: exists. Give another path, or --force to replace the folder.")
