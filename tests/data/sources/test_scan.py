"""One pass over a file: its hash, and units that together are the whole file."""

import bisect
import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from infctx.data.sources.catalog import scan, whole
from infctx.data.sources.files import BLOCK_BYTES
from infctx.data.sources.records import Record, Rejection
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]

LONG = b'{"text": "%s"}' % (b"long " * 50)

FILES = {
    "plain": b'{"text": "1"}\n{"text": "2"}\n{"text": "3"}\n',
    "crlf": b'{"text": "1"}\r\n\r\n{"text": "2"}\r\nbad\r\n{"text": "3"}\r\n',
    "mark": b'\xef\xbb\xbf{"text": "1"}\n\xef\xbb\xbf{"text": "2"}\n{"text": "3"}\n',
    "no_last_newline": b'{"text": "1"}\n{"text": "2"}\n{"text": "3"}',
    "blank": b'\n\n  \n{"text": "1"}\n\n\n{"text": "2"}\n\n\n\n',
    "bad": b'{"text": "1"}\n{"text": \n\xff\xff\n[1]\n{"text": "2"}\n{}x\n',
    "long": LONG + b"\n" + b'{"text": "1"}\n' + LONG + b"\n" + LONG,
    "lone_returns": b'{"text": "1"}\r{"text": "2"}\n\r{"text": "3"}\n',
    "one_line": LONG,
    "one_newline": b"\n",
    "empty": b"",
}


def placed(read: tuple[list[Record], list[Rejection]]) -> tuple[list[object], list[object]]:
    records, rejected = read
    return [(record.origin, record.fields) for record in records], list(rejected)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 13, 14, 15, 64, 10**9])
def test_units_back_to_back_are_the_whole_file(tmp_path: Path, read_all: ReadAll, name: str, unit_bytes: int) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(FILES[name])
    found = scan(str(file), format="auto", unit_bytes=unit_bytes)
    assert (found.digest, found.num_bytes) == (hashlib.sha256(FILES[name]).hexdigest(), len(FILES[name]))
    check_borders(FILES[name], [(unit.begin, unit.end, unit.first_line) for unit in found.units], unit_bytes)
    parts = [placed(read_all(unit)) for unit in found.units]
    together = [item for part in parts for item in part[0]], [item for part in parts for item in part[1]]
    assert together == placed(read_all(whole(str(file), format="jsonl")))


def check_borders(content: bytes, found: list[tuple[int, int | None, int]], unit_bytes: int) -> None:
    """Against the definition: the first line that begins at or after each multiple of unit_bytes."""
    starts = [0] + [match.end() for match in re.finditer(b"\n", content) if match.end() < len(content)]
    multiples = range(0, len(content), unit_bytes)
    places = sorted({bisect.bisect_left(starts, multiple) for multiple in multiples} - {len(starts)} | {0})
    borders = [starts[place] for place in places]
    ends = [*borders[1:], len(content)]
    assert found == [(begin, end, place + 1) for begin, end, place in zip(borders, ends, places, strict=True)]


def test_borders_around_the_blocks_that_are_read(tmp_path: Path) -> None:
    generator = random.Random(0)
    content = bytearray()
    while len(content) < 4 * BLOCK_BYTES:
        content += b"x" * generator.choice([0, 3, 100, 3000, 400_000, 1_500_000]) + b"\n"
    # A newline as the last byte of a block, and as the first of the next.
    content[BLOCK_BYTES - 1 : BLOCK_BYTES + 1] = b"\n\n"
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    for unit_bytes in (100_000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3_000_000):
        found = scan(str(file), format="jsonl", unit_bytes=unit_bytes)
        assert found.digest == hashlib.sha256(content).hexdigest()
        check_borders(bytes(content), [(unit.begin, unit.end, unit.first_line) for unit in found.units], unit_bytes)


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.tsv", "x.jsonl.gz", "x.txt.zst"])
def test_everything_else_is_one_unit(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"a\nb\n" * 1000)
    found = scan(f"{tmp_path}/{name}", format="auto", unit_bytes=10)
    assert (found.digest, found.num_bytes) == (hashlib.sha256(b"a\nb\n" * 1000).hexdigest(), 4000)
    assert found.units == [whole(f"{tmp_path}/{name}", format="auto")]


def test_units_end_where_the_file_ended_when_it_was_scanned(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(FILES["plain"])
    units = scan(str(file), format="auto", unit_bytes=20).units
    with file.open("ab") as more:
        more.write(b'{"text": "4"}\n')
    assert [record.line for unit in units for record in read_all(unit)[0]] == [1, 2, 3]


def test_a_file_that_was_cut_short_after_the_scan(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(FILES["plain"])
    units = scan(str(file), format="auto", unit_bytes=20).units
    file.write_bytes(FILES["plain"][:28])
    with pytest.raises(DataError, match="it has changed"):
        read_all(units[-1])


@pytest.mark.parametrize("make", [lambda: scan("x", format="words", unit_bytes=1), lambda: whole("x", format="words")])
def test_an_unknown_format_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(DataError, match=r"data\.format=words: expected auto or one of jsonl, text, csv"):
        make()
