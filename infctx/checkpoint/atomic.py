"""Files and folders that exist whole or not at all, and the manifest that proves a folder whole."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from infctx.checkpoint.run_lock import is_process_alive
from infctx.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
MANIFEST_SCHEMA = 1

ManifestEntry = dict[str, int | str]
"""A file's "bytes" and "sha256"."""

_UNFINISHED = re.compile(r"\.tmp-(\d+)-.+|\..+\.tmp-(\d+)")


class OtherSchemaError(CheckpointError):
    """Sound, but written by another infctx, newer or older: no other checkpoint must quietly take its place."""


def write_file_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then put it in the place of `path`.

    Raises: whatever `write` or the disk raises; then the temporary file is gone and an existing `path` is untouched.
    """
    unfinished = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        write(unfinished)
        _fsync(unfinished)
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    fsync_directory(path.parent)


def replace_directory(final: Path, build: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Let `build` fill a temporary folder beside `final`, flush all of it to the disk, then rename it to `final`.

    Args: overwrite: set an existing `final` aside just before the rename, and remove it after.
    Raises: CheckpointError if `final` exists and overwrite is not set; whatever `build` or the disk raises, with the
    temporary folder gone and an existing `final` as it was.
    """
    if os.path.lexists(final) and not overwrite:
        raise CheckpointError(f"{final}: exists already; expected no such folder. Move it away or give another name.")
    # A name of its own: a process of an earlier attempt that still writes, perhaps on another machine, finds its folder
    # gone. It will not write into this one.
    unfinished = final.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{final.name}"
    try:
        unfinished.mkdir()
        build(unfinished)
        _fsync_tree(unfinished)
        set_aside(final)
        os.rename(unfinished, final)
    except BaseException:
        # What a full or failing disk refuses to remove goes with the next save; the first error is the one to show.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    fsync_directory(final.parent)


def set_aside(path: Path) -> None:
    """Remove a folder, if it is there, so that a crash halfway leaves no half of it under its own name."""
    if os.path.lexists(path):
        removed = path.parent / f".tmp-{os.getpid()}-removed-{path.name}"
        remove_tree(removed)
        os.rename(path, removed)
        remove_tree(removed)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half written in a folder; what another live process is writing stays."""
    for path in folder.iterdir():
        match = _UNFINISHED.fullmatch(path.name)
        if match:
            pid = int(match[1] or match[2])
            if pid == os.getpid() or not is_process_alive(pid):
                remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_directory(folder: Path) -> None:
    """Flush the names in a folder to the disk: without it a rename can be lost with the power."""
    _fsync(folder)


def write_manifest(folder: Path, known: Mapping[str, ManifestEntry] | None = None) -> None:
    """Write MANIFEST.json with the size and SHA-256 of every file in `folder`, after flushing those files.

    Args: known: the entries of files whose writers gave them; these are not read here.
    Raises: CheckpointError if one of those is not there.
    """
    known = known or {}
    paths = _list_files(folder)
    unseen = sorted(known.keys() - paths.keys())
    if unseen:
        raise CheckpointError(f"{folder}: {unseen[0]} is missing; it had just been written.")
    for path in paths.values():
        _fsync(path)
    files = {
        name: known[name] if name in known else {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for name, path in paths.items()
    }
    text = json.dumps({"schema": MANIFEST_SCHEMA, "files": files}, indent=1, sort_keys=True) + "\n"
    write_file_atomically(folder / MANIFEST_NAME, lambda path: _write_text(path, text))


def verify_manifest(folder: Path, *, hashed: Collection[str] | None = None) -> None:
    """Read every file of `folder` again and compare it with MANIFEST.json.

    Args: hashed: the files whose hash is compared; of the others only the size is. None = all.
    Raises: CheckpointError naming the folder, the file, and the expected and found size or hash; also for files that
    are missing or that the manifest does not list. OtherSchemaError if a newer infctx wrote the manifest.
    """
    expected = read_manifest(folder)
    found = _list_files(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{folder}: damaged: {name} is missing; {MANIFEST_NAME} lists it.")
        if name not in expected:
            raise CheckpointError(f"{folder}: damaged: {name} is not in {MANIFEST_NAME}. Remove that file.")
        verify_file(folder, name, expected[name], is_hashed=hashed is None or name in hashed)


def verify_file(folder: Path, name: str, expected: ManifestEntry, *, is_hashed: bool = True) -> None:
    """Read one file again and compare it with its entry.

    Raises: CheckpointError naming the folder, the file, and the expected and found size or hash.
    """
    path = folder / name
    found_bytes = path.stat().st_size
    if found_bytes != expected["bytes"]:
        raise CheckpointError(f"{folder}: damaged: {name} has {found_bytes} bytes; expected {expected['bytes']}.")
    if is_hashed and (found_sha256 := _sha256(path)) != expected["sha256"]:
        raise CheckpointError(f"{folder}: damaged: {name} has SHA-256 {found_sha256}; expected {expected['sha256']}.")


def read_manifest(folder: Path) -> dict[str, ManifestEntry]:
    """The entry of every file that MANIFEST.json lists.

    Raises: CheckpointError naming the folder, if there is none or it is damaged; OtherSchemaError if a newer infctx
    wrote it.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: damaged or unfinished: it has no {MANIFEST_NAME}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: damaged: {MANIFEST_NAME} is not JSON ({str(error)[:100]!r}).") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is int and schema > MANIFEST_SCHEMA:
        raise OtherSchemaError(
            f"{path}: has schema {schema}; this infctx reads up to {MANIFEST_SCHEMA}. Use the infctx that wrote it."
        )
    files = manifest.get("files") if schema == MANIFEST_SCHEMA else None
    if not isinstance(files, dict):
        raise CheckpointError(
            f'{folder}: damaged: {MANIFEST_NAME} is not {{"schema": {MANIFEST_SCHEMA}, "files": ...}}.'
        )
    for name, facts in files.items():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or type(facts.get("sha256")) is not str:
            raise CheckpointError(f"{folder}: damaged: {MANIFEST_NAME} gives no size and SHA-256 for {name[:80]!r}.")
    return files


def _list_files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` but the manifest, by its name relative to it, sorted."""
    listed = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{folder}: {name} is a link or a device; expected files and folders only.")
        if path.is_file() and name != MANIFEST_NAME:
            listed[name] = path
    return listed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)
