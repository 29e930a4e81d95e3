"""What a person sees while it runs: a live bar on a terminal, plain lines in a file, or nothing."""

import io
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TextIO, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from infctx.training.progress_numbers import (
    Pace,
    by_set_text,
    clock_text,
    loss_text,
    memory_text,
    number,
    rate_text,
    set_losses,
    speed_text,
    work_text,
)


@runtime_checkable
class Progress(Protocol):
    """Shows a run as it goes.

    A report has the keys of a line of `metrics.jsonl`; any of them may be missing or None.
    """

    def start(self, total_steps: int | None, headline: list[str]) -> None:
        """Show the headline and begin. total_steps: None where it is not known beforehand."""

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
            return LiveProgress(console)
    return PlainProgress(stream, every_seconds=every_seconds)


class SilentProgress:
    """Shows nothing."""

    def start(self, total_steps: int | None, headline: list[str]) -> None:
        """Nothing."""

    def step(self, report: Mapping[str, object]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class PlainProgress:
    """One line a step, but not more often than every so many seconds; the first and the last step always."""

    def __init__(
        self, stream: TextIO, *, every_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._every_seconds = every_seconds
        self._clock = clock
        self._pace = Pace(clock)
        self._last_shown = -math.inf
        self._unshown: str | None = None

    def start(self, total_steps: int | None, headline: list[str]) -> None:
        """Print the headline."""
        self._pace = Pace(self._clock, total_steps)
        self._last_shown = -math.inf
        for line in headline:
            self.message(line)

    def step(self, report: Mapping[str, object]) -> None:
        """Print the step if it is its turn; a validated step always is."""
        self._pace.step(report)
        self._unshown = self._line(report)
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
        self.message(self._unshown)
        self._unshown = None
        self._last_shown = self._clock()

    def _line(self, report: Mapping[str, object]) -> str:
        eta_seconds = self._pace.remaining_seconds()
        parts = [
            f"step {self._pace.position()}",
            f"loss {loss_text(number(report, 'loss'))}{_in_brackets(set_losses(report, 'sets'))}",
            f"val {loss_text(number(report, 'val_loss'))}{_in_brackets(set_losses(report, 'val_loss_by_set'))}"
            if "val_loss" in report
            else "",
            f"{speed_text(report)} tokens/s",
            f"peak {memory_text(report)}",
            f"lr {rate_text(report)}",
            f"eta {clock_text(eta_seconds)}" if eta_seconds is not None else "",
            work_text(report),
        ]
        return "  ".join(part for part in parts if part)


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

    def start(self, total_steps: int | None, headline: list[str]) -> None:
        """Open the log with the time, for a run may be continued many times."""
        self._show(lambda shown: shown.start(total_steps, headline))
        self._write(lambda log: log.start(total_steps, [time.strftime("%Y-%m-%d %H:%M:%S %z"), *headline]))

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


class LiveProgress:
    """A bar and a line of numbers that stay at the bottom of a terminal of 80 columns or more."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._pace = Pace(clock)
        self._numbers = Text("waiting for the first step", style="dim", no_wrap=True, overflow="ellipsis")
        self._sets: list[Text] = []
        self._bar = RichProgress(
            TextColumn("step {task.fields[position]}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}", markup=False),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._live: Live | None = None

    def start(self, total_steps: int | None, headline: list[str]) -> None:
        """Print the headline and put the bar under it."""
        self.finish()
        self._pace = Pace(self._clock, total_steps)
        for line in headline:
            self.message(line)
        self._task = self._bar.add_task("", total=total_steps, position=self._pace.position(), eta="–")
        self._live = Live(
            get_renderable=lambda: Group(self._bar, self._numbers, *self._sets),
            console=self._console,
            refresh_per_second=4,
        )
        self._live.start()

    def step(self, report: Mapping[str, object]) -> None:
        """Move the bar and show the numbers."""
        self._pace.step(report)
        self._numbers = self._line(report)
        self._sets = self._set_lines()
        if self._task is not None:
            eta_seconds = self._pace.remaining_seconds()
            self._bar.update(
                self._task,
                completed=self._pace.current_step,
                position=self._pace.position(),
                eta="–" if eta_seconds is None else clock_text(eta_seconds),
            )

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        # Paths in brackets are no markup.
        self._console.print(text, markup=False, highlight=False, emoji=False)

    def finish(self) -> None:
        """Draw the last state and let go of the terminal."""
        if self._live is not None:
            if self._task is not None:
                self._bar.stop_task(self._task)
            self._live.stop()
            self._live = None
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _line(self, report: Mapping[str, object]) -> Text:
        validated = f"  val {loss_text(self._pace.val_loss)}" if self._pace.val_loss is not None else ""
        return Text.assemble(
            ("loss ", "dim"),
            (loss_text(number(report, "loss")), "bold"),
            ("  smooth ", "dim"),
            loss_text(self._pace.smoothed_loss),
            validated,
            f"  {speed_text(report)} tokens/s  {memory_text(report)}",
            (f"  lr {rate_text(report)}", "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )

    def _set_lines(self) -> list[Text]:
        """The latest loss of each set of a mixture, and one more line once they were validated."""
        lines = []
        for name, losses in (("loss ", self._pace.set_losses), ("val ", self._pace.set_val_losses)):
            if losses:
                lines.append(Text.assemble((name, "dim"), by_set_text(losses), no_wrap=True, overflow="ellipsis"))
        return lines
