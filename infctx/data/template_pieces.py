"""Templates made of pieces: text with {column} in it, and the weight of each piece. Four are built in, as data.

A template of one's own, as `data.template` holds it:

    pieces:
      - {text: "Context: {context}\\n\\n", train: false, when: context}
      - {text: "Q: {question}\\n\\nA:", train: false}
      - {text: " {answer}", train: true}
    clean: true
    end_of_text: true

`{column}` is replaced by the row's text, which is not looked through for braces again; `{{` and `}}` are braces.
`train` is true, false, or the weight itself. `when` leaves the piece out where that column is missing, null or empty.
`clean` (default false) applies the World newline rule (`clean_text`) to every value; a value that is empty then must
have a `when`. `end_of_text` (default true) gives the closing end of text the weight of the last piece; false masks it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infctx.data.rendered import (
    EmptyRowError,
    Rendered,
    RenderedPart,
    TextBuilder,
    WrongFieldsError,
    found_fields,
    is_weight,
)
from infctx.errors import DataError

BUILT_IN_PIECES: dict[str, dict[str, Any]] = {
    "text": {"pieces": [{"text": "{text}", "train": True}]},
    "completion": {"pieces": [{"text": "{prompt}", "train": False}, {"text": "{completion}", "train": True}]},
    "instruct": {
        "clean": True,
        "pieces": [
            {"text": "Instruction:", "train": False},
            {"text": " {instruction}", "train": False},
            {"text": "\n\nInput:", "train": False, "when": "input"},
            {"text": " {input}", "train": False, "when": "input"},
            {"text": "\n\nResponse:", "train": False},
            {"text": " {output}", "train": True},
        ],
    },
    "question": {
        "clean": True,
        "pieces": [
            {"text": "Question:", "train": False},
            {"text": " {question}", "train": False},
            {"text": "\n\nAnswer:", "train": False},
            {"text": " {answer}", "train": True},
        ],
    },
}

_BLANK_LINES = re.compile(r"\n\s*\n")
_MARK = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
# A name with a colon or an exclamation mark would look like Python's format directives, which mean nothing here.
_COLUMN_NAME = re.compile(r"[^\s{}:!](?:[^{}:!]*[^\s{}:!])?")


def clean_text(text: str) -> str:
    """Apply the World newline rule, so that a blank line can only be the border between two parts.

    Newlines are "\\n"; runs of them, also with white space in between, are one; both ends are stripped.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.strip()
    return _BLANK_LINES.sub("\n", text) if "\n" in text else text


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of a template.

    Attributes:
        literals, columns: the text is literals[0], the row's columns[0], literals[1] and so on to the last literal.
        weight: of the text as a target.
        when: left out where this column is missing, null or empty; None = always there.
    """

    literals: tuple[str, ...]
    columns: tuple[str, ...]
    weight: float
    when: str | None = None


@dataclass(frozen=True, kw_only=True)
class PieceTemplate:
    """Pieces one after the other. Columns are named as in the file.

    Attributes:
        is_clean: whether values are cleaned.
        trains_end: whether the closing end of text has the weight of the last piece, or none.
    """

    pieces: tuple[Piece, ...]
    is_clean: bool
    trains_end: bool

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        names = [name for piece in self.pieces for name in (*piece.columns, piece.when) if name is not None]
        return tuple(dict.fromkeys(names))

    def render(self, fields: Mapping[str, object]) -> Rendered:
        """Render a row.

        Raises: WrongFieldsError for a column that is missing or not a string; EmptyRowError; DataError for text that
            UTF-8 cannot hold.
        """
        values = self._values(fields)
        builder = TextBuilder()
        weight = 0.0
        for piece in self.pieces:
            if piece.when is not None and not values.get(piece.when):
                continue
            weight = piece.weight
            builder.add(self._filled(piece, values, fields), weight)
        return builder.finish(end_weight=weight if self.trains_end else 0.0)

    def parts(self, fields: Mapping[str, object]) -> list[RenderedPart]:
        """The texts that `render` joins, each with where it comes from. Raises: as `render`."""
        values = self._values(fields)
        return [
            RenderedPart(
                self._filled(piece, values, fields),
                piece.weight,
                f"column {' and '.join(piece.columns)}" if piece.columns else "fixed text of the template",
            )
            for piece in self.pieces
            if piece.when is None or values.get(piece.when)
        ]

    def _values(self, fields: Mapping[str, object]) -> dict[str, str]:
        values = {}
        for column in self.columns:
            value = fields.get(column)
            if isinstance(value, str):
                values[column] = clean_text(value) if self.is_clean else value
            elif value is not None:
                raise self._wrong_fields(column, fields)
        return values

    def _filled(self, piece: Piece, values: Mapping[str, str], fields: Mapping[str, object]) -> str:
        parts = [piece.literals[0]]
        for column, literal in zip(piece.columns, piece.literals[1:], strict=True):
            value = values.get(column)
            if value is None:
                raise self._wrong_fields(column, fields)
            if self.is_clean and not value:
                raise EmptyRowError(f'"{column}" is empty')
            parts.append(value)
            parts.append(literal)
        return "".join(parts)

    def _wrong_fields(self, column: str, fields: Mapping[str, object]) -> WrongFieldsError:
        needed = [name for piece in self.pieces if piece.when is None for name in piece.columns]
        wanted = " and ".join(f'"{name}"' for name in dict.fromkeys([*needed, column]))
        return WrongFieldsError(f"expected {wanted} as strings (str), found the fields: {found_fields(fields)}")


def make_piece_template(
    template: Mapping[str, Any], *, fields: Mapping[str, str], weights: Mapping[str, float]
) -> PieceTemplate:
    """Make a template of a mapping as in this module's docstring.

    Args:
        fields: the file's column for a column of the template.
        weights: the weight of the piece in which a column of the template stands, instead of its `train`.
    Raises: DataError naming the key for anything that does not make sense.
    """
    pieces = [_read_piece(piece, f"pieces[{place}]") for place, piece in enumerate(_piece_mappings(template))]
    in_text = list(dict.fromkeys(column for piece in pieces for column in piece.columns))
    if not in_text:
        raise DataError(
            "data.template.pieces: expected at least one {column}, so that rows differ, found none. "
            "Double braces stand for braces: write {question} for the column question."
        )
    conditions = [piece.when for piece in pieces if piece.when is not None]
    check_names("data.fields", fields, list(dict.fromkeys([*in_text, *conditions])), "columns")
    check_names("data.weights", weights, in_text, "columns")
    return PieceTemplate(
        pieces=tuple(
            Piece(
                literals=piece.literals,
                columns=tuple(fields.get(column, column) for column in piece.columns),
                weight=_piece_weight(piece, weights),
                when=None if piece.when is None else fields.get(piece.when, piece.when),
            )
            for piece in pieces
        ),
        is_clean=_flag(template, "clean", default=False),
        trains_end=_flag(template, "end_of_text", default=True),
    )


def check_names(key: str, given: Mapping[str, object], known: list[str], kind: str) -> None:
    """Raise DataError for a name that the template does not have."""
    for name in given:
        if name not in known:
            raise DataError(f"{key}.{name}: the template's {kind} are {', '.join(known)}.")


def _piece_mappings(template: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    for key in template:
        if key not in ("pieces", "clean", "end_of_text"):
            raise DataError(f"data.template.{key}: expected pieces, clean or end_of_text.")
    pieces = template.get("pieces")
    if not isinstance(pieces, list | tuple) or not pieces:
        raise DataError(f"data.template.pieces: expected a list of {{text, train, when}}, got {pieces!r}.")
    return list(pieces)


def _flag(template: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = template.get(key, default)
    if not isinstance(value, bool):
        raise DataError(f"data.template.{key}: expected true or false, got {value!r}.")
    return value


def _read_piece(piece: object, place: str) -> Piece:
    """Read one piece; its columns are those of the template."""
    where = f"data.template.{place}"
    if not isinstance(piece, Mapping):
        raise DataError(f"{where}: expected {{text, train, when}}, got {piece!r}.")
    for key in piece:
        if key not in ("text", "train", "when"):
            raise DataError(f"{where}.{key}: expected text, train or when.")
    text, train, when = piece.get("text"), piece.get("train"), piece.get("when")
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}.text: expected a text, got {text!r}.")
    if train is None or not (isinstance(train, bool) or is_weight(train)):
        raise DataError(f"{where}.train: expected true, false or a weight from 0 to 1e9, got {train!r}.")
    if when is not None and (not isinstance(when, str) or not _COLUMN_NAME.fullmatch(when)):
        raise DataError(f"{where}.when: expected a column's name without braces, got {when!r}.")
    literals, columns = _parse(text, f"{where}.text")
    return Piece(literals=literals, columns=columns, weight=float(train), when=when)


def _parse(text: str, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    literals, columns = [""], []
    last = 0
    for mark in _MARK.finditer(text):
        literals[-1] += text[last : mark.start()]
        last = mark.end()
        column = mark[1]
        if mark[0] in ("{{", "}}"):
            literals[-1] += mark[0][0]
        elif column is not None and _COLUMN_NAME.fullmatch(column):
            columns.append(column)
            literals.append("")
        else:
            raise DataError(
                f"{where}: at character {mark.start()}: expected {{column}}, {{{{ or }}}}, got {mark[0]!r}. A column "
                "is its bare name, without format directives; data.fields can give it another one."
            )
    literals[-1] += text[last:]
    return tuple(literals), tuple(columns)


def _piece_weight(piece: Piece, weights: Mapping[str, float]) -> float:
    given = {column: weights[column] for column in piece.columns if column in weights}
    if len(set(given.values())) > 1:
        raise DataError(
            f"data.weights: {' and '.join(given)} stand in one piece of the template, which has one weight; "
            f"got {given}. Put them into pieces of their own (data.template.pieces)."
        )
    return float(next(iter(given.values()), piece.weight))
