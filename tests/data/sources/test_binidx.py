"""Pairs of .bin and .idx, taken apart and put together by hand as the format says, beside the code under test."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from infctx.data.sources.binidx import write_binidx
from infctx.data.sources.catalog import scan
from infctx.data.sources.records import Record, Rejection, Unit
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]

FORMATS = {1: "B", 2: "b", 3: "<h", 4: "<i", 5: "<q", 8: "<H"}


def index_bytes(
    sizes: Sequence[int], pointers: Sequence[int], documents: Sequence[int], *, code: int = 8, version: int = 1
) -> bytes:
    return b"".join(
        [
            b"MMIDIDX\x00\x00",
            struct.pack("<Q", version),
            struct.pack("<B", code),
            struct.pack("<Q", len(sizes)),
            struct.pack("<Q", len(documents)),
            struct.pack(f"<{len(sizes)}i", *sizes),
            struct.pack(f"<{len(pointers)}q", *pointers),
            struct.pack(f"<{len(documents)}q", *documents),
        ]
    )


def write_pair(folder: Path, items: Sequence[Sequence[int]], documents: Sequence[int], *, code: int = 8) -> Path:
    width = struct.calcsize(FORMATS[code])
    content, pointers = b"", []
    for item in items:
        pointers.append(len(content))
        content += b"".join(struct.pack(FORMATS[code], token) for token in item)
    (folder / "x.bin").write_bytes(content)
    (folder / "x.idx").write_bytes(index_bytes([len(item) for item in items], pointers, documents, code=code))
    assert len(content) == width * sum(map(len, items))
    return folder / "x.idx"


@pytest.mark.parametrize("code", FORMATS)
def test_every_type_of_integer(tmp_path: Path, read_all: ReadAll, code: int) -> None:
    largest = {1: 255, 2: 127, 3: 32_767, 4: 2**31 - 1, 5: 2**31 - 1, 8: 65_535}[code]
    file = write_pair(tmp_path, [[1, 2, 0], [largest, 0]], [0, 1, 2], code=code)
    records, rejected = read_all(file)
    tokens = [record.tokens for record in records]
    assert [ids.tolist() for ids in tokens if ids is not None] == [[1, 2, 0], [largest, 0]]
    assert {ids.dtype for ids in tokens if ids is not None} == {
        np.dtype(np.uint16 if code in (1, 2, 3, 8) else np.int32)
    }
    assert [(record.fields, record.origin) for record in records] == [({}, f"{file}:1"), ({}, f"{file}:2")]
    assert rejected == []


def test_documents_join_their_items_wherever_these_lie(tmp_path: Path, read_all: ReadAll) -> None:
    # An odd place: nothing in the format aligns items.
    (tmp_path / "x.bin").write_bytes(b"\xff" + struct.pack("<6H", 10, 11, 12, 13, 14, 15))
    places = [9, 1, 3, 5, 7]
    (tmp_path / "x.idx").write_bytes(index_bytes([2, 1, 0, 2, 1], places, [0, 2, 2, 5]))
    records, _ = read_all(tmp_path / "x.bin")
    assert [record.tokens.tolist() for record in records if record.tokens is not None] == [
        [14, 15, 10],
        [],
        [12, 13, 13],
    ]


def test_more_documents_than_a_block_of_the_index(tmp_path: Path, read_all: ReadAll) -> None:
    documents = [[number % 1000, number // 1000, 0][number % 3 :] for number in range(2**16 + 3)]
    write_binidx(f"{tmp_path}/x", documents, vocab_size=65536)
    records, _ = read_all(f"{tmp_path}/x", "binidx")
    assert [record.tokens.tolist() for record in records if record.tokens is not None] == documents
    assert records[-1].line == len(documents)


@pytest.mark.parametrize(
    ("code", "token", "reason"),
    [(4, -1, "token id -1: expected 0..2147483647"), (5, 2**31, "token id 2147483648"), (2, -128, "token id -128")],
)
def test_what_is_no_id_costs_its_document_only(
    tmp_path: Path, read_all: ReadAll, code: int, token: int, reason: str
) -> None:
    file = write_pair(tmp_path, [[1], [2, token], [3]], [0, 1, 2, 3], code=code)
    records, rejected = read_all(file)
    assert [record.line for record in records] == [1, 3]
    assert [(row.file, row.line) for row in rejected] == [(str(file), 2)]
    assert reason in rejected[0].reason


GOOD = index_bytes([2, 1], [0, 4], [0, 1, 2])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "expected an index that begins with"),
        (b"PK\x03\x04" * 30, "expected an index that begins with"),
        (GOOD[:20], "20 bytes, fewer than its header has"),
        (GOOD[:-1], "81 bytes where its header asks for 82"),
        (GOOD + b"\x00", "83 bytes where its header asks for 82"),
        (index_bytes([2, 1], [0, 4], [0, 1, 2], version=2), "expected version 1 of the index format, got 2"),
        (index_bytes([2, 1], [0, 4], [0, 1, 2], code=6), "got the code 6"),
        (index_bytes([2, 1], [0, 4], [0, 1, 2], code=7), "got the code 7"),
        (index_bytes([2, 1], [0, 4], [0, 1, 2], code=0), "got the code 0"),
        (index_bytes([2, 1], [0, 4], []), "a list of documents without its end"),
        (index_bytes([2, 1], [0, 4], [1, 2]), "documents from item 1 to 2 where there are items 0 to 2"),
        (index_bytes([2, 1], [0, 4], [0, 1]), "documents from item 0 to 1 where there are items 0 to 2"),
        (index_bytes([2, 1], [0, 4], [0, 2, 1, 2]), "document 3 beginning before document 2"),
        (index_bytes([2, 2], [0, 4], [0, 1, 2]), "item 1 of 4 bytes from byte 4 of a .bin of 6"),
        (index_bytes([2, 1], [0, 2**63 - 1], [0, 1, 2]), "item 1 of 2 bytes from byte 9223372036854775807"),
        (index_bytes([2, 1], [-2, 4], [0, 1, 2]), "item 0 of 4 bytes from byte -2"),
        (index_bytes([-1, 1], [0, 4], [0, 1, 2]), "item 0 of -2 bytes"),
        (GOOD[:18] + struct.pack("<QQ", 2**63, 2**63) + GOOD[34:], "bytes where its header asks for"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, read_all: ReadAll, index: bytes, message: str) -> None:
    (tmp_path / "x.bin").write_bytes(struct.pack("<3H", 1, 2, 3))
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(DataError, match=message) as caught:
        read_all(tmp_path / "x.idx")
    assert str(caught.value).startswith(f"{tmp_path}/x.idx: ")


def test_a_pair_without_its_bin_is_refused(tmp_path: Path, read_all: ReadAll) -> None:
    (tmp_path / "x.idx").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"x\.bin: expected a readable file"):
        read_all(tmp_path / "x.idx")


def test_a_pair_without_documents_is_no_error(tmp_path: Path, read_all: ReadAll) -> None:
    assert write_binidx(f"{tmp_path}/x", [], vocab_size=65536) == (0, 0)
    assert read_all(tmp_path / "x.idx") == ([], [])


def test_the_scan_covers_both_files(tmp_path: Path) -> None:
    write_binidx(f"{tmp_path}/x", [[1, 2]], vocab_size=65536)
    index, ids = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    hashes = "".join(hashlib.sha256(content).hexdigest() for content in (index, ids))
    found = scan(f"{tmp_path}/x.idx", format="auto", unit_bytes=1)
    assert (found.digest, found.num_bytes) == (hashlib.sha256(hashes.encode()).hexdigest(), len(index) + len(ids))
    assert found.units == [Unit(format="binidx", path=f"{tmp_path}/x.idx")]


# Writing


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(65536, 8, "H"), (65537, 4, "i")])
@pytest.mark.parametrize("ending", ["", ".idx", ".bin"])
def test_what_is_written_is_the_format(tmp_path: Path, vocab_size: int, code: int, letter: str, ending: str) -> None:
    documents = [[5, 6, 0], np.array([65535, 0], dtype=np.uint16), [], np.array([7], dtype=np.int64)]
    counts = write_binidx(f"{tmp_path}/v1.5{ending}", iter(documents), vocab_size=vocab_size)
    assert counts == (4, 6)
    width = struct.calcsize(letter)
    assert (tmp_path / "v1.5.bin").read_bytes() == struct.pack(f"<6{letter}", 5, 6, 0, 65535, 0, 7)
    pointers = [0, 3 * width, 5 * width, 5 * width]
    assert (tmp_path / "v1.5.idx").read_bytes() == index_bytes([3, 2, 0, 1], pointers, [0, 1, 2, 3, 4], code=code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.5.bin", "v1.5.idx"]


@pytest.mark.parametrize(("token", "shown"), [(100, "100"), (-1, "-1")])
def test_an_id_outside_the_vocabulary_leaves_an_earlier_pair_as_it_was(tmp_path: Path, token: int, shown: str) -> None:
    write_binidx(f"{tmp_path}/x", [[1]], vocab_size=100)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=rf"x\.bin: document 2: token id {shown}: expected 0\.\.99"):
        write_binidx(f"{tmp_path}/x", [[99], [1, token, 2]], vocab_size=100)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_source_that_fails_leaves_no_files(tmp_path: Path) -> None:
    def documents() -> object:
        yield [1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_binidx(f"{tmp_path}/x", documents(), vocab_size=100)
    assert list(tmp_path.iterdir()) == []


def test_a_pair_is_replaced(tmp_path: Path, read_all: ReadAll) -> None:
    write_binidx(f"{tmp_path}/x", [[1], [2]], vocab_size=100)
    write_binidx(f"{tmp_path}/x", [[3]], vocab_size=100)
    ((record,), _) = read_all(f"{tmp_path}/x.idx")
    assert record.tokens is not None
    assert record.tokens.tolist() == [3]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere/x: expected a place to write to, got: No such file"):
        write_binidx(f"{tmp_path}/nowhere/x", [[1]], vocab_size=100)
