"""World's vocabulary with new tokens, as a file for the programs that read one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from infctx.checkpoint.atomic import write_file_atomically
from infctx.data.tokenizer import Tokenizer, WorldTokenizer, world_lines
from infctx.errors import CheckpointError, DataError
from infctx.surgery.vocabulary import vocabulary_text


def check_vocabulary_file(path: Path, *, tokenizer: Tokenizer, force: bool) -> None:
    """Refuse, before any work is done, what cannot be written.

    Raises:
        DataError: the tokenizer is not World, whose form of file this is. CheckpointError: the file exists and force is
            not given, or its folder does not exist.
    """
    if not isinstance(tokenizer, WorldTokenizer):
        raise DataError(f"{path}: expected the tokenizer world to write a vocabulary of, got {tokenizer.name}.")
    if path.is_dir() or (path.exists() and not force):
        raise CheckpointError(f"{path}: exists. Give another path, or --force to replace a file.")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist. Create it first.")


def write_vocabulary_file(path: Path, ids: Mapping[str, int]) -> None:
    """Write World's tokens and the new ones, by their ids.

    Raises:
        OSError: the disk is full or fails.
    """
    text = vocabulary_text(world_lines(), ids)
    write_file_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", newline="\n") and None)
