"""What a reader gives: rows with their place, and the rows that are not usable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infctx.data.tokenizer import TokenIds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Record:
    """One row of a file before any template.

    Attributes:
        fields: the row's columns by name.
        file, line: its place; counted from 1. A table's rows are counted without its header.
        tokens: ids [n] where the file holds tokens already; no template is applied to them.
    """

    fields: Mapping[str, object]
    file: str
    line: int
    tokens: TokenIds | None = None

    @property
    def origin(self) -> str:
        """The place as "file:line"."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A row that is not usable, and why. `line` counts from 1 and is 1 for a plain-text file."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What one worker reads at a time.

    Attributes:
        begin, end: of JSON lines, byte offsets at the beginning of lines; of Parquet, row numbers; end None = to the
            end. Everything else is one unit a file.
        first_line: the number of the line at `begin`.
    """

    format: str
    path: str
    begin: int = 0
    end: int | None = None
    first_line: int = 1
