"""The files of a checkpoint's groups of tensors: GROUP.safetensors, or a part for each rank that owns some of it.

GROUP-00001-of-00003.safetensors ...   where three ranks own tensors of the group, in rank order
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from infctx.checkpoint.atomic import ManifestEntry
from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.errors import CheckpointError

_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FILE_NAME = re.compile(r"([a-z][a-z0-9_]*)(?:-(\d{5,})-of-(\d{5,}))?\.safetensors")


def name_files(names: Sequence[Mapping[str, Sequence[str]]]) -> list[dict[str, str]]:
    """Which file each rank writes of which group.

    Args: names: of the tensors that each rank owns, by group; no name twice in a group.
    Returns: for each rank, group -> file. A group that nobody owns anything of is rank 0's, so that it is there.
    """
    files: list[dict[str, str]] = [{} for _ in names]
    for group in sorted({group for owned in names for group in owned}):
        assert _GROUP_NAME.fullmatch(group), f"{group!r} does not make a file name"
        ranks = [rank for rank, owned in enumerate(names) if owned.get(group)] or [0]
        owned_by: dict[str, int] = {}
        for rank in ranks:
            for name in names[rank].get(group, ()):
                other = owned_by.setdefault(name, rank)
                assert other == rank, f"{group}: {name} is owned by rank {other} and by rank {rank}"
        for number, rank in enumerate(ranks, start=1):
            files[rank][group] = _file_name(group, number, len(ranks))
    return files


def write_groups(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], files: Mapping[str, str]
) -> dict[str, ManifestEntry]:
    """Write this rank's file of each group.

    Args: files: group -> file.
    Returns: for each file, its size and the SHA-256 of what was meant to be written: read it again to compare.
    Raises: OSError if the disk is full or fails.
    """
    written: dict[str, ManifestEntry] = {}
    for group, file in sorted(files.items()):
        digest = hashlib.sha256()
        write_safetensors(folder / file, tensors.get(group, {}), digest=digest)
        written[file] = {"bytes": (folder / file).stat().st_size, "sha256": digest.hexdigest()}
    return written


def read_groups(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every group of a checkpoint, whatever number of ranks wrote it; the tensors are mapped from its files.

    Raises: CheckpointError naming the file, if a part is missing or does not belong there, or a tensor is in two.
    """
    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _FILE_NAME.fullmatch(path.name)
        if not match:
            raise CheckpointError(f"{path}: damaged: not the name of a checkpoint's file. Remove that file.")
        found.setdefault(match[1], {})[path.name] = int(match[3] or 1)
    return {group: _read_group(folder, group, num_parts) for group, num_parts in found.items()}


def _read_group(folder: Path, group: str, num_parts: Mapping[str, int]) -> dict[str, Tensor]:
    """num_parts: file -> how many its name says there are."""
    total = max(num_parts.values())
    expected: list[str] = []
    for number in range(1, total + 1):
        expected.append(_file_name(group, number, total))
        if expected[-1] not in num_parts:
            raise CheckpointError(f"{folder}: damaged: {expected[-1]} is missing; {group} is in {total} parts.")
    stray = sorted(num_parts.keys() - set(expected))
    if stray:
        raise CheckpointError(f"{folder}: damaged: {stray[0]} is none of the {total} parts of {group}.")
    tensors: dict[str, Tensor] = {}
    file_of: dict[str, str] = {}
    for file in expected:
        for name, tensor in read_safetensors(folder / file)[0].items():
            if name in tensors:
                raise CheckpointError(f"{folder}: damaged: {name} is in {file_of[name]} and in {file}.")
            tensors[name], file_of[name] = tensor, file
    return tensors


def _file_name(group: str, number: int, total: int) -> str:
    return f"{group}.safetensors" if total == 1 else f"{group}-{number:05}-of-{total:05}.safetensors"
