"""Parquet: tables in row groups, read a few rows at a time."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from infctx.data.sources.files import damaged, is_url, open_bytes, require_package, unchanged
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.records import Record, Rejection, Unit
from infctx.errors import DataError, machine_fault

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BATCH_BYTES = 2**22
_MOST_BATCH_ROWS = 1024
_BUFFER_BYTES = 2**20


def read_parquet(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read the rows from `begin` up to `end` as values of Python.

    Raises: DataError also where the file has none of the columns of the options, or fewer rows than `end`.
    """
    with _open_table(unit.path) as table:
        columns = _columns(table, options, unit.path)
        row = unit.begin
        for batch in _batches(table, unit, columns):
            for number, fields in enumerate(_to_rows(batch), start=row + 1):
                if isinstance(fields, str):
                    on_reject(Rejection(file=unit.path, line=number, reason=fields))
                else:
                    yield Record(fields=fields, file=unit.path, line=number)
            row += batch.num_rows


def row_ranges(path: str, *, unit_bytes: int) -> list[tuple[int, int]]:
    """Merge neighbouring row groups to about unit_bytes of data; give the first row of each part, and the one after."""
    with _open_table(path) as table:
        ranges, begin, end, num_bytes = [], 0, 0, 0
        for group in map(table.metadata.row_group, range(table.metadata.num_row_groups)):
            if end > begin and num_bytes + group.total_byte_size > unit_bytes:
                ranges.append((begin, end))
                begin, num_bytes = end, 0
            end += group.num_rows
            num_bytes += group.total_byte_size
    return [*ranges, (begin, end)]


@contextlib.contextmanager
def _open_table(path: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    require_package("pyarrow", path=path)
    import pyarrow.parquet

    # Local files are read by pyarrow itself, which is faster.
    opened = open_bytes(path, decompress=False) if is_url(path) else unchanged(path)
    with opened as file:
        with _damage_told(path):
            table = pyarrow.parquet.ParquetFile(file or path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        with table:
            yield table


@contextlib.contextmanager
def _damage_told(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if machine_fault(error):
            raise
        raise damaged(path, error) from error


def _columns(table: pyarrow.parquet.ParquetFile, options: ReadOptions, path: str) -> list[str] | None:
    names: list[str] = table.schema_arrow.names
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: expected a different name for every column, got {repeated} more than once.")
    if options.columns is None:
        return None
    columns = [name for name in options.columns if name in names]
    if not columns:
        raise DataError(f"{path}: expected the columns {list(options.columns)}, got {names}.")
    return columns


def _batches(
    table: pyarrow.parquet.ParquetFile, unit: Unit, columns: list[str] | None
) -> Iterator[pyarrow.RecordBatch]:
    """The rows from begin up to end in small batches."""
    facts = table.metadata
    end = facts.num_rows if unit.end is None else unit.end
    if end > facts.num_rows:
        raise DataError(
            f"{unit.path}: expected {end} rows as when the file was scanned, got {facts.num_rows}: it has changed. "
            "Start again when nothing writes to it."
        )
    first_row = 0
    for number in range(facts.num_row_groups):
        group = facts.row_group(number)
        row, first_row = first_row, first_row + group.num_rows
        if first_row <= unit.begin or row >= end or not group.num_rows:
            continue
        row_bytes = max(1, group.total_byte_size // group.num_rows)
        num_rows = min(_MOST_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
        with _damage_told(unit.path):
            batches = table.iter_batches(num_rows, row_groups=[number], columns=columns, use_threads=False)
        while True:
            with _damage_told(unit.path):
                batch = next(batches, None)
            if batch is None:
                break
            skipped = max(0, unit.begin - row)
            wanted = batch.slice(skipped, max(0, min(batch.num_rows, end - row) - skipped))
            row += batch.num_rows
            if wanted.num_rows:
                yield wanted


def _to_rows(batch: pyarrow.RecordBatch) -> list[dict[str, object] | str]:
    """Each row's values, or why it has none: text that is not UTF-8, or a time that Python cannot hold."""
    try:
        rows: list[dict[str, object] | str] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [f"a value that Python cannot hold: {error}"]
    return [row for place in range(batch.num_rows) for row in _to_rows(batch.slice(place, 1))]
