"""JSON lines: one object a line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from infctx.data.sources.files import BYTE_ORDER_MARK, is_compressed, not_utf8, open_bytes
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.records import Record, Rejection, Unit
from infctx.errors import DataError

_SHOWN_KEY_CHARACTERS = 80

_JSON_NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"} | {
    type(None): "null"
}


class _BadRowError(Exception):
    pass


def read_json_lines(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read the lines that begin within [begin, end); blank ones count and give nothing.

    Raises: DataError also where no line begins at `begin`, or the file ends before `end`: it has changed.
    """
    with open_bytes(unit.path) as file:
        for number, line in enumerate(_lines(file, unit), start=unit.first_line):
            # Bytes, not text: an invalid byte then costs its own line only, and no other character can end a line.
            if line.isspace():
                continue
            is_first = number == 1
            try:
                fields = _parse_line(line, is_first=is_first)
            except _BadRowError as error:
                hint = _hint(line) if is_first else ""
                on_reject(Rejection(file=unit.path, line=number, reason=f"{error}{hint}"))
                continue
            if fields is not None:
                yield Record(fields=fields, file=unit.path, line=number)


def _lines(file: io.BufferedReader[Any], unit: Unit) -> Iterator[bytes]:
    if unit.begin:
        assert not is_compressed(unit.path), unit
        file.seek(unit.begin - 1)
        if file.read(1) != b"\n":
            raise _has_changed(unit.path, f"no line begins at byte {unit.begin}")
    if unit.end is None:
        yield from file
        return
    position = unit.begin
    while position < unit.end:
        line = file.readline()
        if not line:
            raise _has_changed(unit.path, f"it ends at byte {position}, before byte {unit.end}")
        position += len(line)
        yield line


def _has_changed(path: str, how: str) -> DataError:
    return DataError(
        f"{path}: expected the file as it was scanned, but {how}: it has changed. "
        "Start again when nothing writes to it."
    )


def _parse_line(line: bytes, *, is_first: bool) -> Mapping[str, object] | None:
    """The object on the line; None for a line with nothing but a byte order mark."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRowError(not_utf8(error, "line")) from None
    if is_first and text.startswith(BYTE_ORDER_MARK):
        text = text.removeprefix(BYTE_ORDER_MARK)
        if not text or text.isspace():
            return None
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _BadRowError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    # Python refuses to read integers of thousands of digits.
    except ValueError as error:
        raise _BadRowError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise _BadRowError("JSON nested too deeply to read") from None
    if not isinstance(row, dict):
        raise _BadRowError(f"expected a JSON object, got {_JSON_NAMES[type(row)]}")
    return row


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                shown = json.dumps(key)
                is_long = len(shown) > _SHOWN_KEY_CHARACTERS
                raise _BadRowError(f"duplicate key {shown[:_SHOWN_KEY_CHARACTERS]}{'...' if is_long else ''}")
            seen.add(key)
    return row


# Made once: json.loads with a hook makes one for every line.
_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def _hint(line: bytes) -> str:
    """What to say of a first line that looks like JSON over several lines."""
    start = line.removeprefix(BYTE_ORDER_MARK.encode()).strip()
    if not start.startswith(b"[") and start != b"{":
        return ""
    jq = "jq -c 'if type == \"array\" then .[] else . end'"
    return f". If the file is JSON over several lines, this makes one line of each object: {jq}"
