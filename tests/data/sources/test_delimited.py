"""CSV and TSV: what is a row, what is refused, and that a bad row costs itself only."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from infctx.data.sources.records import Record, Rejection
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]


def write(tmp_path: Path, content: bytes, name: str = "rows.csv") -> Path:
    file = tmp_path / name
    file.write_bytes(content)
    return file


def test_quotes_newlines_and_blank_lines(tmp_path: Path, read_all: ReadAll) -> None:
    content = b'\xef\xbb\xbf"text",n\r\n"a, ""b""\r\nc\n",1\r\n\r\nd\xc3\xa9\x00,2\r\n,'
    file = write(tmp_path, content)
    records, rejected = read_all(file)
    assert [record.fields for record in records] == [
        {"text": 'a, "b"\r\nc\n', "n": "1"},
        {"text": "dé\x00", "n": "2"},
        {"text": "", "n": ""},
    ]
    assert [record.origin for record in records] == [f"{file}:1", f"{file}:2", f"{file}:3"]
    assert rejected == []


def test_tabs(tmp_path: Path, read_all: ReadAll) -> None:
    records, _ = read_all(write(tmp_path, b'a\tb\nx,y\t"1\t2"\n', "rows.tsv"))
    assert [record.fields for record in records] == [{"a": "x,y", "b": "1\t2"}]


def test_lone_carriage_returns_end_rows(tmp_path: Path, read_all: ReadAll) -> None:
    records, _ = read_all(write(tmp_path, b"a,b\r1,2\r3,4"))
    assert [record.fields for record in records] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1,2,3", "expected 2 fields as in the header, got 3"),
        (b"1", "expected 2 fields as in the header, got 1"),
        (b"fine,caf\xe9", "not valid UTF-8: byte 0xE9 in field 2"),
        # The beginning of a character that the end of the line breaks off.
        (b"1,\xe2\x82", "not valid UTF-8: byte 0xE2 in field 2"),
        # A surrogate, which UTF-8 does not hold.
        (b"1,\xed\xb2\x80", "not valid UTF-8: byte 0xED in field 2"),
        (b'"1"x,2', "not valid as a table"),
    ],
)
def test_a_bad_row_costs_itself_only(tmp_path: Path, read_all: ReadAll, row: bytes, reason: str) -> None:
    file = write(tmp_path, b"a,b\nbefore,0\n" + row + b"\nafter,0\n")
    records, rejected = read_all(file)
    assert [(record.fields["a"], record.line) for record in records] == [("before", 1), ("after", 3)]
    assert [(item.file, item.line) for item in rejected] == [(str(file), 2)]
    assert reason in rejected[0].reason


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest_in_silence(tmp_path: Path, read_all: ReadAll) -> None:
    records, rejected = read_all(write(tmp_path, b'a,b\n1,2\n3,"4\n5,6\n'))
    assert [record.line for record in records] == [1]
    assert [(item.line, item.reason) for item in rejected] == [(2, "a quote is opened and never closed")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,a,c,c\n", r"expected a different name for every column, got \['a', 'c'\] more than once"),
        (b"a,,b\n", "expected a name for every column, got none for column 2"),
        (b",\n", "got none for column 1"),
        (b"a,caf\xe9\n", "the header row is not valid UTF-8: byte 0xE9 in field 2"),
        (b'"a"b,c\n', "expected a header row, got a row that cannot be read"),
        (b'"a\n', "expected a header row, got a row that cannot be read: a quote is opened"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(
    tmp_path: Path, read_all: ReadAll, content: bytes, message: str
) -> None:
    file = write(tmp_path, content + b"1,2\n")
    with pytest.raises(DataError, match=message) as caught:
        read_all(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\r\n", b"a,b\n", b"a,b"])
def test_a_file_without_rows_is_no_error(tmp_path: Path, read_all: ReadAll, content: bytes) -> None:
    assert read_all(write(tmp_path, content)) == ([], [])


def test_a_field_of_64_megabytes(tmp_path: Path, read_all: ReadAll) -> None:
    records, rejected = read_all(write(tmp_path, b'a,b\n"%s",1\n' % (b"line\n" * (2**26 // 5))))
    assert [len(str(record.fields["a"])) for record in records] == [2**26 // 5 * 5]
    assert rejected == []


def test_the_longest_field_is_bounded_for_the_process() -> None:
    assert csv.field_size_limit() == 2**28
