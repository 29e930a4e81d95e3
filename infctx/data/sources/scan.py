"""One pass over a file: its hash, and where the units of JSON lines begin."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from infctx.data.sources.files import BLOCK_BYTES, hash_file, is_compressed, open_bytes
from infctx.data.sources.parquet import row_ranges
from infctx.data.sources.records import Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What is known of a path without its rows.

    Attributes:
        digest: SHA-256, in hex.
        num_bytes: as stored; 0 for a set on the hub.
        units: back to back, at least one.
    """

    digest: str
    num_bytes: int
    units: list[Unit]


def scan_file(path: str, format: str, unit_bytes: int) -> Scan:
    """A file that is one unit."""
    digest, num_bytes = hash_file(path)
    return Scan(digest=digest, num_bytes=num_bytes, units=[Unit(format=format, path=path)])


def scan_parquet(path: str, format: str, unit_bytes: int) -> Scan:
    """A file whose units are row groups, small ones merged."""
    digest, num_bytes = hash_file(path)
    units = [
        Unit(format=format, path=path, begin=begin, end=end, first_line=begin + 1)
        for begin, end in row_ranges(path, unit_bytes=unit_bytes)
    ]
    return Scan(digest=digest, num_bytes=num_bytes, units=units)


def scan_lines(path: str, format: str, unit_bytes: int) -> Scan:
    """A file whose units are lines; a compressed one is one unit, since reading cannot begin in its middle."""
    if is_compressed(path):
        return scan_file(path, format, unit_bytes)
    digest, borders, num_bytes = hashlib.sha256(), _Borders(unit_bytes), 0
    block = bytearray(BLOCK_BYTES)
    view = memoryview(block)
    with open_bytes(path, decompress=False) as file:
        while size := file.readinto1(block):
            digest.update(view[:size])
            borders.add(block, size, offset=num_bytes)
            num_bytes += size
    starts = [start for start in borders.found if start[0] < num_bytes] or [(0, 1)]
    ends = [begin for begin, _ in starts[1:]] + [num_bytes]
    units = [
        Unit(format=format, path=path, begin=begin, end=end, first_line=line)
        for (begin, line), end in zip(starts, ends, strict=True)
    ]
    return Scan(digest=digest.hexdigest(), num_bytes=num_bytes, units=units)


class _Borders:
    """Finds, for every multiple of unit_bytes, the first line that begins there or after, and its number."""

    def __init__(self, unit_bytes: int) -> None:
        assert unit_bytes > 0, unit_bytes
        self.found = [(0, 1)]
        self._unit_bytes = unit_bytes
        self._wanted = unit_bytes
        self._line = 1

    def add(self, block: bytearray, size: int, *, offset: int) -> None:
        """Look at the next `size` bytes of the file, which begin at byte `offset` of it."""
        done = 0
        # A line that begins at byte p follows a newline at p - 1.
        while (newline := block.find(b"\n", max(done, self._wanted - 1 - offset), size)) >= 0:
            self._line += block.count(b"\n", done, newline + 1)
            done = newline + 1
            self.found.append((offset + done, self._line))
            self._wanted = ((offset + done) // self._unit_bytes + 1) * self._unit_bytes
        self._line += block.count(b"\n", done, size)
