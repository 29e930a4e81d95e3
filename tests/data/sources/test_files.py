"""Opening files: compressed ones, URLs, and files that are gone, damaged, or written to meanwhile."""

import gzip
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from infctx.data.sources.catalog import UNKNOWN_BYTES, num_input_bytes, read_unit, scan, whole
from infctx.data.sources.files import open_bytes
from infctx.data.sources.records import Record, Rejection
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]

LINES = b"".join(b'{"text": "%d"}\n' % number for number in range(20_000))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/", recursive=True)


def zst(content: bytes) -> bytes:
    # Without the size of the contents, as a compressor writes it that is fed piece by piece.
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(content) + compressor.flush()


def skipped_frame(content: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


COMPRESSED = {
    "rows.jsonl.gz": gzip.compress(LINES),
    "members.jsonl.gz": gzip.compress(LINES[:500]) + gzip.compress(LINES[500:]),
    "rows.jsonl.zst": zst(LINES),
    "frames.JSONL.ZST": zst(LINES[:500]) + zst(b"") + skipped_frame(b"x" * 99) + zst(LINES[500:]),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_lines(tmp_path: Path, read_all: ReadAll, name: str) -> None:
    (tmp_path / name).write_bytes(COMPRESSED[name])
    records, rejected = read_all(tmp_path / name)
    assert [(record.fields["text"], record.line) for record in records] == [
        (str(number), number + 1) for number in range(20_000)
    ]
    assert rejected == []
    (unit,) = scan(str(tmp_path / name), format="auto", unit_bytes=1000).units
    assert len(read_all(unit)[0]) == 20_000


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("kept", [0.0, 0.5, -1])
def test_compressed_files_that_are_cut_short(tmp_path: Path, read_all: ReadAll, name: str, kept: float) -> None:
    content = COMPRESSED[name]
    (tmp_path / name).write_bytes(content[: int(len(content) * kept) if kept >= 0 else -1])
    if kept == 0:
        assert read_all(tmp_path / name) == ([], [])
        return
    with pytest.raises(DataError, match=f"{name}: expected a whole file"):
        read_all(tmp_path / name)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("place", [0, -20])
def test_compressed_files_with_other_bytes(tmp_path: Path, read_all: ReadAll, name: str, place: int) -> None:
    content = bytearray(COMPRESSED[name])
    content[place : place + 12 or None] = b"\xa5" * 12
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: expected a whole file"):
        read_all(tmp_path / name)


def test_a_wide_window_is_read(tmp_path: Path, read_all: ReadAll) -> None:
    # As zstd --long=31 makes it.
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "x.txt.zst").write_bytes(compressor.compress(b"text") + compressor.flush())
    assert read_all(tmp_path / "x.txt.zst")[0][0].fields == {"text": "text"}


@pytest.mark.parametrize(("name", "content"), [("x.txt.gz", b"one\r\n"), ("x.csv.zst", b"text\none\n")])
def test_other_formats_are_decompressed_too(tmp_path: Path, read_all: ReadAll, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else zst(content))
    assert str(read_all(tmp_path / name)[0][0].fields["text"]).strip() == "one"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_decompression_holds_little(tmp_path: Path, ending: str) -> None:
    content = bytes(50_000_000)
    (tmp_path / f"x{ending}").write_bytes(gzip.compress(content) if ending == ".gz" else zst(content))
    most = 0
    with open_bytes(f"{tmp_path}/x{ending}") as file:
        total = 0
        while block := file.read1(2**16):
            total += len(block)
            most = max(most, len(block))
    assert (total, most) == (len(content), 2**16)


# URLs


def test_lines_of_every_kind_of_url(tmp_path: Path, read_all: ReadAll, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/rows.jsonl", LINES)
    memory.pipe("/rows.jsonl.gz", gzip.compress(LINES))
    memory.pipe("/rows.jsonl.zst", zst(LINES))
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/rows.jsonl", LINES)
    for url in [
        "memory://rows.jsonl",
        "memory:///rows.jsonl.gz",
        "memory:///rows.jsonl.zst",
        f"file://{tmp_path}/rows.jsonl",
        f"zip://in/rows.jsonl::file://{tmp_path}/x.zip",
    ]:
        units = scan(url, format="auto", unit_bytes=100_000).units
        assert len(units) == (1 if url.endswith(("gz", "zst")) else 4), url
        records = [record for unit in units for record in read_all(unit)[0]]
        assert [record.origin for record in records] == [f"{url}:{number + 1}" for number in range(20_000)], url


def test_the_scan_of_a_url_is_that_of_the_file(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/rows.jsonl", LINES)
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    found, wanted = (
        scan(path, format="auto", unit_bytes=5000) for path in ("memory://rows.jsonl", f"{tmp_path}/rows.jsonl")
    )
    assert (found.digest, found.num_bytes) == (wanted.digest, wanted.num_bytes)
    assert [(unit.begin, unit.end) for unit in found.units] == [(unit.begin, unit.end) for unit in wanted.units]


def test_tables_by_url(read_all: ReadAll, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/x.csv", b"text\none\n")
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 5}), content, row_group_size=2)
    memory.pipe("/x.parquet", content.getvalue())
    memory.pipe("/damaged.parquet", content.getvalue()[:-3])
    assert [record.fields for record in read_all("memory://x.csv")[0]] == [{"text": "one"}]
    units = scan("memory://x.parquet", format="auto", unit_bytes=1).units
    assert [record.line for unit in units for record in read_all(unit)[0]] == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"memory://damaged\.parquet: expected a whole file"):
        read_all("memory://damaged.parquet")


@pytest.mark.parametrize("url", ["memory://none.jsonl", "nothing://x.jsonl", "zip://x.jsonl::memory://none.zip"])
def test_a_url_that_cannot_be_opened_is_named(read_all: ReadAll, url: str) -> None:
    for read in (read_all, lambda url: scan(url, format="auto", unit_bytes=1), size_of):
        with pytest.raises(DataError, match=f"{url}: expected a readable file"):
            read(url)


def test_a_store_that_fails_while_it_is_read(
    read_all: ReadAll, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def readinto(self, buffer: object) -> int:
            raise RuntimeError("the connection was lost")

    memory.pipe("/x.jsonl", b"")
    monkeypatch.setattr(type(memory), "open", lambda self, path, **options: Broken())
    with pytest.raises(DataError, match=r"memory://x\.jsonl: expected a whole file, got: the connection was lost"):
        read_all("memory://x.jsonl")


def size_of(path: str) -> int:
    return num_input_bytes([(path, "jsonl")])


def test_sizes_without_reading(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/x.jsonl", LINES)
    for name in ("x.jsonl", "x.idx", "x.bin"):
        (tmp_path / name).write_bytes(b"12345")
    assert num_input_bytes([("memory://x.jsonl", "jsonl"), (f"{tmp_path}/x.jsonl", "jsonl")]) == len(LINES) + 5
    assert num_input_bytes([(f"{tmp_path}/x.idx", "binidx")]) == 10
    assert num_input_bytes([(str(tmp_path), "code_repository")]) == 15
    assert num_input_bytes([]) == 0


def test_a_url_of_unknown_size(memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(memory), "size", lambda self, path: None)
    assert size_of("memory://x.jsonl") == UNKNOWN_BYTES


# Files that are not there, or not at rest


NAMES = ["x.txt", "x.jsonl", "x.jsonl.gz", "x.csv", "x.csv.zst", "x.parquet", "x.idx"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, read_all: ReadAll, name: str) -> None:
    for read in (read_all, lambda path: scan(str(path), format="auto", unit_bytes=1)):
        with pytest.raises(DataError, match=f"{name}: expected a readable file, got: No such file or directory"):
            read(tmp_path / name)


def content_of(name: str) -> bytes:
    if name.endswith(".parquet"):
        content = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), content)
        return content.getvalue()
    rows = b"text\none\ntwo\n" if ".csv" in name else b'{"text": "one"}\n{"text": "two"}\n'
    return gzip.compress(rows) if name.endswith(".gz") else zst(rows) if name.endswith(".zst") else rows


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("x.txt", "x.idx")])
@pytest.mark.parametrize("change", ["touch", "replace", "remove"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, name: str, change: str) -> None:
    file = tmp_path / name
    file.write_bytes(content_of(name))
    records = read_unit(whole(str(file), format="auto"), on_reject=print)
    assert next(records).fields == {"text": "one"}
    facts = file.stat()
    if change == "touch":
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    elif change == "replace":
        (tmp_path / "other").write_bytes(file.read_bytes())
        os.utime(tmp_path / "other", ns=(facts.st_atime_ns, facts.st_mtime_ns))
        os.replace(tmp_path / "other", file)
    else:
        file.unlink()
    message = "expected a readable file" if change == "remove" else "the file changed while it was read"
    with pytest.raises(DataError, match=f"{name}: {message}"):
        list(records)


def test_reading_may_stop_early(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(LINES)
    records = read_unit(whole(str(file), format="auto"), on_reject=print)
    next(records)
    file.unlink()
    records.close()


@pytest.mark.parametrize(
    ("name", "package"), [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow"), ("a/b", "datasets")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, read_all: ReadAll, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    def version(asked: str) -> str:
        raise PackageNotFoundError(asked)

    monkeypatch.setattr("importlib.metadata.version", version)
    path = name if name == "a/b" else str(tmp_path / name)
    if name != "a/b":
        Path(path).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: expected the package {package} .*pip install 'infctx\[data\]'"):
        read_all(path, "huggingface" if name == "a/b" else "auto")
