"""The work of a preparation: units of the input, in processes, each part in a folder of its own when it is done."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infctx.data.reading import Reading, read_rows
from infctx.data.sources.catalog import Scan
from infctx.data.sources.records import Unit
from infctx.data.token_store import Index, StoreBuilder
from infctx.data.tokenizer import TokenIds
from infctx.errors import MachineError

SPILL_TOKENS = 2**25
ACCOUNT_FILE = "account.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Units, each with the number of its file, whose documents go into one folder."""

    units: list[tuple[int, Unit]]
    part: Path
    num_bytes: int


def jobs_of(scans: Sequence[Scan], folder: Path, *, unit_bytes: int) -> list[Job]:
    """The units in their order, small ones together."""
    jobs: list[Job] = []
    units: list[tuple[int, Unit]] = []
    num_bytes = 0
    for number, found in enumerate(scans):
        for unit in found.units:
            units.append((number, unit))
            num_bytes += found.num_bytes // len(found.units)
            if num_bytes >= unit_bytes // 2:
                jobs.append(Job(units=units, part=folder / f"part-{len(jobs):06d}", num_bytes=num_bytes))
                units, num_bytes = [], 0
    if units:
        jobs.append(Job(units=units, part=folder / f"part-{len(jobs):06d}", num_bytes=num_bytes))
    return jobs


def run_jobs(jobs: Sequence[Job], reading: Reading, *, workers: int) -> Iterator[Job]:
    """Do the jobs in any order; gives each when it is done."""
    if workers <= 1:
        for job in jobs:
            build_part(job, reading)
            yield job
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker)
    waiting: dict[Future[None], Job] = {}
    try:
        ahead = iter(jobs)
        while True:
            # A few more than there are processes, so that none waits for work.
            for job in itertools.islice(ahead, workers + 2 - len(waiting)):
                waiting[pool.submit(build_part, job, reading)] = job
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


class SpillingBuilder(StoreBuilder):
    """Writes what it has into a folder whenever that is much: a unit may be a file of any size."""

    def __init__(self, id_type: npt.DTypeLike, folder: Path) -> None:
        super().__init__(id_type)
        self._folder = folder
        self._num_folders = 0

    def add(self, tokens: TokenIds, weights: npt.NDArray[np.float32], entries: Index) -> None:
        super().add(tokens, weights, entries)
        if self.num_tokens >= SPILL_TOKENS:
            self.spill()

    def spill(self) -> None:
        folder = self._folder / f"{self._num_folders:06d}"
        folder.mkdir()
        self.finish().save(folder, {})
        sync_folder(folder)
        self._num_folders += 1


def build_part(job: Job, reading: Reading) -> None:
    """Tokenise the units of a job into its folder."""
    unfinished = job.part.with_name(f"{job.part.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    builder = SpillingBuilder(reading.id_type, unfinished)
    rejected: list[tuple[int, int, str]] = []
    dropped: Counter[str] = Counter()
    for number, unit in job.units:
        account = read_rows(unit, reading, builder, file_number=number)
        rejected += [(number, row.line, row.reason) for row in account.rejected]
        dropped.update(account.dropped)
    builder.spill()
    text = json.dumps({"rejected": rejected, "dropped": dict(dropped)})
    (unfinished / ACCOUNT_FILE).write_text(text, encoding="utf-8")
    sync_folder(unfinished)
    os.replace(unfinished, job.part)


def sync_folder(folder: Path) -> None:
    """Bring a folder's files to the disk before it gets its name."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
