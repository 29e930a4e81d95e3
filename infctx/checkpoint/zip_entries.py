"""Where each record of an uncompressed zip file lies, without believing a single number in it.

`zipfile` reads the whole table before it can be limited, and hands out streams; a mapped model needs byte ranges.
Layout: the PKWARE zip specification (APPNOTE.TXT): 4.3.7 local header, 4.3.12 table, 4.3.14 to 4.3.16 end.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from infctx.errors import CheckpointError

MAX_ENTRIES = 200_000
MAX_TABLE_BYTES = 64 << 20

_LOCAL = struct.Struct("<4s5H3L2H")
_TABLE_ROW = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_POINTER = struct.Struct("<4sLQL")
_LONGEST_COMMENT = 0xFFFF
_SEE_ZIP64 = 0xFFFFFFFF
_STORED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipEntry:
    """One record: `size` bytes from byte `start` of the file."""

    name: str
    start: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    start: int
    size: int
    num_entries: int


def list_zip_entries(data: mmap, path: Path) -> dict[str, ZipEntry]:
    """Find every record of a zip file, each checked to be stored as it is and to lie before the zip directory.

    Raises: CheckpointError naming the file and the record for anything else.
    """
    table = _find_table(data, path)
    entries: dict[str, ZipEntry] = {}
    for entry in _read_rows(data, table, path):
        if entry.name in entries:
            raise CheckpointError(f"{path}: damaged: two records are called {entry.name[:80]!r}. Fetch the file again.")
        entries[entry.name] = entry
    return entries


def skip_local_header(data: mmap, header: int) -> int | None:
    """The byte at which the contents of the record at byte `header` begin; None if no record is there."""
    if header + _LOCAL.size > len(data):
        return None
    magic, _, flags, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack_from(data, header)
    if magic != b"PK\x03\x04" or flags & 1 or method != _STORED:
        return None
    return header + _LOCAL.size + int(name_bytes) + int(extra_bytes)


def _find_table(data: mmap, path: Path) -> _Table:
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - _END.size - _LONGEST_COMMENT))
    if end < 0 or end + _END.size > len(data):
        raise CheckpointError(
            f"{path}: truncated: the zip directory that must end the file is missing (the file has {len(data)} bytes). "
            "Fetch the file again and compare its size with the source."
        )
    _, disk, table_disk, entries_here, num_entries, size, start, comment_bytes = _END.unpack_from(data, end)
    if end + _END.size + comment_bytes != len(data):
        raise _damaged(path, f"expected {end + _END.size + comment_bytes} bytes, found {len(data)}")
    limit = end
    if _SEE_ZIP64 in (size, start) or num_entries == 0xFFFF:
        limit, disk, table_disk, entries_here, num_entries, size, start = _read_end64(data, end, path)
    if disk or table_disk or entries_here != num_entries:
        raise _damaged(path, "the zip file says that it continues in another file")
    if num_entries > MAX_ENTRIES or size > MAX_TABLE_BYTES:
        raise CheckpointError(
            f"{path}: refused: {num_entries} records in a zip directory of {size} bytes; at most {MAX_ENTRIES} records "
            f"and {MAX_TABLE_BYTES} bytes are read. No model file needs more."
        )
    if start + size > limit:
        raise _damaged(path, f"the zip directory should end at byte {start + size}, after the {limit} bytes before it")
    return _Table(start=start, size=size, num_entries=num_entries)


def _read_end64(data: mmap, end: int, path: Path) -> tuple[int, int, int, int, int, int, int]:
    pointer = end - _END64_POINTER.size
    if pointer < 0 or data[pointer : pointer + 4] != b"PK\x06\x07":
        raise _damaged(path, "the zip64 pointer is missing")
    _, _, end64, _ = _END64_POINTER.unpack_from(data, pointer)
    if end64 + _END64.size > pointer or data[end64 : end64 + 4] != b"PK\x06\x06":
        raise _damaged(path, f"no zip64 directory at byte {end64}")
    _, _, _, _, disk, table_disk, entries_here, num_entries, size, start = _END64.unpack_from(data, end64)
    return end64, disk, table_disk, entries_here, num_entries, size, start


def _read_rows(data: mmap, table: _Table, path: Path) -> Iterator[ZipEntry]:
    at, stop = table.start, table.start + table.size
    for index in range(table.num_entries):
        if at + _TABLE_ROW.size > stop or data[at : at + 4] != b"PK\x01\x02":
            raise _damaged(path, f"record {index} of {table.num_entries} is missing from the zip directory")
        row = _TABLE_ROW.unpack_from(data, at)
        flags, method, stored_size, size, header = row[3], row[4], row[8], row[9], row[16]
        name_at = at + _TABLE_ROW.size
        extra_at = name_at + row[10]
        at = extra_at + row[11] + row[12]
        if at > stop:
            raise _damaged(path, f"record {index} of {table.num_entries} runs past the zip directory")
        raw_name = data[name_at:extra_at]
        name = raw_name.decode("utf-8", errors="backslashreplace")
        size, stored_size, header = _widen(data[extra_at : extra_at + row[11]], (size, stored_size, header), path, name)
        if method != _STORED or flags & 1 or stored_size != size:
            raise CheckpointError(
                f"{path}: refused: record {name[:80]!r} is compressed or encrypted; expected it stored as it is, as "
                "torch.save does. Unpack the file and zip it again without compression (zip -0)."
            )
        start = skip_local_header(data, header)
        if start is None or data[header + _LOCAL.size : header + _LOCAL.size + len(raw_name)] != raw_name:
            raise _damaged(path, f"record {name[:80]!r} is not at byte {header}, where the zip directory puts it")
        if start + size > table.start:
            raise CheckpointError(
                f"{path}: truncated or damaged: record {name[:80]!r} should end at byte {start + size}, but the "
                f"records end at byte {table.start}. Fetch the file again."
            )
        yield ZipEntry(name=name, start=start, size=size)
    if at != stop:
        raise _damaged(path, f"{stop - at} bytes are left over in the zip directory")


def _widen(extra: bytes, numbers: tuple[int, int, int], path: Path, name: str) -> list[int]:
    """Replace each 32-bit number that says so by its 64-bit form, in the order the specification gives (4.5.3)."""
    if _SEE_ZIP64 not in numbers:
        return list(numbers)
    wide = b""
    while len(extra) >= 4:
        kind, num_bytes = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = extra[4 : 4 + num_bytes]
            break
        extra = extra[4 + num_bytes :]
    widened = []
    for number in numbers:
        if number == _SEE_ZIP64:
            if len(wide) < 8:
                raise _damaged(path, f"record {name[:80]!r} lacks its 64-bit size or position")
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        widened.append(number)
    return widened


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or damaged: {what}. Fetch the file again.")
