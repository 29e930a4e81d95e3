"""JSON lines: what is read, what is refused, and that a bad row costs itself only."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from infctx.data.sources.catalog import read_unit, whole
from infctx.data.sources.records import Record, Rejection, Unit
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]


def texts(records: list[Record]) -> list[object]:
    return [record.fields["text"] for record in records]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "rows.JSONL"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two\\r\\n\xe2\x80\xa8"}\n{"text": "three"}')
    records, rejected = read_all(file)
    assert texts(records) == ["one", "two\r\n\u2028", "three"]
    assert [record.origin for record in records] == [f"{file}:1", f"{file}:4", f"{file}:5"]
    assert rejected == []


NESTED = 100_000
BAD_LINES = [
    (b'{"text": "\xff"}', "not valid UTF-8: byte 0xFF at byte offset 10 of the line"),
    (b"\x00\x00\x00\x00", "not valid JSON"),
    (b'{"text": "a\x00b"}', "not valid JSON: Invalid control character"),
    (b'{"text": "one"', "not valid JSON"),
    (b'{"text": 1} {"text": 2}', "not valid JSON: Extra data at column 13"),
    (b'["text"]', "expected a JSON object, got an array"),
    (b'"text"', "expected a JSON object, got a string"),
    (b"12", "expected a JSON object, got a number"),
    (b"1.5", "expected a JSON object, got a number"),
    (b"true", "expected a JSON object, got a truth value"),
    (b"null", "expected a JSON object, got null"),
    (b"[" * NESTED, "nested too deeply"),
    (b'{"a":' * NESTED + b"1" + b"}" * NESTED, "nested too deeply"),
    (b'{"text": ' + b"[" * NESTED + b"]" * NESTED + b"}", "nested too deeply"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
    (b'{"text": "one", "x": 1, "text": "two"}', 'duplicate key "text"'),
    (b'{"turns": [{"text": "one", "text": "one"}]}', 'duplicate key "text"'),
    (b'{"a\\nb": 1, "a\\u000ab": 2}', r'duplicate key "a\nb"'),
    (b'{"%s": 1, "%s": 2}' % (b"k" * 500, b"k" * 500), f'duplicate key "{"k" * 79}...'),
    # Only the file's first line may begin with a byte order mark.
    (b'\xef\xbb\xbf{"text": "late mark"}', "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[str(number) for number in range(len(BAD_LINES))])
def test_a_bad_line_costs_itself_only(tmp_path: Path, read_all: ReadAll, line: bytes, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    records, rejected = read_all(file)
    assert texts(records) == ["before", "after"]
    assert [(row.file, row.line) for row in rejected] == [(str(file), 2)]
    assert reason in rejected[0].reason
    assert len(rejected[0].reason) < 200


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (b'"a\\u0000b"', "a\x00b"),
        (b'"\\ud800"', "\ud800"),
        (b'"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        (b"Infinity", math.inf),
        (b"-Infinity", -math.inf),
        (b"1" * 4000, int("1" * 4000)),
        (b"{}", {}),
    ],
)
def test_what_json_allows_is_kept(tmp_path: Path, read_all: ReadAll, value: bytes, read: object) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": %s}\n' % value)
    assert texts(read_all(file)[0]) == [read]


def test_nan_is_a_number(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": NaN}\n')
    ((value,), _) = texts(read_all(file)[0]), None
    assert isinstance(value, float)
    assert math.isnan(value)


def test_a_line_of_64_megabytes(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "%s"}\n{"text": "after"}\n' % (b"long " * (2**26 // 5)))
    records, rejected = read_all(file)
    assert [len(str(text)) for text in texts(records)] == [2**26 // 5 * 5, 5]
    assert rejected == []


@pytest.mark.parametrize("start", [b"[\n", b"{\n", b"\xef\xbb\xbf[\n", b'[{"text": "one"}]\n'])
def test_json_over_several_lines_is_told_how_to_become_lines(tmp_path: Path, read_all: ReadAll, start: bytes) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(start + b"[\n")
    _, rejected = read_all(file)
    assert [row.line for row in rejected] == [1, 2]
    assert "jq -c" in rejected[0].reason
    assert "jq" not in rejected[1].reason


def test_reading_stops_where_on_reject_raises(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "before"}\n[]\n{"text": "after"}\n')

    def stop(rejection: Rejection) -> None:
        raise DataError(rejection.reason)

    records = read_unit(whole(str(file), format="auto"), on_reject=stop)
    assert next(records).fields == {"text": "before"}
    with pytest.raises(DataError, match="an array"):
        next(records)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n \n"])
def test_a_file_without_rows_is_no_error(tmp_path: Path, read_all: ReadAll, content: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    assert read_all(file) == ([], [])


# Units


LINES = b'{"text": "0"}\n{"text": "1"}\n\n{"text": "3"}\n'


def unit_of(file: Path, begin: int, end: int | None, first_line: int) -> Unit:
    return Unit(format="jsonl", path=str(file), begin=begin, end=end, first_line=first_line)


@pytest.mark.parametrize(
    ("begin", "end", "first_line", "read"),
    [
        (0, 14, 1, [("0", 1)]),
        # Every line that begins before the end, whole.
        (0, 15, 1, [("0", 1), ("1", 2)]),
        (14, 29, 2, [("1", 2)]),
        (28, None, 3, [("3", 4)]),
        (14, 14, 2, []),
        (43, 43, 5, []),
    ],
)
def test_a_unit_is_the_lines_that_begin_in_it(
    tmp_path: Path, read_all: ReadAll, begin: int, end: int | None, first_line: int, read: list[tuple[str, int]]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINES)
    records, _ = read_all(unit_of(file, begin, end, first_line))
    assert [(record.fields["text"], record.line) for record in records] == read


@pytest.mark.parametrize(
    ("begin", "end", "message"),
    [(13, 28, "no line begins at byte 13"), (99, None, "no line begins at byte 99"), (28, 50, "ends at byte 43")],
)
def test_a_unit_of_another_file_is_noticed(
    tmp_path: Path, read_all: ReadAll, begin: int, end: int | None, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINES)
    with pytest.raises(DataError, match=f"{message}.*it has changed"):
        read_all(unit_of(file, begin, end, 2))


def test_only_the_unit_at_the_beginning_may_have_a_byte_order_mark(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "0"}\n\xef\xbb\xbf{"text": "1"}\n')
    assert texts(read_all(unit_of(file, 0, 17, 1))[0]) == ["0"]
    records, rejected = read_all(unit_of(file, 17, None, 2))
    assert (records, [row.line for row in rejected]) == ([], [2])
