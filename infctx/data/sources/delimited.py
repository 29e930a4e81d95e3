"""CSV and TSV: tables of text with a header row."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence

from infctx.data.sources.files import open_bytes
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.records import Record, Rejection, Unit
from infctx.errors import DataError

# In characters. Bounds the memory that a quote which is never closed can take. The limit is one for the whole process:
# it is set here, once, and never lowered.
_LONGEST_FIELD = 2**28
csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))

_DELIMITERS = {"csv": ",", "tsv": "\t"}
# Where errors="surrogateescape" puts the bytes 0x80..0xFF.
_ESCAPED_BYTES = 0xDC00


def read_delimited(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read the rows of a table, each a field for every column; blank lines are not rows.

    Quoting is that of Python's csv, strict: what follows a closing quote, or a quote that is never closed, is an error
    of its row.
    Raises: DataError also for a header without a name for every column, or with one twice.
    """
    with open_bytes(unit.path) as file:
        # An invalid byte then costs its own row only; newline="" leaves newlines within quotes alone.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = _rows(text, _DELIMITERS[unit.format])
        columns = _columns(next(rows, None), unit.path)
        for number, row in enumerate(rows, start=unit.first_line):
            problem = row if isinstance(row, str) else _problem(row, columns)
            if problem:
                on_reject(Rejection(file=unit.path, line=number, reason=problem))
                continue
            yield Record(fields=dict(zip(columns, row, strict=True)), file=unit.path, line=number)


def _rows(text: io.TextIOWrapper, delimiter: str) -> Iterator[list[str] | str]:
    """The rows, or what is wrong with one."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Python's word for a file that ends within quotes.
            is_open = "unexpected end of data" in str(error)
            yield "a quote is opened and never closed" if is_open else f"not valid as a table: {error}"
            continue
        if row:
            yield row


def _columns(header: list[str] | str | None, path: str) -> list[str]:
    if header is None:
        return []
    if isinstance(header, str):
        raise DataError(f"{path}: expected a header row, got a row that cannot be read: {header}.")
    invalid = _invalid_byte(header)
    if invalid:
        raise DataError(f"{path}: the header row is {invalid}. Save the file as UTF-8.")
    repeated = [name for name, count in Counter(header).items() if count > 1 and name]
    if repeated:
        raise DataError(f"{path}: expected a different name for every column, got {repeated} more than once.")
    if "" in header:
        raise DataError(f"{path}: expected a name for every column, got none for column {header.index('') + 1}.")
    return header


def _problem(row: Sequence[str], columns: Sequence[str]) -> str | None:
    if len(row) != len(columns):
        return f"expected {len(columns)} fields as in the header, got {len(row)}"
    return _invalid_byte(row)


def _invalid_byte(row: Sequence[str]) -> str | None:
    for number, value in enumerate(row, start=1):
        if value.isascii():
            continue
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            byte = ord(value[error.start]) - _ESCAPED_BYTES
            return f"not valid UTF-8: byte 0x{byte:02X} in field {number}"
    return None
