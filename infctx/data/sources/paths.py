"""What data.path may say: files, globs, URLs, pairs of .bin and .idx, folders; listed as sorted paths."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from infctx.data.sources.code import list_code
from infctx.data.sources.files import COMPRESSED_ENDINGS, cannot_open, is_url
from infctx.data.sources.patterns import fill_in, filled_patterns, is_excluded
from infctx.errors import DataError, machine_fault

_FORMAT_OF_ENDING = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".idx": "binidx",
    ".bin": "binidx",
}
_LOCAL_FORMATS = ("binidx", "code", "code_repository")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def format_of(path: str) -> str:
    """Name the format of a file by its ending, looking through `.gz` and `.zst`; what is not known is text."""
    name = _first_part_of_url(path) if is_url(path) else path
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED_ENDINGS:
        ending = os.path.splitext(stem)[1]
    return _FORMAT_OF_ENDING.get(ending, "text")


def _first_part_of_url(url: str) -> str:
    """The file that a URL names, without what it lies in (`zip://name::URL`) and without an HTTP query."""
    part = next(part for part in url.split("::") if "://" in part)
    return re.split("[?#]", part)[0] if part.startswith(("http://", "https://")) else part


def list_files(paths: Sequence[str], *, exclude: Sequence[str], format: str) -> list[str]:
    """See `catalog.find_files`. format: a name that the catalog knows, or auto."""
    if not paths:
        raise DataError("data.path: expected at least one file or glob, got none.")
    found: dict[str, str] = {}
    for path in paths:
        for file in _files_of(path, format):
            found.setdefault(_identity(file, format), file)
    patterns = filled_patterns(exclude)
    kept = [file for file in found.values() if not is_excluded(file, patterns)]
    if not kept:
        raise DataError(
            f"data.exclude={list(exclude)}: leaves none of the {len(found)} files of data.path={list(paths)}. "
            "Make a pattern narrower."
        )
    return sorted(kept)


def _identity(file: str, format: str) -> str:
    is_name = is_url(file) or (format == "huggingface" and not Path(file).exists())
    return file if is_name else str(Path(file).resolve())


def _files_of(path: str, format: str) -> list[str]:
    if format == "huggingface":
        return [_huggingface_set(path)]
    files = _url_files(path, format) if is_url(path) else _local_files(path, format)
    if format in ("auto", "binidx"):
        files = [_index_file(file) if "binidx" in (format, format_of(file)) else file for file in files]
    return files


def _local_files(path: str, format: str) -> list[str]:
    filled = os.path.expanduser(fill_in(path))
    is_pair = format == "binidx" and not os.path.exists(filled) and os.path.isfile(f"{filled}.idx")
    name = str(Path(f"{filled}.idx" if is_pair else filled))
    # Before globbing, since a file's real name may contain [ or *.
    is_literal = os.path.exists(name)
    if is_literal:
        _check_kind(path, format, is_folder=os.path.isdir(name))
    matches = [name] if is_literal else glob.glob(name, recursive=True)
    folders = {match.rstrip("/") for match in matches if os.path.isdir(match)}
    outermost = [match for match in matches if not _lies_in(match.rstrip("/"), folders)]
    if format == "code_repository":
        files = [match.rstrip("/") for match in outermost if os.path.isdir(match)]
    elif format == "code":
        files = [file for match in outermost for file in _code_files(match)]
    else:
        files = [match for match in matches if os.path.isfile(match)]
    if files:
        return files
    if is_literal and folders:
        raise DataError(f"data.path={path}: expected a folder with files of source code, got one without.")
    wanted = "folder" if format == "code_repository" else "file"
    raise DataError(f"data.path={path}: no such {wanted}, and nothing matches it as a glob (from {Path.cwd()}).")


def _check_kind(path: str, format: str, *, is_folder: bool) -> None:
    if is_folder and not format.startswith("code"):
        raise _is_a_folder(path)
    if not is_folder and format == "code_repository":
        raise DataError(
            f"data.path={path}: data.format=code_repository expected a folder, got a file. "
            "data.format=code reads single files."
        )


def _lies_in(path: str, folders: set[str]) -> bool:
    return any(str(parent) in folders for parent in Path(path).parents)


def _code_files(path: str) -> list[str]:
    """The files of a folder, each as "folder/./path in it" so that its reader can tell the two apart."""
    if os.path.isfile(path):
        return [path]
    return [f"{path.rstrip('/')}/./{name}" for name in list_code(path)] if os.path.isdir(path) else []


def _is_a_folder(path: str) -> DataError:
    return DataError(
        f"data.path={path}: expected a file or a glob, got a folder. For example: {path.rstrip('/')}/**/*.jsonl. "
        "To read a folder of source code set data.format to code or code_repository; for a saved Hugging Face data "
        "set, to huggingface."
    )


def _index_file(file: str) -> str:
    """The .idx of a pair that is named by either file."""
    if is_url(file):
        raise DataError(f"data.path={file}: expected local .bin and .idx files, got a URL. Download the pair.")
    stem, ending = os.path.splitext(file)
    if ending not in (".idx", ".bin"):
        raise DataError(f"data.path={file}: data.format=binidx expected a .bin or .idx file.")
    if not os.path.isfile(f"{stem}.idx"):
        raise DataError(f"data.path={file}: expected its index {stem}.idx beside it, and there is none.")
    return f"{stem}.idx"


def _huggingface_set(path: str) -> str:
    filled = Path(fill_in(path)).expanduser()
    if filled.is_dir():
        return str(filled)
    if filled.exists() or not _HUB_NAME.fullmatch(path):
        raise DataError(
            f"data.path={path}: data.format=huggingface expected a folder or the name of a set on the hub (org/name)"
            + (", got a file. Its own data.format reads it." if filled.exists() else "; there is no such folder.")
        )
    return path


def _url_files(url: str, format: str) -> list[str]:
    if format in _LOCAL_FORMATS:
        raise DataError(f"data.path={url}: data.format={format} expected a local path, got a URL. Download it.")
    import fsspec.core

    try:
        store, path = fsspec.core.url_to_fs(url)
        if store.isfile(path):
            return [url]
        is_folder = store.isdir(path)
        matches = [match for match, facts in store.glob(path, detail=True).items() if facts["type"] == "file"]
    # Stores fail with errors of the packages that they are reached through.
    except Exception as error:
        if machine_fault(error):
            raise
        raise cannot_open(f"data.path={url}", error) from error
    if is_folder:
        raise _is_a_folder(url)
    if not matches:
        raise DataError(f"data.path={url}: no such file, and nothing matches it as a glob.")
    return [_with_path(url, match) for match in matches]


def _with_path(url: str, path: str) -> str:
    """The URL with another path in its first part that has one: a glob in `zip://*.csv::URL` is about the archive."""
    parts = url.split("::")
    place = next(place for place, part in enumerate(parts) if "://" in part)
    parts[place] = path if is_url(path) else f"{parts[place].split('://')[0]}://{path}"
    return "::".join(parts)
