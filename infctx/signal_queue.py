"""Signals as something to wait for, without using a processor."""

from __future__ import annotations

import select
import signal
import socket
from types import FrameType, TracebackType


class SignalQueue:
    """While entered, in the main thread, the given signals do nothing but wait in a queue.

    A signal that this process ignores, as SIGHUP under nohup, stays ignored.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = numbers
        self._previous: dict[int, object] = {}

    def __enter__(self) -> SignalQueue:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._numbers:
            # Ignored children would be waited for by the kernel, and how they ended be lost.
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGCHLD:
                self._previous[number] = signal.signal(number, _do_nothing) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float | None) -> bytes:
        """Wait for signals, at most so long (None: for ever); their numbers, in the order in which they came."""
        readable, _, _ = select.select([self._reader], [], [], None if seconds is None else max(0.0, seconds))
        return self._reader.recv(4096) if readable else b""


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Python writes the number to the wake-up socket before it calls this."""
