"""Where a token of the first step is: its row, its chunk, its document, and the row of the file."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from infctx.data.chunking import RowSlice
from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.step_source import StepData
from infctx.errors import DataError

LISTED_ROWS = 12
_PLACE = re.compile(r"(?::(?P<line>\d+))?(?: \[tokens (?P<offset>\d+)-\d+\])?")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenPlace:
    """A token of a step.

    Attributes:
        row, token: in the step, and in the row's part of the step; from 0, as all that follows.
        group, group_row: the group of rows that are computed at once, and the row in it.
        row_slice: the row's part of the step.
        chunk, chunk_token: the chunk, and the place in it.
        document: that the token is of.
        document_begin: where the document begins in the row.
        document_token: the place in the document.
        set_index: of the set of a mixture.
        file, line: of the row that the token was read from.
        row_token: the place among the tokens of that row.
    """

    row: int
    token: int
    group: int
    group_row: int
    row_slice: RowSlice
    chunk: int
    chunk_token: int
    document: Document
    document_begin: int
    document_token: int
    set_index: int
    file: str
    line: int
    row_token: int

    @property
    def token_id(self) -> int:
        """Of the token itself, which the model reads here."""
        return int(self.row_slice.tokens[self.token])

    @property
    def target_id(self) -> int | None:
        """Of the token that is predicted here; None at a document's end, where nothing follows."""
        if self.document_token == len(self.document) - 1:
            return None
        return int(self.row_slice.targets[self.token])

    @property
    def target_weight(self) -> float:
        """Of the target, in this step."""
        return float(self.row_slice.weights[self.token])


def find_token(step: StepData, documents: DocumentSet, row: int, token: int) -> TokenPlace:
    """Look up a token of the first step.

    Args:
        row: of all rows of the step. token: in the row.
    Raises:
        DataError: there is no such row, or no such token in it; says which there are.
    """
    places = [(group, number) for group, chunks in enumerate(step.groups) for number in range(len(chunks.chunks.rows))]
    rows = [step.groups[group].chunks.rows[number] for group, number in places]
    if row >= len(rows):
        raise DataError(f"--trace-token {row}:{token}: the first step has no row {row}. {_rows_in_words(rows)}")
    row_slice = rows[row]
    if token >= len(row_slice):
        padded = step.groups[places[row][0]].chunks.num_tokens
        is_padding = f" From {len(row_slice):,} to {padded - 1:,} it is padding." if token < padded else ""
        raise DataError(
            f"--trace-token {row}:{token}: row {row} of the first step has no token {token:,}.{is_padding} "
            f"{_rows_in_words(rows)}"
        )
    document_begin = int(np.flatnonzero(row_slice.starts[: token + 1])[-1])
    number = int(np.count_nonzero(row_slice.starts[: token + 1])) - 1
    set_index = 0 if row_slice.sets is None else int(row_slice.sets[token])
    index = _document_of(documents, row_slice.origins[number], set_index)
    document_token = token - document_begin
    file, line, row_token = _row_of(documents, index, document_token)
    chunk, chunk_token = divmod(token, step.chunk_tokens)
    return TokenPlace(
        row=row,
        token=token,
        group=places[row][0],
        group_row=places[row][1],
        row_slice=row_slice,
        chunk=chunk,
        chunk_token=chunk_token,
        document=documents[index],
        document_begin=document_begin,
        document_token=document_token,
        set_index=set_index,
        file=file,
        line=line,
        row_token=row_token,
    )


def _rows_in_words(rows: list[RowSlice]) -> str:
    listed = ", ".join(f"{number}:0 to {number}:{len(row) - 1}" for number, row in enumerate(rows) if len(row))
    if len(rows) > LISTED_ROWS:
        longest = max(range(len(rows)), key=lambda number: len(rows[number]))
        listed = f"rows 0 to {len(rows) - 1:,}; the longest, row {longest}, has {len(rows[longest]):,} tokens"
    return f"There are (ROW:T) {listed}."


def _document_of(documents: DocumentSet, origin: str, set_index: int) -> int:
    """The number of the document that says it comes from there, without looking at each of millions."""
    mine = np.flatnonzero(documents.set_indices == set_index)
    entries = documents.entries[mine]
    for number, name in enumerate(documents.files[set_index]):
        rest = _PLACE.fullmatch(origin[len(name) :]) if origin.startswith(name) else None
        if rest is None:
            continue
        is_meant = (entries["file"] == number) & (entries["line"] == int(rest["line"] or 0))
        for index in mine[is_meant & (entries["offset"] == int(rest["offset"] or 0))].tolist():
            if documents.origin(index) == origin:
                return int(index)
    raise AssertionError(f"no document comes from {origin}")


def _row_of(documents: DocumentSet, index: int, document_token: int) -> tuple[str, int, int]:
    """File, line, and place in the row's tokens: a document of joined rows has tokens of several."""
    entry, set_index = documents.entries[index], int(documents.set_indices[index])
    at = int(entry["begin"]) + document_token
    of_rows = documents.stores[set_index].index
    found = int(np.searchsorted(of_rows["end"], at, "right"))
    if found < len(of_rows) and of_rows["begin"][found] <= at:
        entry = of_rows[found]
    file = documents.files[set_index][int(entry["file"])]
    return file, int(entry["line"]), int(entry["offset"]) + at - int(entry["begin"])
