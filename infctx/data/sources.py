"""Paths and globs to raw records, each with its file and line; bad rows are handed to the caller."""

import fnmatch
import glob
import importlib.util
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infctx.errors import DataError

_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row of a file before any template: its fields by name, and its place (line counted from 1)."""

    fields: Mapping[str, object]
    file: str
    line: int

    @property
    def origin(self) -> str:
        """The place as "file:line"."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A row that is not usable, and why. `line` counts from 1 and is 1 for a plain-text file."""

    file: str
    line: int
    reason: str


def expand_paths(paths: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Turn files and globs into a sorted list of files without duplicates.

    Args:
        paths: files or globs (`**` = any depth). `{stdlib}` stands for the folder of Python's standard library,
            `{torch}` for that of the installed torch.
        exclude: patterns of files to leave out, matched against the whole path; their `*` crosses folders.
    Raises: DataError for a path that names no file, for a folder, and where `exclude` leaves nothing.
    """
    if not paths:
        raise DataError("data.path: expected at least one file or glob, got none.")
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _files_of(path):
            found.setdefault(file.resolve(), file)
    patterns = [_fill_in(pattern) for pattern in exclude]
    kept = [file for file in found.values() if not _is_excluded(file, patterns)]
    if not kept:
        raise DataError(
            f"data.exclude={list(exclude)}: leaves none of the {len(found)} files of data.path={list(paths)}. "
            "Make a pattern narrower."
        )
    return sorted(kept, key=lambda file: file.as_posix())


def _fill_in(path: str) -> str:
    if "{stdlib}" in path:
        path = path.replace("{stdlib}", Path(sysconfig.get_path("stdlib")).as_posix())
    if "{torch}" in path:
        # Found without being imported, which takes seconds.
        torch = importlib.util.find_spec("torch")
        assert torch is not None
        assert torch.origin is not None
        path = path.replace("{torch}", Path(torch.origin).parent.as_posix())
    return path


def _files_of(path: str) -> list[Path]:
    filled = Path(_fill_in(path)).expanduser()
    # Before globbing, since a file's real name may contain [ or *.
    if filled.is_file():
        return [filled]
    if filled.is_dir():
        raise DataError(f"data.path={path}: expected a file or a glob, got a folder. For example: {path}/**/*.jsonl")
    files = [Path(match) for match in glob.glob(str(filled), recursive=True) if Path(match).is_file()]
    if not files:
        raise DataError(f"data.path={path}: no such file, and nothing matches it as a glob (from {Path.cwd()}).")
    return files


def _is_excluded(file: Path, patterns: Sequence[str]) -> bool:
    names = {file.as_posix(), file.absolute().as_posix()}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def read_records(path: Path, *, on_reject: Callable[[Rejection], None]) -> Iterator[Record]:
    """Read the records of one file: `.jsonl` = one JSON object a line, anything else = one plain-text document.

    Args: on_reject: told of every unusable row; reading goes on with the next one when it returns.
    Raises: DataError where the file cannot be opened.
    """
    reader = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_text
    return reader(path, on_reject)


def _read_text(path: Path, on_reject: Callable[[Rejection], None]) -> Iterator[Record]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        on_reject(Rejection(file=str(path), line=1, reason=_not_utf8(error, "file")))
        return
    yield Record(fields={"text": text.removeprefix(_BYTE_ORDER_MARK)}, file=str(path), line=1)


def _read_jsonl(path: Path, on_reject: Callable[[Rejection], None]) -> Iterator[Record]:
    try:
        lines = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error
    # Bytes, not text: an invalid byte then costs its own line only, and no other character can end a line.
    with lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = _parse_line(line, is_first=number == 1)
            except _BadRowError as error:
                on_reject(Rejection(file=str(path), line=number, reason=str(error)))
                continue
            if fields is not None:
                yield Record(fields=fields, file=str(path), line=number)


class _BadRowError(Exception):
    pass


def _parse_line(line: bytes, *, is_first: bool) -> Mapping[str, object] | None:
    """The object on the line; None for a blank line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRowError(_not_utf8(error, "line")) from None
    if is_first:
        text = text.removeprefix(_BYTE_ORDER_MARK)
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRowError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise _BadRowError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise _BadRowError("JSON nested too deeply to read") from None
    if not isinstance(row, dict):
        raise _BadRowError(f"expected a JSON object, got {_JSON_NAMES[type(row)]}")
    return row


_JSON_NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"} | {
    type(None): "null"
}


def _not_utf8(error: UnicodeDecodeError, whole: str) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02X} at byte offset {error.start} of the {whole}"


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: expected a readable file, got: {error.strerror}. Check the path and its permissions.")
