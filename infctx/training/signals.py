"""A signal as a wish: the run stops at the next chunk with a checkpoint; a second signal ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType


class StopRequested(Exception):
    """A signal came; the step under way is abandoned, it has changed no weight.

    is_told: every process of a run raises it, and another prints it.
    """

    is_told = False


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is noted, and the second does what it does elsewhere.

    Args:
        counts_as_one: seconds within which the second still belongs to the first: a scheduler may signal every process
            of a run and its supervisor, which passes it on.
    """

    def __init__(self, *, counts_as_one: float = 0.0) -> None:
        self.name: str | None = None
        self._counts_as_one, self._noted_at = counts_as_one, 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        # Handlers can be set in the main thread only; elsewhere signals keep their usual meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # A run under nohup has asked not to hear of it.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def number(self) -> int:
        """Of the signal that has come; 0 for none."""
        return 0 if self.name is None else signal.Signals[self.name].value

    def raise_if(self, number: int) -> None:
        """Raise StopRequested if this is the number of a signal, which may have come to another process of the run."""
        if number:
            self.name = signal.Signals(number).name
            raise StopRequested(self.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            self._noted_at = time.monotonic()
            if not self._counts_as_one:
                self._restore()
        elif time.monotonic() - self._noted_at > self._counts_as_one:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
