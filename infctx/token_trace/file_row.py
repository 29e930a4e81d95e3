"""The row of a file that a token was read from, rendered once more: which part of it the token lies in."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from infctx.data.sources.catalog import format_of, read_unit, whole
from infctx.data.sources.records import Record
from infctx.data.template_catalog import Template
from infctx.data.templates import Rendered
from infctx.data.tokenizer import Tokenizer
from infctx.errors import DataError
from infctx.recipe.data_section import SetSection
from infctx.run_data import set_spec


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FileRow:
    """A row, and the token's place in it.

    Attributes:
        format: of the file.
        record: as its reader gave it.
        part: of the row that the token's last byte lies in, as "column output" or "turn 2 (user)".
        weight: of that part, and so of the token; as the template, the row and the set have it.
        bytes: of the rendered text that the token is, first and behind the last; None where the file holds tokens, and
            for the closing end of text.
    """

    format: str
    record: Record
    part: str
    weight: float
    bytes: tuple[int, int] | None


def read_file_row(
    name: str, source: SetSection, *, file: str, line: int, token: tuple[int, int], tokenizer: Tokenizer
) -> FileRow:
    """Read a row again.

    Args:
        name, source: the set as the resolved recipe has it.
        token: its place among the tokens of the row, and its id.
    Raises:
        DataError: the row is not there any more, or has become another.
    """
    spec = set_spec(name, source)
    kind = format_of(file) if spec.format == "auto" else spec.format
    records = read_unit(whole(file, format=kind), options=spec.options, on_reject=lambda rejection: None)
    with closing(records):  # type: ignore[type-var]
        record = next((record for record in records if record.line == line), None)
    if record is None:
        raise _has_changed(file, line, "it is no longer there")
    if record.tokens is not None:
        return FileRow(format=kind, record=record, part="tokens of the file", weight=1.0, bytes=None)
    rendered = spec.template.render(record.fields)
    part, weight, span = _part_of(spec.template, record, rendered, token, tokenizer)
    return FileRow(format=kind, record=record, part=part, weight=weight, bytes=span)


def _part_of(
    template: Template, record: Record, rendered: Rendered, token: tuple[int, int], tokenizer: Tokenizer
) -> tuple[str, float, tuple[int, int] | None]:
    place, token_id = token
    ids, lengths = tokenizer.encode_batch([rendered.text])
    if place == len(ids):
        return "the closing end of text", rendered.end_weight, None
    if place > len(ids) or int(ids[place]) != token_id:
        raise _has_changed(record.file, record.line, "it gives other tokens now")
    ends = tokenizer.token_ends([rendered.text], ids, lengths)
    first, behind = int(ends[place - 1]) if place else 0, int(ends[place])
    parts = template.layout.parts(record.fields)
    part_ends = np.cumsum([len(part.text.encode()) for part in parts])
    part = parts[int(np.searchsorted(part_ends, behind - 1, "right"))]
    weight = next((weight for begin, end, weight in rendered.spans if begin <= behind - 1 < end), 0.0)
    return part.source, weight, (first, behind)


def _has_changed(file: str, line: int, how: str) -> DataError:
    return DataError(
        f"{file}:{line}: expected the row that the documents were made of, but {how}: the file has changed."
    )


def shown_fields(record: Record, *, most: int = 160) -> dict[str, Any]:
    """The columns of a record, long texts cut; lists and objects as the JSON of them."""
    shown: dict[str, Any] = {}
    for name, value in record.fields.items():
        if value is None or isinstance(value, bool | int | float):
            shown[name] = value
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        shown[name] = text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
    return shown
