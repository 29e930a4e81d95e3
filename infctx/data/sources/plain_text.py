"""Plain text: a file is one document."""

from __future__ import annotations

from collections.abc import Iterator

from infctx.data.sources.files import BYTE_ORDER_MARK, not_utf8, open_bytes
from infctx.data.sources.options import OnReject, ReadOptions
from infctx.data.sources.records import Record, Rejection, Unit


def read_text(unit: Unit, options: ReadOptions, on_reject: OnReject) -> Iterator[Record]:
    """Read a file into the field text, verbatim but for a byte order mark."""
    with open_bytes(unit.path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        on_reject(Rejection(file=unit.path, line=1, reason=not_utf8(error, "file")))
        return
    yield Record(fields={"text": text}, file=unit.path, line=1)
