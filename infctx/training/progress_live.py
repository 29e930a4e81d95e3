"""The live view of a run: a bar and a few lines that stay at the bottom of a terminal, however narrow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from infctx.training.pace import Pace, RunPlan
from infctx.training.progress_numbers import (
    by_set_text,
    clock_text,
    loss_text,
    memory_text,
    norm_text,
    number,
    place_parts,
    rate_text,
    speed_text,
)
from infctx.training.step_work import ChunkPlace

# Each costs a few milliseconds of a Python thread.
FRAMES_PER_SECOND = 2
# A bar shorter than that says nothing.
LEAST_BAR = 8
GAP = "  "
# Whatever else a terminal lacks.
_ASCII = str.maketrans({"━": "=", "╸": ">", "–": "-", "…": "."})


@dataclass(frozen=True, slots=True)
class Field:
    """A piece of a line; where there is no room, the least important one goes first. name: in a quiet colour."""

    importance: int
    value: str
    name: str = ""
    style: str = ""

    def __len__(self) -> int:
        return len(self.value) + (len(self.name) + 1 if self.name else 0)


def fitting(fields: Sequence[Field], width: int) -> list[Field]:
    """The fields that fit side by side into so many columns, in their order; one is kept in any case."""
    kept = [field for field in fields if field.value]
    while len(kept) > 1 and sum(map(len, kept)) + len(GAP) * (len(kept) - 1) > width:
        kept.remove(min(kept, key=lambda field: field.importance))
    return kept


class LiveProgress:
    """A bar and lines of numbers that stay at the bottom of a terminal; what has no room is left out."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._pace = Pace(clock)
        self._report: Mapping[str, object] | None = None
        self._live: Live | None = None

    def start(self, total_steps: int | None, headline: list[str], plan: RunPlan | None = None) -> None:
        """Print the headline and put the bar under it."""
        self.finish()
        self._pace, self._report = Pace(self._clock, total_steps, plan), None
        for line in headline:
            self.message(line)
        self._live = Live(self, console=self._console, refresh_per_second=FRAMES_PER_SECOND)
        self._live.start()

    def chunk(self, place: ChunkPlace) -> None:
        """Note where the step is; the next frame shows it."""
        self._pace.chunk(place)

    def interrupted(self, by: str, seconds: float | None = None) -> None:
        """Note it; the next frame shows it."""
        self._pace.interrupted(by, seconds)

    def step(self, report: Mapping[str, object]) -> None:
        """Note the numbers of a step; the next frame shows them."""
        self._pace.step(report)
        self._report = dict(report)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        # Paths in brackets are no markup.
        self._console.print(text, markup=False, highlight=False, emoji=False)

    def finish(self) -> None:
        """Draw the last state and let go of the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The last column is left free: some terminals wrap when it is written.
        for line in self._lines(options.max_width - 1):
            if options.ascii_only:
                line.plain = line.plain.translate(_ASCII)
            yield line

    def _lines(self, width: int) -> Iterator[Text]:
        yield self._bar_line(width)
        if self._report is None and self._pace.place is None and self._pace.interrupted_by is None:
            yield _line([Field(1, "waiting for the first step", style="dim")], width)
        for fields in (self._place_fields(), self._loss_fields(), self._speed_fields()):
            if any(field.value for field in fields):
                yield _line(fitting(fields, width), width)
        for name, losses in (("loss", self._pace.set_losses), ("val", self._pace.set_val_losses)):
            if losses:
                yield _line([Field(1, by_set_text(losses), name)], width)

    def _bar_line(self, width: int) -> Text:
        pace = self._pace
        eta_seconds, fraction = pace.remaining_seconds(), pace.fraction
        before = [Field(9, pace.position(), "step")]
        after = [
            Field(5, "" if fraction is None else f"{fraction:.0%}"),
            Field(1, clock_text(pace.elapsed_seconds), style="dim"),
            Field(8, "–" if eta_seconds is None else clock_text(eta_seconds), "eta"),
        ]
        # The bar is worth more than the time that has passed, and less than its own percentage.
        bar = Field(3, "━" * LEAST_BAR)
        kept = fitting([*before, *([bar] if fraction is not None else []), *after], width)
        line = Text(no_wrap=True, overflow="ellipsis")
        free = width - sum(map(len, kept)) - len(GAP) * (len(kept) - 1) + LEAST_BAR
        for place, field in enumerate(kept):
            line.append(GAP if place else "")
            if field is bar:
                assert fraction is not None
                filled = round(fraction * (2 * free))
                # Bare where it is not filled: without colours, too, it can be told how far it is.
                line.append(("━" * (filled // 2) + "╸" * (filled % 2)).ljust(free), "green")
            else:
                _append(line, field)
        return line

    def _place_fields(self) -> list[Field]:
        pace = self._pace
        if pace.interrupted_by is not None:
            return [Field(1, {"validation": "validating", "checkpoint": "writing a checkpoint"}[pace.interrupted_by])]
        place = pace.place
        # Steps of one chunk are over before anybody can read it.
        if place is None or place.total.forward + place.total.backward <= place.chunk_tokens:
            return []
        return [
            Field(9 - index, text, f"in step {place.step}:" if index == 0 else "")
            for index, text in enumerate(place_parts(place))
        ]

    def _loss_fields(self) -> list[Field]:
        if self._report is None:
            return []
        pace, report = self._pace, self._report
        return [
            Field(9, loss_text(number(report, "loss")), "loss", "bold"),
            Field(8, loss_text(pace.smoothed_loss), "smooth"),
            Field(7, "" if pace.val_loss is None else loss_text(pace.val_loss), "val"),
            Field(6, norm_text(report), "norm"),
            Field(2, rate_text(report), "lr"),
        ]

    def _speed_fields(self) -> list[Field]:
        report, saved, ago = self._report or {}, self._pace.saved, self._pace.seconds_since_saved
        speed = self._pace.tokens_per_second(report)
        if self._report is None and speed is None:
            return []
        kept = "" if saved is None or ago is None else f"step {saved[0]}, {clock_text(ago)} ago"
        memory = memory_text(report) if self._report is not None else ""
        return [Field(9, f"{speed_text(speed)} tokens/s"), Field(7, memory), Field(6, kept, "saved")]


def _line(fields: Sequence[Field], width: int) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for place, field in enumerate(fields):
        line.append(GAP if place else "")
        _append(line, field)
    line.truncate(width, overflow="ellipsis")
    return line


def _append(line: Text, field: Field) -> None:
    if field.name:
        line.append(f"{field.name} ", "dim")
    line.append(field.value, field.style)
