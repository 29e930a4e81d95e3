"""Further places for the numbers of every step, each behind a thread and a queue of its own.

None of them can stop or slow a training: what they raise ends them with one warning, and what they cannot take in time
is left out and counted. metrics.jsonl has every step in any case.
"""

from __future__ import annotations

import importlib.metadata
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from infctx.errors import RecipeError

PACKAGE_OF = {"csv": None, "tensorboard": "tensorboard", "wandb": "wandb"}
"""The loggers by name, and the package each needs."""

# Steps that may wait for a logger that is slower than the training.
MOST_WAITING = 1000
# Of all loggers together, at the end of a run.
SECONDS_TO_FINISH = 5.0


class Writer(Protocol):
    """One place for numbers. What it raises is the end of it."""

    @property
    def told(self) -> str | None:
        """What people should know of it, once it is open: where it writes."""

    def write(self, record: Mapping[str, object]) -> None:
        """Take a line of metrics.jsonl."""

    def close(self) -> None:
        """Write what is left."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is missing; nothing is imported.

    Raises:
        RecipeError: naming the extra that brings it.
    """
    for name in names:
        package = PACKAGE_OF[name]
        try:
            if package is not None:
                importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise RecipeError(
                f"run.loggers: {name} needs the package {package}, which is not installed. Install it "
                f'(pip install "infctx[{name}]"), or remove {name} from run.loggers.'
            ) from None


class QueuedLogger:
    """A writer in a thread of its own, that nobody waits for.

    Args:
        name: for people.
        open_writer: called in the thread: it may import, connect and wait as long as it likes.
        most_waiting: records that may wait; further ones are left out.
    """

    def __init__(self, name: str, open_writer: Callable[[], Writer], *, most_waiting: int = MOST_WAITING) -> None:
        self.name, self.num_dropped = name, 0
        self._queue: queue.Queue[Mapping[str, object] | None] = queue.Queue(most_waiting)
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._has_warned = self._is_dead = False
        # A daemon, for a thread that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, args=(open_writer,), name=f"logger {name}", daemon=True)
        self._thread.start()

    def append(self, record: Mapping[str, object]) -> None:
        """Hand over a record, or count it as left out; takes microseconds either way."""
        if self._is_dead:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1
            self._warn(f"{self.name} takes nothing any more: steps are missing there from step {record.get('step')} on")

    def notices(self) -> list[str]:
        """What people should be told and have not been."""
        found = []
        while not self._notices.empty():
            found.append(self._notices.get())
        return found

    def ask_to_finish(self) -> None:
        """No record follows."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            # It would not get to what waits in time either.
            self._is_dead = True

    def wait(self, seconds: float) -> None:
        """For what is still to be written, but not longer than that."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._warn(f"{self.name} has not written everything within {SECONDS_TO_FINISH:g} seconds of the end")

    def _work(self, open_writer: Callable[[], Writer]) -> None:
        try:
            writer = open_writer()
            if writer.told is not None:
                self._notices.put(writer.told)
            while (record := self._queue.get()) is not None:
                writer.write(record)
            writer.close()
        # Whatever it is, it is no reason to end a training.
        except BaseException as error:
            self._is_dead = True
            what = str(error).strip().splitlines()
            self._warn(f"{self.name} failed ({type(error).__name__}{': ' + what[0][:200] if what else ''})")

    def _warn(self, problem: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._notices.put(f"warning: {problem}. The training goes on, and metrics.jsonl has every step.")


class Loggers:
    """All loggers of a run.

    Args:
        openers: by name, what opens each, given the last step that stays of an earlier part of the run.
        say: told what people should know, always in the thread that calls `append` or `finish`.
    """

    def __init__(self, openers: Mapping[str, Callable[[int], Writer]], say: Callable[[str], None]) -> None:
        self._openers, self._say = openers, say
        self._loggers: list[QueuedLogger] = []

    def start(self, last_step: int) -> None:
        """Open them; what they hold of steps after `last_step` will be written again."""
        self._loggers = [
            QueuedLogger(name, lambda open_writer=open_writer: open_writer(last_step))  # type: ignore[misc]
            for name, open_writer in self._openers.items()
        ]

    def append(self, record: Mapping[str, object]) -> None:
        """Hand a line of metrics.jsonl to all of them."""
        for logger in self._loggers:
            # Theirs is a copy: the line may still change.
            logger.append(dict(record))
        self._tell()

    def finish(self) -> None:
        """Let them write what waits, within a few seconds."""
        for logger in self._loggers:
            logger.ask_to_finish()
        end = time.monotonic() + SECONDS_TO_FINISH
        for logger in self._loggers:
            logger.wait(end - time.monotonic())
        self._tell()
        self._loggers = []

    def _tell(self) -> None:
        for logger in self._loggers:
            for notice in logger.notices():
                self._say(notice)


NO_LOGGERS = Loggers({}, lambda text: None)
"""For a run that has none, and for all ranks but the first."""
