"""A prepared cache: a set tokenised once, in parallel processes, and mapped into memory from then on.

A cache is a folder named by everything that its tokens follow from: the contents of the files, how they are read, the
template, the tokenizer, the rules for rows. Another content or template is another name, so a stale cache is never
found. Work is done in units of some megabytes; each is kept in a folder of its own as soon as it is done, so that a
killed preparation goes on where it was. The documents do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.prepare_parts import ACCOUNT_FILE, jobs_of, run_jobs, sync_folder
from infctx.data.reading import Reading, read_rows
from infctx.data.rows import Account
from infctx.data.scan_memory import scan_files, stamp_of
from infctx.data.sources.catalog import Scan, scan
from infctx.data.sources.records import Rejection, Unit
from infctx.data.token_store import StoreBuilder, TokenStore, merge, open_store, repeated, without, write_facts
from infctx.errors import DataError

UNIT_BYTES = 2**23
DUPLICATE = "the same as an earlier row"

OnProgress = Callable[[int, int], None]
"""Told the input bytes done so far, and of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A set of documents and what was left out of it.

    Attributes:
        num_duplicates: documents that had occurred before, left out or not.
        folder: of the cache; None = in memory.
    """

    store: TokenStore
    account: Account
    num_duplicates: int
    folder: Path | None = None


def read_in_memory(units: Sequence[Unit], reading: Reading) -> Prepared:
    """Read a small set without a cache. units: one for each file."""
    builder, account = StoreBuilder(reading.id_type), Account()
    for number, unit in enumerate(units):
        account.add(read_rows(unit, reading, builder, file_number=number))
    store = builder.finish()
    places = repeated(store.index["digest"])
    if reading.drops_duplicates and len(places):
        for file, line in _places_in_files(store, places):
            account.rejected.append(Rejection(file=units[file].path, line=line, reason=DUPLICATE))
        account.dropped["duplicate"] += _num_tokens(store, places)
        store = without(store, places)
    return Prepared(store=store, account=account, num_duplicates=len(places))


def prepare(
    files: Sequence[tuple[str, str]],
    reading: Reading,
    *,
    cache: Path,
    workers: int,
    on_progress: OnProgress = lambda done, total: None,
) -> Prepared:
    """Open the cache of a set, after making it where there is none.

    Args:
        files: path and format of each.
        cache: the folder of all caches; made where it is missing.
        workers: processes at once.
    Raises:
        DataError: see RowReader.read; also where a file changes while it is read.
        MachineError: a worker was killed; what it had finished is kept.
    """
    cache.mkdir(parents=True, exist_ok=True)
    scans = scan_files(files, cache, unit_bytes=UNIT_BYTES)
    key = _key(files, scans, reading)
    folder = cache / key
    with _locked(cache / f"{key}.lock"):
        if not folder.is_dir():
            _make(folder, files, scans, reading, workers=workers, on_progress=on_progress)
        return _open(folder, [path for path, _ in files])


def _key(files: Sequence[tuple[str, str]], scans: Sequence[Scan], reading: Reading) -> str:
    # Of code, the path is part of the text.
    contents = [
        [kind, found.digest, path if kind.startswith("code") else ""]
        for (path, kind), found in zip(files, scans, strict=True)
    ]
    text = json.dumps({**reading.key(), "files": contents, "unit_bytes": UNIT_BYTES}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# Making a cache


def _make(
    folder: Path,
    files: Sequence[tuple[str, str]],
    scans: Sequence[Scan],
    reading: Reading,
    *,
    workers: int,
    on_progress: OnProgress,
) -> None:
    stamps = [stamp_of(path, kind) for path, kind in files]
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    jobs = jobs_of(scans, unfinished, unit_bytes=UNIT_BYTES)
    missing = [job for job in jobs if not job.part.is_dir()]
    total = sum(job.num_bytes for job in jobs)
    done = total - sum(job.num_bytes for job in missing)
    on_progress(done, total)
    for job in run_jobs(missing, reading, workers=min(workers, len(missing))):
        done += job.num_bytes
        on_progress(done, total)
    for (path, kind), found, stamp in zip(files, scans, stamps, strict=True):
        if stamp_of(path, kind) != stamp and scan(path, format=kind, unit_bytes=UNIT_BYTES).digest != found.digest:
            shutil.rmtree(unfinished)
            raise DataError(f"{path}: the file changed while it was being prepared. Start again when it rests.")
    _finish(folder, [job.part for job in jobs], unfinished, reading)


def _finish(folder: Path, parts: Sequence[Path], unfinished: Path, reading: Reading) -> None:
    """All parts as one folder under its name."""
    rejected: list[Any] = []
    dropped: Counter[str] = Counter()

    def opened() -> Iterator[TokenStore]:
        for part in parts:
            account = json.loads((part / ACCOUNT_FILE).read_text(encoding="utf-8"))
            rejected.extend(account["rejected"])
            dropped.update(account["dropped"])
            for folder in sorted(path for path in part.iterdir() if path.is_dir()):
                yield open_store(folder)[0]

    whole, sparse = unfinished / "whole", unfinished / "sparse"
    for path in (whole, sparse):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    store = merge(opened(), whole)
    places = repeated(store.index["digest"])
    if reading.drops_duplicates and len(places):
        rejected += [[file, line, DUPLICATE] for file, line in _places_in_files(store, places)]
        dropped["duplicate"] += _num_tokens(store, places)
        without(store, places, sparse)
        whole = sparse
    facts = {"rejected": rejected, "dropped": dict(dropped), "num_duplicates": len(places)}
    write_facts(whole, {**facts, "id_type": store.tokens.dtype.str})
    sync_folder(whole)
    os.replace(whole, folder)
    shutil.rmtree(unfinished, ignore_errors=True)


def _places_in_files(store: TokenStore, places: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """File number and line of each document."""
    entries = store.index[places]
    return list(zip(entries["file"].tolist(), entries["line"].tolist(), strict=True))


def _num_tokens(store: TokenStore, places: npt.NDArray[np.int64]) -> int:
    return int((store.index["end"][places] - store.index["begin"][places]).sum())


def _open(folder: Path, names: Sequence[str]) -> Prepared:
    try:
        store, facts = open_store(folder)
        rejected = [Rejection(file=names[file], line=line, reason=reason) for file, line, reason in facts["rejected"]]
        account = Account(rejected=rejected, dropped=Counter(facts["dropped"]))
        return Prepared(store=store, account=account, num_duplicates=facts["num_duplicates"], folder=folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: this cache of prepared data is damaged ({error}). Delete the folder.") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process prepares the same set."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
