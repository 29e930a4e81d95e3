"""Ends this process, and says why, when another rank has died, failed or hangs.

A rank that waits in a collective for one that will never come cannot be woken: only its process can be ended. Two
threads of each rank see to that. One tells a store where its rank is, once a second, and asks for news; a store whose
process is stopped never answers, so that another looks at the clock. Rank 0 judges all and publishes what it found; the
others watch rank 0, which keeps the store, so that traffic grows with the ranks and not with their square.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, Store, TCPStore

from infctx.errors import MachineError
from infctx.exit_codes import EXIT_MACHINE
from infctx.training.rank_verdict import CLOSED, FAILED, RELEASED, Seen, Status, judge

# gloo reports a lost peer as a plain RuntimeError, with its own source file in front.
_SIGNS_OF_A_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
_VERDICT = "verdict"
_POLL_SECONDS = 0.02


def host_store(host: str, ranks: int) -> TCPStore:
    """The store of a watch, on a free port, to be kept by rank 0; the others join it at this host and its `port`.

    Args:
        host: a name or address of this machine that all ranks can reach.
    """
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    # Nobody ever asks for a key that is not there: that would block.
    store.multi_set([_key(rank) for rank in range(ranks)] + [_VERDICT], [""] * (ranks + 1))
    return store


def join_store(host: str, port: int) -> TCPStore:
    """The store that rank 0 keeps.

    Raises:
        MachineError: nothing answers there within 60 s.
    """
    try:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"Rank 0 keeps a store for all ranks at {host}, port {port}, and {socket.gethostname()} cannot reach it: "
            f"{reason}. Ports above 1024 must be open between the machines."
        ) from error


class RankWatch:
    """Watches the other ranks, from its making until `close` or `fail`.

    Args:
        store: from `host_store` in rank 0, from `join_store` elsewhere.
        dead_seconds: without a sign of life after which a rank counts as dead. It is given by a Python thread, so that
            code which holds Python's lock for so long looks dead, too.
        hang_seconds: after which the ranks behind all others count as hung, if they have not moved.
        last_words: asked by rank 0 for a sentence to end with, as which checkpoint is good; for at most 5 s.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        ranks: int,
        dead_seconds: float = 15.0,
        hang_seconds: float = 1800.0,
        last_words: Callable[[], str] | None = None,
    ) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._dead_seconds, self._hang_seconds = dead_seconds, hang_seconds
        self._last_words = last_words
        self._beat_seconds = min(1.0, dead_seconds / 6)
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._beat = 0
        self._progress = (0, "its start")
        self._patience = 0
        now = time.monotonic()
        self._seen = [
            Seen(status=Status(rank=other), heard=now, moved=now) for other in range(ranks if rank == 0 else 1)
        ]
        self._verdict, self._lost, self._end = "", "", ""
        self._is_over = threading.Event()
        self._talker = threading.Thread(target=self._talk, name="rank-watch-talk", daemon=True)
        self._talker.start()
        threading.Thread(target=self._look, name="rank-watch-look", daemon=True).start()

    def at(self, place: str) -> None:
        """Say where the main thread is, as "step 12, chunk 3"; every rank calls this equally often."""
        self._progress = (self._progress[0] + 1, place)

    @contextmanager
    def patient(self, place: str) -> Iterator[None]:
        """A phase, perhaps of this rank only, whose length nobody knows; while a rank is in one, only death counts."""
        self._patience += 1
        moves, before = self._progress
        self._progress = (moves, place)
        try:
            yield
        finally:
            self._patience -= 1
            if self._progress == (moves, place):
                self._progress = (moves, before)

    def close(self) -> None:
        """End in good order: the others do not miss this rank. Rank 0 waits until they know, about a second."""
        self._finish(CLOSED)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error that is its own.

        Of an error that a lost rank may have caused, a verdict is waited for; where there is one, this does not return.
        """
        if may_blame_a_peer(error):
            self._is_over.wait(self._dead_seconds + 5 * self._beat_seconds)
        reason = (str(error).splitlines() or ["no reason given"])[0]
        self._finish(f"{FAILED}{type(error).__name__}: {reason}")

    def _finish(self, end: str) -> None:
        if not self._end:
            self._end = end
            self._is_over.set()
        self._talker.join(self._dead_seconds)

    def _status(self) -> Status:
        moves, place = self._progress
        self._beat += 1
        return Status(
            rank=self._rank,
            host=self._host,
            pid=self._pid,
            beat=self._beat,
            moves=moves,
            place=place,
            is_patient=self._patience > 0,
            end=self._end,
        )

    def _talk(self) -> None:
        try:
            while not self._exchange():
                # Who has ended only waits for the others to know.
                time.sleep(_POLL_SECONDS) if self._end else self._is_over.wait(self._beat_seconds)
        except Exception as error:
            self._lost = (str(error).splitlines() or [type(error).__name__])[0]

    def _exchange(self) -> bool:
        """Tell and ask once; whether there is nothing left to say."""
        status = self._status()
        self._store.set(_key(self._rank), status.to_json())
        if self._rank != 0 and status.end:
            return True
        verdict, *texts = self._store.multi_get([_VERDICT, *(_key(seen.status.rank) for seen in self._seen)])
        now = time.monotonic()
        self._seen = [
            seen.updated(Status.from_json(text), now) if text else seen
            for seen, text in zip(self._seen, texts, strict=True)
        ]
        self._verdict = verdict.decode()
        if self._rank == 0:
            return bool(status.end) and all(seen.status.end for seen in self._seen[1:])
        if self._seen[0].status.end == CLOSED and not self._end:
            # The store goes with rank 0, which waits for this answer.
            self._end = RELEASED
            self._is_over.set()
        return False

    def _look(self) -> None:
        alive_since = patient_until = looked = time.monotonic()
        while not self._is_over.wait(self._beat_seconds / 4):
            now = time.monotonic()
            if now - looked > self._dead_seconds / 3:
                # This process was stopped and continued, perhaps with all others: nobody could be heard meanwhile.
                alive_since = now
            looked = now
            if any(seen.status.is_patient for seen in self._seen):
                patient_until = now
            verdict = self._verdict or self._judged(now, alive_since, max(alive_since, patient_until))
            if verdict:
                self._end_process(verdict)

    def _judged(self, now: float, alive_since: float, moving_since: float) -> str | None:
        if self._lost:
            keeper = self._seen[0].status
            if self._rank == 0:
                return f"{keeper} cannot use the store that it keeps for the watch: {self._lost}."
            return f"{keeper} is gone, last at {keeper.place}: {self._lost}."
        return judge(
            [seen.counted_from(heard=alive_since, moved=moving_since) for seen in self._seen],
            now,
            dead_seconds=self._dead_seconds,
            # Who sees rank 0 only does not know who is behind.
            hang_seconds=self._hang_seconds if self._rank == 0 else math.inf,
        )

    def _end_process(self, verdict: str) -> NoReturn:
        """Nothing here may keep the process: not a store that does not answer, nor a stderr that nobody reads."""
        lines = [f"infctx: rank {self._rank} ends. {verdict}"]
        if self._rank == 0:
            _within(1.0, lambda: self._store.set(_VERDICT, verdict))
            if self._last_words is not None:
                words = self._last_words
                _within(5.0, lambda: lines.append(words()))
        # The live display of a terminal hides the cursor.
        text = ("\x1b[?25h\n" if os.isatty(2) else "") + " ".join(lines) + "\n"
        _within(2.0, lambda: os.write(2, text.encode(errors="replace")))
        if self._rank == 0:
            # The store goes with this process; who is alive is to read the verdict first.
            found = time.monotonic()
            alive = [seen.status.rank for seen in self._seen[1:] if found - seen.heard < self._dead_seconds / 3]
            while time.monotonic() < found + 3 * self._beat_seconds and any(
                not self._seen[r].status.end for r in alive
            ):
                time.sleep(_POLL_SECONDS)
        else:
            released = replace(self._status(), end=RELEASED)
            _within(1.0, lambda: self._store.set(_key(self._rank), released.to_json()))
        os._exit(EXIT_MACHINE)


def may_blame_a_peer(error: BaseException) -> bool:
    """Whether an error looks like one of a collective whose other side is gone."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PEER)
    )


def _within(seconds: float, do: Callable[[], object]) -> None:
    """Try something that may block or fail, for so long."""

    def attempt() -> None:
        with suppress(Exception):
            do()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def _key(rank: int) -> str:
    return f"rank/{rank}"
