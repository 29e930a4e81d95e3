"""What is known of the data, for a terminal: in colour, or with brackets where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from infctx.data_view.excerpts import Piece, ShownDocument
from infctx.data_view.facts import DataFacts
from infctx.data_view.first_step import ShownRow, StepFacts
from infctx.data_view.wording import (
    EPOCH_COLUMNS,
    LENGTH_COLUMNS,
    LEVELS,
    counted,
    document_in_words,
    epoch_cells,
    ledger_lines,
    length_cells,
    sketch,
    step_in_words,
)
from infctx.visible_text import visible

PIPED_WIDTH = 120
BAR_CELLS = 30
SHOWN_REASONS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class _Signs:
    """What stands for something that is not text."""

    end: str
    start: str
    opens: str
    closes: str
    opens_id: str
    closes_id: str
    bar: str
    levels: str
    rule: str
    gap: str


_UNICODE = _Signs(
    end="⏹", start="▶", opens="⟦", closes="⟧", opens_id="‹", closes_id="›", bar="█", levels=LEVELS, rule="─", gap="…"
)
_ASCII = _Signs(
    end="<END>",
    start="|>",
    opens="{+",
    closes="+}",
    opens_id="(",
    closes_id=")",
    bar="#",
    levels=".:-=+*%@",
    rule="-",
    gap="...",
)


class _Terminal:
    """A console, and whether trained text has to be bracketed there."""

    def __init__(self, file: TextIO) -> None:
        # Everything is printed as Text, in which rich finds no markup.
        self.console = Console(file=file)
        if not self.console.is_terminal:
            # What is no terminal has no width of its own.
            self.console = Console(file=file, width=PIPED_WIDTH)
        self.signs = _ASCII if self.console.options.ascii_only else _UNICODE
        self.is_plain = self.console.color_system is None or self.console.no_color

    def line(self, text: Text | str = "", *, style: str = "") -> None:
        """Print text as it is; a terminal breaks long lines itself."""
        self.console.print(Text(text, style=style) if isinstance(text, str) else text, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Print a line above a part."""
        self.line()
        self.line(text, style="bold")

    def table(self, columns: tuple[str, ...], rows: list[list[str | Text]]) -> None:
        """Print a table: names and what has no name left, numbers right."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if number and column else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        self.console.print(table)

    def weighted(self, text: str, weight: float, *, is_sign: bool = False) -> Text:
        """Text as its weight as a target makes it look."""
        if not self.is_plain:
            style = _style(weight)
            return Text(text, style=f"{style} reverse" if is_sign else style)
        if not is_sign:
            # A bracket of the text itself would pass for one of ours.
            for sign in (self.signs.opens, self.signs.closes, self.signs.end, self.signs.start):
                text = text.replace(sign, "\ufffd" if self.signs is _UNICODE else "?")
        if weight == 0:
            return Text(text)
        factor = "" if weight == 1 else f"{weight:g}×: " if self.signs is _UNICODE else f"{weight:g}x: "
        return Text(f"{self.signs.opens}{factor}{text}{self.signs.closes}")


def _style(weight: float) -> str:
    if weight == 0:
        return "dim"
    if weight == 1:
        return "green"
    return "yellow" if weight < 1 else "bold magenta"


def show_data(facts: DataFacts, *, file: TextIO) -> None:
    """Print everything that is known of the data."""
    terminal = _Terminal(file)
    if facts.documents:
        terminal.line(_legend(terminal))
    for document in facts.documents:
        _show_document(terminal, document, is_set_named=len(facts.sets) > 1)
    _show_sets(terminal, facts)
    _show_lengths(terminal, facts)
    _show_ledger(terminal, facts)
    if facts.first_step is not None:
        _show_first_step(terminal, facts.first_step)
    _show_warnings(terminal, facts)


def _legend(terminal: _Terminal) -> Text:
    entries = [
        terminal.weighted("trained", 1.0),
        terminal.weighted("weight below 1", 0.5),
        terminal.weighted("weight above 1", 2.0),
        terminal.weighted("masked: read, not trained", 0.0),
        Text(f"{terminal.signs.end} end of text"),
    ]
    return Text("   ").join(entries)


def _show_document(terminal: _Terminal, document: ShownDocument, *, is_set_named: bool) -> None:
    terminal.console.rule(characters=terminal.signs.rule, style="dim")
    counts = f"  {document_in_words(document, is_set_named=is_set_named)}"
    terminal.line(Text.assemble((document.origin, "bold"), counts))
    text = Text()
    shown = 0
    for excerpt in document.excerpts:
        if excerpt.begin > shown:
            text.append(_gap(terminal, excerpt.begin - shown), style="italic")
        for piece in excerpt.pieces:
            text.append_text(_piece(terminal, piece))
        shown = excerpt.end
    terminal.line(text)


def _gap(terminal: _Terminal, num_tokens: int) -> str:
    return f"\n{terminal.signs.gap} {num_tokens:,} tokens {terminal.signs.gap}\n"


def _piece(terminal: _Terminal, piece: Piece) -> Text:
    if piece.is_end:
        return terminal.weighted(terminal.signs.end, piece.weight, is_sign=True)
    return terminal.weighted(piece.text, piece.weight)


def _show_sets(terminal: _Terminal, facts: DataFacts) -> None:
    terminal.heading("Sets")
    terminal.table(EPOCH_COLUMNS, [[*epoch_cells(one)] for one in facts.sets])


def _show_lengths(terminal: _Terminal, facts: DataFacts) -> None:
    lengths = facts.lengths
    most = max(bucket.num_documents for bucket in lengths.buckets)
    total = sum(bucket.num_tokens for bucket in lengths.buckets)
    rows: list[list[str | Text]] = []
    for bucket in lengths.buckets:
        # Rounded up: a bucket with few documents is not an empty one.
        cells = -(-BAR_CELLS * bucket.num_documents // most)
        bar = Text(terminal.signs.bar * cells, style="green")
        share = f"{bucket.num_tokens / total:.1%}"
        rows.append([f"{bucket.first:,} to {bucket.last:,}", bar, f"{bucket.num_documents:,}", share])
    terminal.heading("Lengths in tokens")
    terminal.table(("tokens", "", "documents", "of all tokens"), rows)
    terminal.line()
    by_set = facts.sets if len(facts.sets) > 1 else ()
    named = [("all", lengths), *((visible(one.name), one.lengths) for one in by_set)]
    shapes = [sketch(of_name, lengths, terminal.signs.levels) for _, of_name in named]
    quantiles: list[list[str | Text]] = [
        [name, *length_cells(of_name), shape] for (name, of_name), shape in zip(named, shapes, strict=True)
    ]
    terminal.table((*LENGTH_COLUMNS, ""), quantiles)


def _show_ledger(terminal: _Terminal, facts: DataFacts) -> None:
    terminal.heading("Ledger")
    for line in ledger_lines(facts.account):
        terminal.line(line)
    for rows in facts.rejected[:SHOWN_REASONS]:
        more = ", ..." if rows.num_rows > len(rows.places) else ""
        terminal.line(
            f"  {counted(rows.num_rows, 'row')}: {rows.reason} ({', '.join(rows.places)}{more})", style="yellow"
        )
    if len(facts.rejected) > SHOWN_REASONS:
        terminal.line(f"  and rows with {len(facts.rejected) - SHOWN_REASONS:,} other reasons", style="yellow")


def _show_first_step(terminal: _Terminal, step: StepFacts) -> None:
    terminal.heading("First step")
    terminal.line(step_in_words(step))
    terminal.line(
        f"{terminal.signs.start} a document starts, with a fresh state; colours are of the targets, numbers are ids",
        style="dim",
    )
    for row in step.rows:
        terminal.line(_row(terminal, row))
    if step.num_rows > len(step.rows):
        terminal.line(f"and {counted(step.num_rows - len(step.rows), 'more row')}", style="italic")


def _row(terminal: _Terminal, row: ShownRow) -> Text:
    text = Text(f"row {row.row}" if row.group == 0 else f"row {row.row} of group {row.group}", style="")
    text.append(f"  {counted(row.num_tokens, 'token')}, {counted(row.num_starts, 'start')}\n  ", style="dim")
    for token in row.tokens:
        if token.is_start:
            text.append(terminal.signs.start, style="bold")
        shown = terminal.signs.end if token.is_end else token.text
        text.append_text(terminal.weighted(shown, token.weight, is_sign=token.is_end))
        text.append(f"{terminal.signs.opens_id}{token.id}{terminal.signs.closes_id} ", style="dim")
    if row.num_tokens > len(row.tokens):
        text.append(terminal.signs.gap)
    return text


def _show_warnings(terminal: _Terminal, facts: DataFacts) -> None:
    terminal.heading("Warnings")
    if not facts.warnings:
        terminal.line("none")
    for advice in facts.warnings:
        terminal.line(f"! {visible(advice.seen)}", style="yellow")
        if advice.places:
            terminal.line(f"  {advice.where()}")
        terminal.line(f"  {advice.to_do}")
