"""Format name -> the function that writes it. A new format adds a file and a line here."""

from __future__ import annotations

from pathlib import Path

import torch

from infctx.errors import CheckpointError
from infctx.export.official import write_official_pth, write_official_safetensors
from infctx.model.finch import Finch

WRITERS = {"pth": write_official_pth, "safetensors": write_official_safetensors}


def save_model(
    model: Finch,
    path: str | Path,
    *,
    format: str = "pth",
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str | None = None,
) -> None:
    """Write a model, whole or not at all; an existing file is replaced.

    Args:
        format: a name of WRITERS.
        dtype: of every tensor in the file.
        tokenizer: its name, recorded where the format has a place for it.
    Raises:
        CheckpointError: an unknown format, or the folder does not exist. OSError: the disk is full or fails.
    """
    path = Path(path)
    check_output(path, format=format, force=True)
    WRITERS[format](model, path, dtype=dtype, tokenizer=tokenizer)


def check_output(path: Path, *, format: str, force: bool) -> None:
    """Refuse a format that does not exist and an output that does, before any work is done.

    Raises:
        CheckpointError: an unknown format, an output that exists without force, or a folder that does not exist.
    """
    if format not in WRITERS:
        raise CheckpointError(f"format {format!r}: expected one of {', '.join(WRITERS)}.")
    if path.suffix.lstrip(".") in WRITERS and path.suffix != f".{format}":
        raise CheckpointError(
            f"{path}: a name that ends in {path.suffix} is expected to hold that format, not {format}. "
            f"Give format {path.suffix[1:]}, or another name."
        )
    if path.is_dir() or (path.exists() and not force):
        raise CheckpointError(f"{path}: exists. Give another path, or --force to replace a file.")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist. Create it first.")
