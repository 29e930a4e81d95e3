"""What can be said of a model's files without the model: their kind, layout, size and hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from infctx.checkpoint.layouts.catalog import layout_of
from infctx.checkpoint.weights import read_stored
from infctx.errors import CheckpointError


class FileFacts(NamedTuple):
    """kind: of the file, or "folder". layout: whose names the tensors have. num_bytes: of all files together."""

    kind: str
    layout: str
    num_bytes: int


def file_facts(path: Path) -> FileFacts:
    """Kind, layout and size of a model file or folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    tensors, _ = read_stored(path)
    return FileFacts(_kind(path), layout_of(tensors), sum(file.stat().st_size for file in _files(path)))


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 in hexadecimal of the file, or of each file of the folder, by name."""
    hashes = {}
    for file in _files(path):
        with file.open("rb") as opened:
            hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def _files(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return {b"PK\x03\x04": "pth", b"GGUF": "gguf"}.get(start, "safetensors")
