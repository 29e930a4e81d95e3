"""What a person sees while it runs: a live bar on a terminal, plain lines in a file, or nothing."""

import io
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TextIO, runtime_checkable

from rich.console import Console

from infctx.training.pace import CHECKPOINT, Pace, RunPlan
from infctx.training.progress_numbers import (
    by_set_text,
    clock_text,
    loss_text,
    memory_text,
    norm_text,
    number,
    place_parts,
    rate_text,
    set_losses,
    speed_text,
    work_text,
)
from infctx.training.step_work import ChunkPlace


@runtime_checkable
class Progress(Protocol):
    """Shows a run as it goes.

    A report has the keys of a line of `metrics.jsonl`; any of them may be missing or None.
    """

    def start(self, total_steps: int | None, headline: list[str], plan: RunPlan | None = None) -> None:
        """Show the headline and begin. total_steps: None where it is not known beforehand."""

    def chunk(self, place: ChunkPlace) -> None:
        """Note how far the step under way is; called before every chunk, and done in microseconds."""

    def interrupted(self, by: str, seconds: float | None = None) -> None:
        """A validation or a checkpoint (see pace.py) begins, or is done after so many seconds."""

    def step(self, report: Mapping[str, object]) -> None:
        """Show the numbers of a finished step."""

    def message(self, text: str) -> None:
        """Show a line that stays."""

    def finish(self) -> None:
        """Show the last step and leave the terminal as it was; safe to call twice, and without `start`."""


def make_progress(stream: TextIO | None = None, *, every_seconds: float = 5.0) -> Progress:
    """Live where the stream (default: standard error) is a terminal that can move its cursor, else plain lines.

    Args:
        every_seconds: least time between two plain lines.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        console = Console(file=stream)
        if not console.is_dumb_terminal:
            from infctx.training.progress_live import LiveProgress

            return LiveProgress(console)
    return PlainProgress(stream, every_seconds=every_seconds)


class SilentProgress:
    """Shows nothing."""

    def start(self, total_steps: int | None, headline: list[str], plan: RunPlan | None = None) -> None:
        """Nothing."""

    def chunk(self, place: ChunkPlace) -> None:
        """Nothing."""

    def interrupted(self, by: str, seconds: float | None = None) -> None:
        """Nothing."""

    def step(self, report: Mapping[str, object]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class PlainProgress:
    """One line a step, but not more often than every so many seconds; the first and the last step always.

    Args:
        seconds_inside: inside a step that is so long, a line about where it is, as often.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        every_seconds: float = 5.0,
        seconds_inside: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._every_seconds, self._seconds_inside = every_seconds, seconds_inside
        self._clock = clock
        self._pace = Pace(clock)
        self._last_shown = self._last_inside = -math.inf
        self._unshown: Mapping[str, object] | None = None

    def start(self, total_steps: int | None, headline: list[str], plan: RunPlan | None = None) -> None:
        """Print the headline."""
        self._pace = Pace(self._clock, total_steps, plan)
        self._last_shown, self._last_inside = -math.inf, self._clock()
        for line in headline:
            self.message(line)

    def chunk(self, place: ChunkPlace) -> None:
        """Print where a long step is if a while has passed without a line."""
        self._pace.chunk(place)
        now = self._clock()
        if now - max(self._last_inside, self._last_shown) >= self._seconds_inside:
            self._last_inside = now
            speed = self._pace.tokens_per_second({})
            parts = [f"in step {place.step}", *place_parts(place)]
            parts += [f"{speed_text(speed)} tokens/s"] if speed is not None else []
            self.message("  ".join([*parts, *self._eta()]))

    def interrupted(self, by: str, seconds: float | None = None) -> None:
        """Note it; a checkpoint gets a line."""
        self._pace.interrupted(by, seconds)
        if by == CHECKPOINT and seconds is not None:
            # After what it is a checkpoint of.
            if self._unshown is not None:
                self._show_step()
            self.message(f"checkpoint after step {self._pace.current_step}, {clock_text(seconds)} to write")

    def step(self, report: Mapping[str, object]) -> None:
        """Print the step if it is its turn; a validated step always is."""
        self._pace.step(report)
        self._unshown = dict(report)
        is_due = self._clock() - self._last_shown >= self._every_seconds
        if is_due or self._pace.is_last or number(report, "val_loss") is not None:
            self._show_step()

    def message(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def finish(self) -> None:
        """Print the last step if it was not."""
        if self._unshown is not None:
            self._show_step()

    def _show_step(self) -> None:
        assert self._unshown is not None
        self.message(self._line(self._unshown))
        self._unshown = None
        self._last_shown = self._clock()

    def _line(self, report: Mapping[str, object]) -> str:
        parts = [
            f"step {self._pace.position()}",
            f"loss {loss_text(number(report, 'loss'))}{_in_brackets(set_losses(report, 'sets'))}",
            f"val {loss_text(number(report, 'val_loss'))}{_in_brackets(set_losses(report, 'val_loss_by_set'))}"
            if "val_loss" in report
            else "",
            f"{speed_text(number(report, 'tokens_per_second'))} tokens/s",
            f"peak {memory_text(report)}",
            f"norm {norm_text(report)}",
            f"lr {rate_text(report)}",
            *self._eta(),
            work_text(report),
        ]
        return "  ".join(part for part in parts if part)

    def _eta(self) -> list[str]:
        eta_seconds = self._pace.remaining_seconds()
        return [] if eta_seconds is None else [f"eta {clock_text(eta_seconds)}"]


def _in_brackets(losses: Mapping[str, float | None]) -> str:
    return f" ({by_set_text(losses)})" if losses else ""


class LoggedProgress:
    """Shows a run on another progress and writes it as plain lines to the end of a file.

    Both are worth less than the run: a terminal that is gone is written to no more, a disk that cannot be written is
    told of once, and the run goes on.
    """

    def __init__(self, shown: Progress, path: Path) -> None:
        self._shown = shown
        self._path = path
        self._lines = io.StringIO()
        self._log = PlainProgress(self._lines)
        self._has_failed = False

    def start(self, total_steps: int | None, headline: list[str], plan: RunPlan | None = None) -> None:
        """Open the log with the time, for a run may be continued many times."""
        self._show(lambda shown: shown.start(total_steps, headline, plan))
        self._write(lambda log: log.start(total_steps, [time.strftime("%Y-%m-%d %H:%M:%S %z"), *headline], plan))

    def chunk(self, place: ChunkPlace) -> None:
        """Show and write where a step is."""
        self._show(lambda shown: shown.chunk(place))
        self._write(lambda log: log.chunk(place))

    def interrupted(self, by: str, seconds: float | None = None) -> None:
        """Show and write what interrupts the steps."""
        self._show(lambda shown: shown.interrupted(by, seconds))
        self._write(lambda log: log.interrupted(by, seconds))

    def step(self, report: Mapping[str, object]) -> None:
        """Show and write a step."""
        self._show(lambda shown: shown.step(report))
        self._write(lambda log: log.step(report))

    def message(self, text: str) -> None:
        """Show and write a line."""
        self._show(lambda shown: shown.message(text))
        self._write(lambda log: log.message(text))

    def finish(self) -> None:
        """Show and write the last step."""
        self._show(lambda shown: shown.finish())
        self._write(lambda log: log.finish())

    def _show(self, show: Callable[[Progress], None]) -> None:
        try:
            show(self._shown)
        except (OSError, ValueError):
            # A pipe that nobody reads, a closed terminal (ValueError: write to a closed file).
            self._shown = SilentProgress()

    def _write(self, write: Callable[[PlainProgress], None]) -> None:
        write(self._log)
        lines = self._lines.getvalue()
        self._lines.seek(0)
        self._lines.truncate()
        try:
            if lines and not self._has_failed:
                # Opened anew each time: what is written is there, whatever happens next.
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(lines)
        except OSError as error:
            self._has_failed = True
            problem = f"cannot write {self._path} ({error.strerror or error}): the run goes on without it"
            self._show(lambda shown: shown.message(problem))
