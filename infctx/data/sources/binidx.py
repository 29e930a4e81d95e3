"""Tokens as pairs of files: `.bin` holds the ids, `.idx` tells where each document begins.

The format is Megatron's "mmap" of version 1, as RWKV's own trainer reads it.

An .idx is: 9 bytes of magic, version uint64, code of the ids' type uint8, number of items n uint64, length of the list
of documents d uint64, tokens of each item int32 [n], place of each item in the .bin in bytes int64 [n], first item of
each document and last the number of items int64 [d]. All little-endian.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from infctx.data.sources.files import damaged, hash_file, open_bytes
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.records import Record, Rejection, Unit
from infctx.data.tokenizer import TokenIds
from infctx.errors import DataError, machine_fault

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_INT32_CODE, _UINT16_CODE = 4, 8
_LARGEST_ID = np.iinfo(np.int32).max

# Items, or documents, whose places are held at once.
_BLOCK_ENTRIES = 2**16


def pair_of(path: str) -> tuple[str, str]:
    """The .idx and .bin of a pair, named by either or without an ending."""
    stem, ending = os.path.splitext(path)
    prefix = stem if ending in (".idx", ".bin") else path
    return f"{prefix}.idx", f"{prefix}.bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Index:
    """An opened .idx whose header makes sense."""

    file: io.BufferedReader[Any]
    path: str
    type: np.dtype[np.integer[Any]]
    num_items: int
    num_documents: int

    def entries(self, place: int, count: int, type: str) -> npt.NDArray[np.int64]:
        """The numbers from this byte on."""
        num_bytes = count * np.dtype(type).itemsize
        self.file.seek(place)
        content = self.file.read(num_bytes)
        if len(content) < num_bytes:
            raise damaged(self.path, f"the end of the file at byte {place + len(content)}")
        return np.frombuffer(content, dtype=type).astype(np.int64)


def read_binidx(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read a record without fields for every document; its tokens are uint16 where the type of the pair fits, or int32.

    The files are read, not mapped into memory: a mapped file that is cut short meanwhile would kill the process.
    Raises: DataError for an index that is damaged, of another version or type, or does not fit its .bin.
    """
    index_path, bin_path = pair_of(unit.path)
    with open_bytes(index_path) as index_file, open_bytes(bin_path) as ids:
        index = _open_index(index_file, index_path)
        is_small = index.type.itemsize <= 2
        items = _items(index, bin_bytes=ids.seek(0, io.SEEK_END))
        for line, num_items in enumerate(_document_sizes(index), start=1):
            tokens = _read_ids(ids, index.type, itertools.islice(items, num_items), bin_path)
            problem = _problem(tokens)
            if problem:
                on_reject(Rejection(file=unit.path, line=line, reason=problem))
                continue
            yield Record(
                fields={}, file=unit.path, line=line, tokens=tokens.astype(np.uint16 if is_small else np.int32)
            )


def _open_index(file: io.BufferedReader[Any], path: str) -> _Index:
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise DataError(f"{path}: expected an index that begins with {_MAGIC!r}, got {header[: len(_MAGIC)]!r}.")
    if len(header) < _HEADER.size:
        raise damaged(path, f"{len(header)} bytes, fewer than its header has")
    _, version, code, num_items, num_entries = _HEADER.unpack(header)
    if version != _VERSION:
        raise DataError(f"{path}: expected version {_VERSION} of the index format, got {version}.")
    if code not in _TYPES:
        raise DataError(
            f"{path}: expected ids of integer type (code {', '.join(map(str, _TYPES))}), got the code {code}. "
            "Write the pair again with uint16 (8) or int32 (4)."
        )
    expected = _HEADER.size + 12 * num_items + 8 * num_entries
    if num_bytes != expected:
        raise damaged(path, f"{num_bytes} bytes where its header asks for {expected}")
    if num_entries == 0:
        raise damaged(path, "a list of documents without its end")
    type_ = np.dtype(_TYPES[code])
    index = _Index(file=file, path=path, type=type_, num_items=num_items, num_documents=num_entries - 1)
    first, last = (int(index.entries(place, 1, "<i8")[0]) for place in (num_bytes - 8 * num_entries, num_bytes - 8))
    if (first, last) != (0, num_items):
        raise damaged(path, f"documents from item {first} to {last} where there are items 0 to {num_items}")
    return index


def _document_sizes(index: _Index) -> Iterator[int]:
    """The number of items of each document."""
    documents_at = _HEADER.size + 12 * index.num_items
    for begin in range(0, index.num_documents, _BLOCK_ENTRIES):
        count = min(_BLOCK_ENTRIES, index.num_documents - begin)
        sizes = np.diff(index.entries(documents_at + 8 * begin, count + 1, "<i8"))
        if (sizes < 0).any():
            place = begin + int(np.argmax(sizes < 0))
            raise damaged(index.path, f"document {place + 2} beginning before document {place + 1}")
        yield from sizes.tolist()


def _items(index: _Index, *, bin_bytes: int) -> Iterator[tuple[int, int]]:
    """The place of each item in the .bin, and its length, in bytes."""
    pointers_at = _HEADER.size + 4 * index.num_items
    for begin in range(0, index.num_items, _BLOCK_ENTRIES):
        count = min(_BLOCK_ENTRIES, index.num_items - begin)
        lengths = index.entries(_HEADER.size + 4 * begin, count, "<i4") * index.type.itemsize
        pointers = index.entries(pointers_at + 8 * begin, count, "<i8")
        # Not pointer + length, which can overflow.
        outside = (lengths < 0) | (pointers < 0) | (pointers > bin_bytes - lengths)
        if outside.any():
            place = int(np.argmax(outside))
            raise damaged(
                index.path,
                f"item {begin + place} of {lengths[place]} bytes from byte {pointers[place]} of a .bin of {bin_bytes}",
            )
        yield from zip(pointers.tolist(), lengths.tolist(), strict=True)


def _read_ids(
    file: io.BufferedReader[Any], type_: np.dtype[np.integer[Any]], items: Iterable[tuple[int, int]], path: str
) -> TokenIds:
    pieces = []
    for place, num_bytes in items:
        file.seek(place)
        content = file.read(num_bytes)
        if len(content) < num_bytes:
            raise damaged(path, f"the end of the file at byte {place + len(content)}")
        pieces.append(content)
    return np.frombuffer(b"".join(pieces), dtype=type_)


def _problem(tokens: TokenIds) -> str | None:
    """Why these are not ids, or None."""
    if tokens.dtype.kind == "u" or not len(tokens):
        return None
    for value in (int(tokens.min()), int(tokens.max())):
        if not 0 <= value <= _LARGEST_ID:
            return f"token id {value}: expected 0..{_LARGEST_ID}"
    return None


def scan_binidx(path: str) -> tuple[str, int]:
    """Give the SHA-256 of the hashes of both files, and the bytes of both."""
    found = [hash_file(name) for name in pair_of(path)]
    return hashlib.sha256("".join(digest for digest, _ in found).encode()).hexdigest(), sum(size for _, size in found)


def write_binidx(prefix: str, documents: Iterable[TokenIds | Sequence[int]], *, vocab_size: int) -> tuple[int, int]:
    """Write documents as a pair, one item each; both files whole or not at all, in the place of an earlier pair.

    Args:
        prefix: the path of the pair, with or without an ending.
        documents: ids of each, 0..vocab_size-1, written as they are: an end of text is the caller's to add.
        vocab_size: up to 65536 the ids are written as uint16, else as int32.
    Returns: the number of documents and of tokens.
    Raises: DataError for an id outside the vocabulary, and where the folder cannot be written to.
    """
    index_path, bin_path = map(Path, pair_of(prefix))
    unfinished = [path.with_name(f".{path.name}.tmp-{os.getpid()}") for path in (index_path, bin_path)]
    code = _UINT16_CODE if vocab_size <= 2**16 else _INT32_CODE
    try:
        with (
            unfinished[0].open("wb") as index,
            unfinished[1].open("wb") as ids,
            tempfile.TemporaryFile(dir=index_path.parent) as sizes,
        ):
            for number, document in enumerate(documents, start=1):
                tokens = _checked(document, vocab_size, f"{bin_path}: document {number}")
                ids.write(tokens.astype(_TYPES[code]).tobytes())
                sizes.write(struct.pack("<i", len(tokens)))
            counts = _write_index(index, sizes, code)
            for file in (index, ids):
                file.flush()
                os.fsync(file.fileno())
        # Without its index first: a crash from here on leaves no index, rather than one of other ids.
        index_path.unlink(missing_ok=True)
        os.replace(unfinished[1], bin_path)
        os.replace(unfinished[0], index_path)
    except BaseException as error:
        for path in unfinished:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and not machine_fault(error):
            raise DataError(f"{prefix}: expected a place to write to, got: {error.strerror}.") from error
        raise
    return counts


def _checked(document: TokenIds | Sequence[int], vocab_size: int, place: str) -> TokenIds:
    tokens = np.asarray(document)
    if not len(tokens):
        return np.zeros(0, dtype=np.int32)
    assert tokens.ndim == 1, f"{place}: ids of shape {tokens.shape}"
    assert tokens.dtype.kind in "iu", f"{place}: ids of {tokens.dtype}"
    if len(tokens) > _LARGEST_ID:
        raise DataError(f"{place}: {len(tokens)} tokens; the format holds {_LARGEST_ID} in a document. Split it.")
    for value in (int(tokens.min()), int(tokens.max())):
        if not 0 <= value < vocab_size:
            raise DataError(f"{place}: token id {value}: expected 0..{vocab_size - 1}. Use the model's tokenizer.")
    return tokens


def _write_index(index: IO[bytes], sizes: IO[bytes], code: int) -> tuple[int, int]:
    """Write an .idx from the file of int32 sizes, a block at a time; give the numbers of documents and tokens."""
    num_documents = sizes.tell() // 4
    index.write(_HEADER.pack(_MAGIC, _VERSION, code, num_documents, num_documents + 1))
    sizes.seek(0)
    shutil.copyfileobj(sizes, index)
    sizes.seek(0)
    num_tokens = 0
    while block := sizes.read(4 * _BLOCK_ENTRIES):
        ends = np.cumsum(np.frombuffer(block, dtype="<i4"), dtype=np.int64) + num_tokens
        begins = np.concatenate([[num_tokens], ends[:-1]])
        index.write((begins * np.dtype(_TYPES[code]).itemsize).astype("<i8").tobytes())
        num_tokens = int(ends[-1])
    for begin in range(0, num_documents + 1, _BLOCK_ENTRIES):
        end = min(begin + _BLOCK_ENTRIES, num_documents + 1)
        index.write(np.arange(begin, end, dtype="<i8").tobytes())
    return num_documents, num_tokens
