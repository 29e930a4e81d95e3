"""The formats, and what can be done with a path of any of them: list, scan, read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from infctx.data.sources import paths as listing
from infctx.data.sources.binidx import pair_of, read_binidx, scan_binidx
from infctx.data.sources.code import read_code, read_code_repository, scan_code_repository
from infctx.data.sources.delimited import read_delimited
from infctx.data.sources.files import stored_bytes
from infctx.data.sources.huggingface import read_huggingface, scan_huggingface
from infctx.data.sources.json_lines import read_json_lines
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.parquet import read_parquet
from infctx.data.sources.paths import format_of
from infctx.data.sources.plain_text import read_text
from infctx.data.sources.records import Record, Unit
from infctx.data.sources.scan import Scan, scan_file, scan_lines, scan_parquet
from infctx.errors import DataError

__all__ = [
    "FORMATS",
    "UNKNOWN_BYTES",
    "ReadOptions",
    "Reader",
    "Scan",
    "find_files",
    "format_of",
    "num_input_bytes",
    "read_unit",
    "scan",
    "whole",
]

UNKNOWN_BYTES = 2**62
"""The size of what has no known size: above any limit."""


_DEFAULT_OPTIONS = ReadOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A format.

    Attributes:
        read: gives the records of a unit.
        scan: of a path, the format's name and the size of units.
    """

    read: Callable[[Unit, ReadOptions, OnReject], Iterator[Record]]
    scan: Callable[[str, str, int], Scan] = scan_file


def _one_unit(scan_path: Callable[[str], tuple[str, int]]) -> Callable[[str, str, int], Scan]:
    """A scan of what is more than a file, as one unit."""

    def scan_as_one(path: str, format: str, unit_bytes: int) -> Scan:
        digest, num_bytes = scan_path(path)
        return Scan(digest=digest, num_bytes=num_bytes, units=[Unit(format=format, path=path)])

    return scan_as_one


FORMATS: dict[str, Reader] = {
    "jsonl": Reader(read=read_json_lines, scan=scan_lines),
    "text": Reader(read=read_text),
    "csv": Reader(read=read_delimited),
    "tsv": Reader(read=read_delimited),
    "parquet": Reader(read=read_parquet, scan=scan_parquet),
    "code": Reader(read=read_code),
    "code_repository": Reader(read=read_code_repository, scan=_one_unit(scan_code_repository)),
    "binidx": Reader(read=read_binidx, scan=_one_unit(scan_binidx)),
    "huggingface": Reader(read=read_huggingface, scan=_one_unit(scan_huggingface)),
}


def find_files(paths: Sequence[str], *, exclude: Sequence[str] = (), format: str = "auto") -> list[str]:
    """Turn what data.path says into a sorted list of paths without duplicates, to be read one by one.

    Args:
        paths: files and globs (`**` = any depth); URLs, with globs too, for what fsspec reaches. `{stdlib}` stands for
            the folder of Python's standard library, `{torch}` for that of the installed torch.
        exclude: patterns of files to leave out, matched against the whole path; their `*` crosses folders.
        format: a name of FORMATS, or auto = of each file by its name. Folders are for code (its files, each listed as
            "folder/./path in it"), code_repository and huggingface; for the latter also names of sets on the hub. A
            pair of binidx, named by either file or without an ending, is listed as its .idx.
    Raises: DataError for an unknown format, for a path that names no file, and where `exclude` leaves nothing.
    """
    if format != "auto":
        _reader(format)
    return listing.list_files(paths, exclude=exclude, format=format)


def scan(path: str, *, format: str, unit_bytes: int) -> Scan:
    """Read a path once, in bounded memory, for its hash and its units.

    Args:
        path: of those that `find_files` gives.
        format: a name of FORMATS, or auto.
        unit_bytes: of uncompressed JSON lines, a unit begins with the first line at or after each multiple of this; of
            Parquet, row groups are merged up to it. Everything else is one unit.
    Raises: DataError where it cannot be read, or changes meanwhile.
    """
    name = _format_name(path, format)
    return _reader(name).scan(path, name, unit_bytes)


def whole(path: str, *, format: str) -> Unit:
    """A path of those that `find_files` gives as one unit, without a look at it."""
    name = _format_name(path, format)
    _reader(name)
    return Unit(format=name, path=path)


def read_unit(unit: Unit, *, options: ReadOptions = _DEFAULT_OPTIONS, on_reject: OnReject) -> Iterator[Record]:
    """Read the records of a unit, in memory bounded by the largest of them.

    Args: on_reject: told of every unusable row; reading goes on with the next one when it returns.
    Raises: DataError where it cannot be opened or read to its end, changes meanwhile, or needs a package that is not
        installed.
    """
    return _reader(unit.format).read(unit, options, on_reject)


def num_input_bytes(files: Sequence[tuple[str, str]]) -> int:
    """The bytes of files and folders as stored, without reading them; UNKNOWN_BYTES where one does not tell.

    Args: files: path and format of each.
    """
    total = 0
    for path, format in files:
        is_on_hub = format == "huggingface" and not os.path.isdir(path)
        parts = pair_of(path) if format == "binidx" else (path,)
        for part in parts:
            size = None if is_on_hub else stored_bytes(part)
            if size is None:
                return UNKNOWN_BYTES
            total += size
    return total


def _format_name(path: str, format: str) -> str:
    return format_of(path) if format == "auto" else format


def _reader(format: str) -> Reader:
    if format not in FORMATS:
        raise DataError(f"data.format={format}: expected auto or one of {', '.join(FORMATS)}.")
    return FORMATS[format]
