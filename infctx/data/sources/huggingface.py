"""Data sets of Hugging Face: saved by save_to_disk, a folder of data files, or by name from the hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from infctx.data.sources.files import hash_file, require_package, stored_bytes
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.records import Record, Unit
from infctx.errors import DataError, machine_fault

# One of them lies in every folder that save_to_disk wrote.
_SAVED_FILES = ("state.json", "dataset_dict.json")
_DEFAULT_SPLIT = ReadOptions().split


def read_huggingface(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read the rows of a split, one at a time.

    Raises: DataError for whatever keeps the set from being opened or read.
    """
    require_package("datasets", path=unit.path)
    rows = _saved_rows(unit.path, options) if _is_saved(unit.path) else _streamed_rows(unit.path, options)
    for line, fields in enumerate(rows, start=1):
        yield Record(fields=fields, file=unit.path, line=line)


def scan_huggingface(path: str) -> tuple[str, int]:
    """Give a SHA-256 that changes with the contents of any split, and the bytes of a local folder (0 of the hub).

    Raises: DataError where the hub does not tell which commit of the set it has.
    """
    if not os.path.isdir(path):
        return _commit_digest(path), 0
    contents = _fingerprints(path) if _is_saved(path) else _file_hashes(path)
    return hashlib.sha256(repr(contents).encode("utf-8", "surrogateescape")).hexdigest(), stored_bytes(path) or 0


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in _SAVED_FILES)


def _load_saved(path: str) -> Any:
    require_package("datasets", path=path)
    import datasets

    try:
        return datasets.load_from_disk(path)
    except Exception as error:
        raise _cannot_load(path, error) from error


def _saved_rows(path: str, options: ReadOptions) -> Iterable[Mapping[str, object]]:
    saved = _load_saved(path)
    if options.subset is not None:
        raise DataError(f"{path}: data.subset={options.subset}: a saved set has no subsets. Leave data.subset out.")
    if isinstance(saved, dict):
        if options.split not in saved:
            raise DataError(f"{path}: data.split={options.split}: expected one of {sorted(saved)}.")
        saved = saved[options.split]
    elif options.split not in (_DEFAULT_SPLIT, str(saved.split)):
        raise DataError(f"{path}: data.split={options.split}: the saved set has no splits. Leave data.split out.")
    return _rows_of(saved, path)


def _streamed_rows(path: str, options: ReadOptions) -> Iterable[Mapping[str, object]]:
    import datasets

    try:
        streamed = datasets.load_dataset(path, name=options.subset, split=options.split, streaming=True)
    except Exception as error:
        raise _cannot_load(path, error) from error
    return _rows_of(streamed, path)


def _rows_of(rows: Iterable[Mapping[str, object]], path: str) -> Iterator[Mapping[str, object]]:
    """The rows, with every failure as a DataError."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:
            raise _cannot_load(path, error) from error
        if row is None:
            return
        yield row


def _cannot_load(path: str, error: Exception) -> Exception:
    """The error to raise: the package fails with those of a dozen others."""
    if machine_fault(error):
        return error
    where = "" if os.path.exists(path) else " and that this machine reaches the hub, or save the set to a folder"
    return DataError(
        f"{path}: expected a Hugging Face data set, got {type(error).__name__}: {error}. "
        f"Check its name, data.subset and data.split{where}."
    )


def _fingerprints(path: str) -> list[tuple[str, str]]:
    saved = _load_saved(path)
    splits = sorted(saved.items()) if isinstance(saved, dict) else [("", saved)]
    return [(name, split._fingerprint) for name, split in splits]


def _file_hashes(path: str) -> list[tuple[str, str]]:
    names = sorted(os.path.join(parent, name) for parent, _, found in os.walk(path) for name in found)
    return [(os.path.relpath(name, path), hash_file(name)[0]) for name in names]


def _commit_digest(name: str) -> str:
    require_package("datasets", path=name)
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(name).sha
    except Exception as error:
        if machine_fault(error):
            raise
        raise DataError(
            f"{name}: a cache needs the commit of the set, and the hub did not give it ({type(error).__name__}: "
            f"{error}). Save the set to a folder, or set data.cache to memory."
        ) from error
    if not commit:
        raise DataError(
            f"{name}: a cache needs the commit of the set, and the hub gave none. Set data.cache to memory."
        )
    return hashlib.sha256(commit.encode()).hexdigest()
