"""Runs every scenario of test_rank_watch.py at once, each with three forked ranks; prints what became of them as JSON.

A program of its own: it imports torch once, and is forked before it has threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from infctx.training.rank_watch import RankWatch, host_store, join_store

RANKS, DEAD_SECONDS, HANG_SECONDS = 3, 4.0, 6.0
LONGER = 2.0
# Between scenarios, so that not all of them start in the same second of a slow machine.
STAGGER_SECONDS = 0.2


class Rank:
    """One rank of a scenario: what it may do."""

    def __init__(self, number: int, watch: RankWatch, folder: Path) -> None:
        self.number, self.watch, self._folder = number, watch, folder

    def fault(self, signal_number: int | None = None) -> None:
        """From here the seconds count."""
        (self._folder / "fault").write_text(str(time.time()))
        if signal_number is not None:
            os.kill(os.getpid(), signal_number)

    def wait(self) -> None:
        """As in a collective whose other side never comes."""
        time.sleep(600)


def kill_1(rank: Rank) -> None:
    if rank.number == 1:
        rank.fault(signal.SIGKILL)
    rank.wait()


def kill_0(rank: Rank) -> None:
    if rank.number == 0:
        rank.fault(signal.SIGKILL)
    rank.wait()


def stop_1(rank: Rank) -> None:
    if rank.number == 1:
        rank.fault(signal.SIGSTOP)
    rank.wait()


def stop_0(rank: Rank) -> None:
    if rank.number == 0:
        rank.fault(signal.SIGSTOP)
    rank.wait()


def sleep_1(rank: Rank) -> None:
    """Its main thread stands still, its process lives."""
    if rank.number == 1:
        rank.fault()
    else:
        rank.watch.at("step 3, chunk 3")
    rank.wait()


def sleep_all(rank: Rank) -> None:
    if rank.number == 0:
        rank.fault()
    rank.wait()


def fail_1(rank: Rank) -> None:
    if rank.number == 1:
        rank.fault()
        rank.watch.fail(ValueError("no such thing\nand a second line"))
        sys.exit(1)
    rank.wait()


def fail_0(rank: Rank) -> None:
    if rank.number == 0:
        rank.fault()
        rank.watch.fail(ValueError("no such thing"))
        sys.exit(1)
    rank.wait()


def error_after_kill(rank: Rank) -> None:
    """A collective that notices the loss at once does not make its own rank the cause."""
    if rank.number == 1:
        rank.fault(signal.SIGKILL)
    time.sleep(0.5)
    if rank.number == 2:
        rank.watch.fail(RuntimeError("[../third_party/gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:6"))
        sys.exit(1)
    rank.wait()


def stderr_that_nobody_reads(rank: Rank) -> None:
    """A pipe that is full blocks whoever writes."""
    if rank.number == 2:
        _, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(writer, True)
        os.dup2(writer, 2)
    kill_1(rank)


def last_words_that_block(rank: Rank) -> None:
    kill_1(rank)


def close_in_any_order(rank: Rank) -> None:
    time.sleep(0.3 * rank.number)
    rank.watch.close()
    sys.exit(3)


def rank_0_ends_first(rank: Rank) -> None:
    """The store is gone while others still work; their own close comes later."""
    if rank.number != 0:
        time.sleep(DEAD_SECONDS + LONGER)
    rank.watch.close()


def rank_1_ends_first(rank: Rank) -> None:
    if rank.number == 1:
        rank.watch.close()
        sys.exit(2)
    moves_slowly(rank)


def moves_slowly(rank: Rank) -> None:
    until = time.monotonic() + HANG_SECONDS + LONGER
    while time.monotonic() < until:
        rank.watch.at("step 3, chunk 3")
        time.sleep(HANG_SECONDS / 4)
    rank.watch.close()


def patient_1(rank: Rank) -> None:
    """One rank loads, the others wait for it; then it is slow, but not as slow as that."""
    if rank.number == 1:
        with rank.watch.patient("loading the model"):
            time.sleep(HANG_SECONDS + LONGER)
        time.sleep(HANG_SECONDS / 2)
        rank.watch.at("step 3, chunk 3")
    else:
        rank.watch.at("step 3, chunk 3")
        time.sleep(HANG_SECONDS * 1.5 + LONGER)
    rank.watch.close()


def patient_1_dies(rank: Rank) -> None:
    if rank.number == 1:
        with rank.watch.patient("loading the model"):
            time.sleep(1)
            rank.fault(signal.SIGKILL)
    rank.wait()


def all_stopped(rank: Rank) -> None:
    """The parent stops all of them for longer than a dead rank is silent, and continues them."""
    deadline = time.monotonic() + 2 * DEAD_SECONDS + LONGER
    while time.monotonic() < deadline:
        rank.watch.at("step 3, chunk 3")
        time.sleep(0.05)
    rank.watch.close()


SCENARIOS: dict[str, Callable[[Rank], None]] = {
    function.__name__: function
    for function in (
        kill_1,
        kill_0,
        stop_1,
        stop_0,
        sleep_1,
        sleep_all,
        fail_1,
        fail_0,
        error_after_kill,
        stderr_that_nobody_reads,
        last_words_that_block,
        close_in_any_order,
        rank_0_ends_first,
        rank_1_ends_first,
        moves_slowly,
        patient_1,
        patient_1_dies,
        all_stopped,
    )
}


def last_words() -> str:
    return "Checkpoint step-000002 is good."


def run_rank(name: str, number: int, folder: Path) -> None:
    """A forked child; it never returns."""
    code = 99
    try:
        error = os.open(folder / f"{number}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(error, 2)
        if number == 0:
            store = host_store("127.0.0.1", RANKS)
            (folder / "unfinished").write_text(str(store.port))
            (folder / "unfinished").rename(folder / "port")
        else:
            while not (folder / "port").exists():
                time.sleep(0.02)
            store = join_store("127.0.0.1", int((folder / "port").read_text()))
        watch = RankWatch(
            store,
            rank=number,
            ranks=RANKS,
            dead_seconds=DEAD_SECONDS,
            hang_seconds=HANG_SECONDS,
            last_words=(lambda: time.sleep(600) or "") if name == "last_words_that_block" else last_words,
        )
        for chunk in range(3):
            watch.at(f"step 3, chunk {chunk}")
        (folder / f"{number}.ready").touch()
        # All are there, and have told so, before the fault.
        while len(list(folder.glob("*.ready"))) < RANKS:
            time.sleep(0.05)
        time.sleep(DEAD_SECONDS / 3)
        SCENARIOS[name](Rank(number, watch, folder))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    finally:
        os._exit(code)


class Scenarios:
    """All of them, from the first fork to the last end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[int, tuple[str, int]] = {}
        self.codes: dict[str, dict[int, int]] = {name: {} for name in SCENARIOS}
        self.ends: dict[str, dict[int, float]] = {name: {} for name in SCENARIOS}

    def start(self, name: str) -> None:
        (self._folder / name).mkdir()
        for number in range(RANKS):
            pid = os.fork()
            if pid == 0:
                run_rank(name, number, self._folder / name)
            self._running[pid] = (name, number)

    def group(self, name: str) -> list[int]:
        return [pid for pid, (of, _) in self._running.items() if of == name]

    def reap(self) -> bool:
        """Note who has ended; whether anyone is left."""
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return True
            name, number = self._running.pop(pid)
            self.codes[name][number], self.ends[name][number] = os.waitstatus_to_exitcode(status), time.time()
            # A stopped rank stays; a supervisor kills it in the end.
            if name in ("stop_0", "stop_1") and len(self.group(name)) == 1:
                os.kill(self.group(name)[0], signal.SIGKILL)
        return False

    def signal_all(self, name: str, number: int) -> None:
        for pid in self.group(name):
            os.kill(pid, number)


def main(folder: Path) -> None:
    scenarios = Scenarios(folder)
    waiting = sorted(SCENARIOS, key=lambda name: name != "all_stopped")
    started_at = stopped_at = 0.0
    is_continued = False
    while scenarios.reap() or waiting:
        now = time.monotonic()
        if waiting and now > started_at + STAGGER_SECONDS:
            scenarios.start(waiting.pop(0))
            started_at = time.monotonic()
        if not stopped_at and len(list((folder / "all_stopped").glob("*.ready"))) == RANKS:
            scenarios.signal_all("all_stopped", signal.SIGSTOP)
            stopped_at = now
        if stopped_at and not is_continued and now > stopped_at + DEAD_SECONDS + LONGER:
            scenarios.signal_all("all_stopped", signal.SIGCONT)
            is_continued = True
        time.sleep(0.02)
    found = {}
    for name, ends in scenarios.ends.items():
        fault = folder / name / "fault"
        found[name] = {
            "codes": [scenarios.codes[name][number] for number in range(RANKS)],
            "seconds": [ends[number] - float(fault.read_text()) for number in range(RANKS)] if fault.exists() else [],
            "errors": [(folder / name / f"{number}.err").read_text() for number in range(RANKS)],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
