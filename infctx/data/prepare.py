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
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.rows import Account, RowReader, RowRules
from infctx.data.scan_memory import scan_files, stamp_of
from infctx.data.sources.catalog import ReadOptions, Scan, read_unit, scan
from infctx.data.sources.records import Rejection, Unit
from infctx.data.templates import Template
from infctx.data.token_store import StoreBuilder, TokenStore, merge, open_store, repeated, without, write_facts
from infctx.data.tokenizer import tokenizer_by_name
from infctx.errors import DataError, MachineError

# Raised whenever the same input would give other tokens, or files another layout.
FORMAT = 1
UNIT_BYTES = 2**25
DUPLICATE = "the same as an earlier row"

OnProgress = Callable[[int, int], None]
"""Told the input bytes done so far, and of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the files of a set become documents; what a worker needs to know.

    Attributes:
        format: of every file, or None = each by its name.
        drops_duplicates: whether a document that has occurred before is left out.
    """

    template: Template
    rules: RowRules
    tokenizer: str
    vocab_size: int | None = None
    options: ReadOptions = field(default_factory=ReadOptions)
    drops_duplicates: bool = False

    @property
    def id_type(self) -> np.dtype[Any]:
        """Of the stored ids."""
        num_ids = max(tokenizer_by_name(self.tokenizer).vocab_size, self.vocab_size or 0)
        return np.dtype(np.uint16 if num_ids <= 2**16 else np.int32)

    def key(self) -> dict[str, Any]:
        """Everything here that changes tokens."""
        return {
            "format": FORMAT,
            "template": self.template.key(),
            "rules": asdict(self.rules),
            "tokenizer": tokenizer_by_name(self.tokenizer).digest,
            "vocab_size": self.vocab_size,
            "options": asdict(self.options),
            "drops_duplicates": self.drops_duplicates,
        }


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
        account.add(_read(unit, reading, builder, file_number=number))
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """Units, each with the number of its file, whose documents go into one folder."""

    units: list[tuple[int, Unit]]
    part: Path
    num_bytes: int


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
    jobs = _jobs(scans, unfinished)
    missing = [job for job in jobs if not job.part.is_dir()]
    total = sum(job.num_bytes for job in jobs)
    done = total - sum(job.num_bytes for job in missing)
    on_progress(done, total)
    for job in _run_jobs(missing, reading, workers=min(workers, len(missing))):
        done += job.num_bytes
        on_progress(done, total)
    for (path, kind), found, stamp in zip(files, scans, stamps, strict=True):
        if stamp_of(path, kind) != stamp and scan(path, format=kind, unit_bytes=UNIT_BYTES).digest != found.digest:
            shutil.rmtree(unfinished)
            raise DataError(f"{path}: the file changed while it was being prepared. Start again when it rests.")
    _finish(folder, [job.part for job in jobs], unfinished, reading)


def _jobs(scans: Sequence[Scan], folder: Path) -> list[_Job]:
    """The units in their order, small ones together."""
    jobs: list[_Job] = []
    units: list[tuple[int, Unit]] = []
    num_bytes = 0
    for number, found in enumerate(scans):
        for unit in found.units:
            units.append((number, unit))
            num_bytes += found.num_bytes // len(found.units)
            if num_bytes >= UNIT_BYTES // 2:
                jobs.append(_Job(units=units, part=folder / f"part-{len(jobs):06d}", num_bytes=num_bytes))
                units, num_bytes = [], 0
    if units:
        jobs.append(_Job(units=units, part=folder / f"part-{len(jobs):06d}", num_bytes=num_bytes))
    return jobs


def _finish(folder: Path, parts: Sequence[Path], unfinished: Path, reading: Reading) -> None:
    """All parts as one folder under its name."""
    rejected: list[Any] = []
    dropped: Counter[str] = Counter()

    def opened() -> Iterator[TokenStore]:
        for part in parts:
            store, facts = open_store(part)
            rejected.extend(facts["rejected"])
            dropped.update(facts["dropped"])
            yield store

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
    _sync(whole)
    os.replace(whole, folder)
    shutil.rmtree(unfinished, ignore_errors=True)


def _places_in_files(store: TokenStore, places: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """File number and line of each document."""
    entries = store.index[places]
    return list(zip(entries["file"].tolist(), entries["line"].tolist(), strict=True))


def _num_tokens(store: TokenStore, places: npt.NDArray[np.int64]) -> int:
    return int((store.index["end"][places] - store.index["begin"][places]).sum())


def _run_jobs(jobs: Sequence[_Job], reading: Reading, *, workers: int) -> Iterator[_Job]:
    """Do the jobs in any order; gives each when it is done."""
    if workers <= 1:
        for job in jobs:
            _build_part(job, reading)
            yield job
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker)
    waiting: dict[Future[None], _Job] = {}
    try:
        ahead = iter(jobs)
        while True:
            # A few more than there are processes, so that none waits for work.
            for job in itertools.islice(ahead, workers + 2 - len(waiting)):
                waiting[pool.submit(_build_part, job, reading)] = job
            if not waiting:
                break
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            # Of several mistakes, the one that comes first in the data.
            for future in sorted(finished, key=lambda future: waiting[future].part):
                future.result()
                yield waiting.pop(future)
    except BrokenProcessPool as error:
        raise MachineError(
            "A process that prepared data was killed, most likely for memory. What was finished is kept: start again, "
            "with a smaller data.workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave interrupts to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _build_part(job: _Job, reading: Reading) -> None:
    """Tokenise the units of a job into its folder."""
    builder = StoreBuilder(reading.id_type)
    rejected: list[tuple[int, int, str]] = []
    dropped: Counter[str] = Counter()
    for number, unit in job.units:
        account = _read(unit, reading, builder, file_number=number)
        rejected += [(number, row.line, row.reason) for row in account.rejected]
        dropped.update(account.dropped)
    unfinished = job.part.with_name(f"{job.part.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    builder.finish().save(unfinished, {"rejected": rejected, "dropped": dict(dropped)})
    _sync(unfinished)
    os.replace(unfinished, job.part)


def _read(unit: Unit, reading: Reading, builder: StoreBuilder, *, file_number: int) -> Account:
    reader = RowReader(
        reading.template,
        tokenizer_by_name(reading.tokenizer),
        reading.rules,
        builder,
        file_number=file_number,
        vocab_size=reading.vocab_size,
    )
    reader.read(read_unit(unit, options=reading.options, on_reject=reader.reject))
    return reader.account


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


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk before it gets its name."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
