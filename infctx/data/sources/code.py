"""Source code: a document for each file, or one for each folder (repository)."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from infctx.data.sources.files import BYTE_ORDER_MARK, cannot_open, hash_file, not_utf8, open_bytes
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.patterns import filled_patterns, is_excluded
from infctx.data.sources.records import Record, Rejection, Unit

_SNIFFED_BYTES = 8192
_SKIPPED_FOLDERS = ("node_modules", "__pycache__")
# Lies in every virtual environment of Python.
_ENVIRONMENT_FILE = "pyvenv.cfg"


def list_code(folder: str) -> list[str]:
    """List the files of a folder by their sorted paths in it.

    Left out are hidden folders, node_modules, __pycache__, virtual environments of Python, and links: what they point
    to either has a name of its own here or lies elsewhere.
    Raises: DataError for a folder that cannot be read.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not _is_skipped(parent, name)]
        for name in names:
            path = os.path.join(parent, name)
            try:
                is_file = stat.S_ISREG(os.lstat(path).st_mode)
            except OSError as error:
                raise cannot_open(path, error) from error
            if is_file:
                found.append(Path(path).relative_to(folder).as_posix())
    return sorted(found)


def _raise_unreadable(error: OSError) -> None:
    raise cannot_open(str(error.filename), error) from error


def _is_skipped(parent: str, name: str) -> bool:
    is_environment = os.path.exists(os.path.join(parent, name, _ENVIRONMENT_FILE))
    return name.startswith(".") or name in _SKIPPED_FOLDERS or is_environment


def read_code(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read one file into the fields text, path and repository.

    A path "folder/./path" gives path and the name of folder; any other, the file's name and that of its folder. A file
    with a NUL byte near its beginning is binary and gives nothing, like an empty one.
    """
    folder, marker, path = unit.path.rpartition("/./")
    if not marker:
        folder, path = os.path.split(unit.path)
    try:
        text = _read_source(unit.path)
    except UnicodeDecodeError as error:
        on_reject(Rejection(file=unit.path, line=1, reason=not_utf8(error, "file")))
        return
    if text:
        fields = {"text": text, "path": path, "repository": _name_of(folder)}
        yield Record(fields=fields, file=unit.path, line=1)


def read_code_repository(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read a folder into one record with the fields text and repository.

    Its files follow each other sorted by path, each as a line "# path", the contents, and a newline. Binary files are
    left out. A file that is not UTF-8 is rejected; the reason names it.
    """
    pieces = []
    patterns = filled_patterns(options.exclude)
    for name in list_code(unit.path):
        path = os.path.join(unit.path, name)
        if is_excluded(path, patterns):
            continue
        try:
            name.encode("utf-8")
            text = _read_source(path)
        except UnicodeDecodeError as error:
            on_reject(Rejection(file=unit.path, line=1, reason=f"{name}: {not_utf8(error, 'file')}"))
            continue
        except UnicodeEncodeError:
            on_reject(Rejection(file=unit.path, line=1, reason=f"{name!a}: the name of the file is not valid UTF-8"))
            continue
        if text is not None:
            pieces.append(f"# {name}\n{text}\n")
    if pieces:
        fields = {"text": "".join(pieces), "repository": _name_of(unit.path)}
        yield Record(fields=fields, file=unit.path, line=1)


def scan_code_repository(path: str) -> tuple[str, int]:
    """Give the SHA-256 of the paths and contents of a folder's files, and the bytes of all contents."""
    digest, num_bytes = hashlib.sha256(), 0
    for name in list_code(path):
        found, size = hash_file(os.path.join(path, name))
        # A size apart from each name: no two folders then give the same bytes.
        digest.update(f"{len(name)} {name} {found}".encode("utf-8", "surrogateescape"))
        num_bytes += size
    return digest.hexdigest(), num_bytes


def _name_of(folder: str) -> str:
    return Path(folder).resolve().name


def _read_source(path: str) -> str | None:
    """The text of a file; None for a binary one."""
    with open_bytes(path, decompress=False) as file:
        head = file.read(_SNIFFED_BYTES)
        if b"\0" in head:
            return None
        content = head + file.read()
    return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
