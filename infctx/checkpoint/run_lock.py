"""One run in a folder at a time."""

import fcntl
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from infctx.errors import CheckpointError

_WAIT_FOR_NAME_SECONDS = 1.0


class RunLock:
    """Holds a run folder for this process: `with RunLock(folder): ...`.

    The lock is the system's (flock on FOLDER/.lock), so it ends with the process, however that ends. The file itself
    stays; it names the holder. Raises CheckpointError naming that holder's pid and host if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self._path = Path(folder) / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        assert self._descriptor is None, "a RunLock is entered once at a time"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} host {socket.gethostname()}\n".encode(), 0)
        except BlockingIOError as error:
            os.close(descriptor)
            raise CheckpointError(
                f"{self._path.parent}: in use by another run ({self._read_holder()}). Stop that run, or give this one "
                "another run.folder."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        # A forked worker inherits the lock and would keep it after its parent is gone.
        holder = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(holder()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            try:
                os.ftruncate(self._descriptor, 0)
                # Closing alone would leave it to a child forked this instant.
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            finally:
                self._let_go()

    def _let_go(self) -> None:
        """Close our copy of the lock; it is free once every process has closed its own."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read_holder(self) -> str:
        """Who holds the lock; the holder writes its name just after taking it, so wait for that a moment."""
        deadline = time.monotonic() + _WAIT_FOR_NAME_SECONDS
        while True:
            words = self._path.read_text(encoding="utf-8", errors="replace").split()
            if len(words) == 4 and words[1].isdecimal():
                # A name left by a run that was killed: the new holder is about to write its own.
                is_stale = words[3] == socket.gethostname() and not is_process_alive(int(words[1]))
                if not is_stale:
                    return " ".join(words)
            if time.monotonic() > deadline:
                return "its pid is not recorded yet"
            time.sleep(0.01)


def is_in_use(folder: Path) -> bool:
    """Whether a run seems to be at work in a folder, without taking its lock from anybody.

    A holder on another machine counts as being there.
    """
    try:
        words = (folder / ".lock").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    if len(words) != 4 or not words[1].isdecimal():
        return False
    return words[3] != socket.gethostname() or is_process_alive(int(words[1]))


def is_process_alive(pid: int) -> bool:
    """Whether a process of this number exists on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _let_go(lock: RunLock | None) -> None:
    if lock is not None:
        lock._let_go()
