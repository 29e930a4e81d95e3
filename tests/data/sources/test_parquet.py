"""Parquet: rows as Python values, parts of a file, and damage."""

import datetime
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from infctx.data.sources.catalog import read_unit, scan, whole
from infctx.data.sources.records import Record, Rejection, Unit
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]


def write(file: Path, columns: dict[str, object], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file


def test_rows_are_values_of_python(tmp_path: Path, read_all: ReadAll) -> None:
    turns = [[{"role": "user", "content": "é"}], None]
    file = write(tmp_path / "x.parquet", {"text": ["a\x00b", None], "n": [1, 2], "turns": turns})
    records, rejected = read_all(file)
    assert [record.fields for record in records] == [
        {"text": "a\x00b", "n": 1, "turns": turns[0]},
        {"text": None, "n": 2, "turns": None},
    ]
    assert [record.origin for record in records] == [f"{file}:1", f"{file}:2"]
    assert rejected == []


def test_only_the_columns_that_are_asked_for(tmp_path: Path, read_all: ReadAll) -> None:
    file = write(tmp_path / "x.parquet", {"a": [1], "b": [2], "c": [3]})
    assert read_all(file, columns=("c", "a", "none"))[0][0].fields == {"a": 1, "c": 3}
    with pytest.raises(DataError, match=r"expected the columns \['none'\], got \['a', 'b', 'c'\]"):
        read_all(file, columns=("none",))


@pytest.mark.parametrize(("begin", "end"), [(0, None), (0, 10), (3, 7), (4, 8), (5, 6), (9, 10), (10, 10), (7, 7)])
def test_parts_are_rows_by_number(tmp_path: Path, read_all: ReadAll, begin: int, end: int | None) -> None:
    file = write(tmp_path / "x.parquet", {"n": list(range(10))}, row_group_size=4)
    records, _ = read_all(Unit(format="parquet", path=str(file), begin=begin, end=end, first_line=begin + 1))
    wanted = list(range(10))[begin:end]
    assert [(record.fields["n"], record.line) for record in records] == [(n, n + 1) for n in wanted]


def test_more_rows_than_there_are(tmp_path: Path, read_all: ReadAll) -> None:
    file = write(tmp_path / "x.parquet", {"n": list(range(10))})
    with pytest.raises(DataError, match="expected 11 rows as when the file was scanned, got 10"):
        read_all(Unit(format="parquet", path=str(file), begin=5, end=11))


@pytest.mark.parametrize(("unit_bytes", "sizes"), [(1, [4, 4, 2]), (10**9, [10])])
def test_units_are_merged_row_groups(tmp_path: Path, unit_bytes: int, sizes: list[int]) -> None:
    file = write(tmp_path / "x.parquet", {"n": list(range(10))}, row_group_size=4)
    units = scan(str(file), format="auto", unit_bytes=unit_bytes).units
    assert [(unit.end or 0) - unit.begin for unit in units] == sizes
    assert [unit.begin for unit in units] == [sum(sizes[:place]) for place in range(len(sizes))]
    assert [unit.first_line for unit in units] == [unit.begin + 1 for unit in units]


def test_two_row_groups_to_a_unit(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"n": list(range(12))}, row_group_size=3)
    group_bytes = pyarrow.parquet.ParquetFile(file).metadata.row_group(0).total_byte_size
    units = scan(str(file), format="auto", unit_bytes=2 * group_bytes).units
    assert [(unit.begin, unit.end) for unit in units] == [(0, 6), (6, 12)]


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
def test_a_table_without_rows_is_no_error(tmp_path: Path, read_all: ReadAll, unit_bytes: int) -> None:
    file = write(tmp_path / "x.parquet", {"text": pyarrow.array([], pyarrow.string())})
    assert read_all(file) == ([], [])
    (unit,) = scan(str(file), format="auto", unit_bytes=unit_bytes).units
    assert read_all(unit) == ([], [])


def test_a_value_that_python_cannot_hold_costs_its_row_only(tmp_path: Path, read_all: ReadAll) -> None:
    texts = pyarrow.array([b"a", b"caf\xe9", b"c"]).view(pyarrow.string())
    times = pyarrow.array([0, 0, 2**62], pyarrow.timestamp("us"))
    records, rejected = read_all(write(tmp_path / "x.parquet", {"text": texts, "time": times}))
    assert [record.fields for record in records] == [{"text": "a", "time": datetime.datetime(1970, 1, 1)}]
    assert [row.line for row in rejected] == [2, 3]
    assert "can't decode byte 0xe9" in rejected[0].reason


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    texts = [f"{number} " * 500 for number in range(20_000)]
    file = write(tmp_path / "x.parquet", {"text": texts}, compression="none", use_dictionary=False)
    assert file.stat().st_size > 50e6
    del texts
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in read_unit(whole(str(file), format="auto"), on_reject=print):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 20e6


def test_two_columns_of_one_name_are_refused(tmp_path: Path, read_all: ReadAll) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"expected a different name for every column, got \['a'\]"):
        read_all(tmp_path / "x.parquet")


@pytest.mark.parametrize("damage", ["empty", "short", "text", "middle"])
def test_a_damaged_file_is_named(tmp_path: Path, read_all: ReadAll, damage: str) -> None:
    file = write(tmp_path / "x.parquet", {"text": [f"{number}" * 9 for number in range(2000)]})
    content = file.read_bytes()
    middle = content[:100] + b"\xff" * 200 + content[300:]
    file.write_bytes({"empty": b"", "short": content[:-9], "text": b"text" * 99, "middle": middle}[damage])
    with pytest.raises(DataError, match=r"x\.parquet: expected a whole file"):
        read_all(file)
