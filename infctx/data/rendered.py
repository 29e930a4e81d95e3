"""A row as text, which bytes of it are trained on, and what can be wrong with a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from infctx.data.tokenizer import encode_utf8
from infctx.errors import DataError

LARGEST_WEIGHT = 1e9
"""Of one factor. The product of a piece's, a row's and a set's weight then fits a float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A row as text.

    Attributes:
        text: everything the model sees but the closing end of text; UTF-8 can hold it.
        spans: (start, end, weight above 0) in the text's UTF-8 bytes, in order, not overlapping, not empty.
        end_weight: of the closing end of text; 0 = stopping here is not to be learned.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...]
    end_weight: float


class RenderedPart(NamedTuple):
    """A part of a row's text. weight: without that of the row and the set. source: "column output", "turn 2 (user)"."""

    text: str
    weight: float
    source: str


class WrongFieldsError(DataError):
    """A row whose columns are missing or of another type than the template needs."""


class EmptyRowError(DataError):
    """A row without the text that it should have."""


class NothingToTrainOnError(EmptyRowError):
    """A row that would teach nothing. num_tokens: what leaving it out drops; 0 where it has not been tokenised."""

    def __init__(self, reason: str, *, num_tokens: int = 0) -> None:
        super().__init__(reason)
        self.num_tokens = num_tokens


class TextBuilder:
    """Joins pieces of text and keeps account of the bytes that have a weight."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        # Counted in characters: in ASCII text, most of it, these are the bytes as well.
        self._spans: list[tuple[int, int, float]] = []
        self._length = 0

    def add(self, text: str, weight: float) -> None:
        """Append a text; pieces of one weight that touch become one span."""
        if not text:
            return
        self._texts.append(text)
        start = self._length
        self._length = end = start + len(text)
        if weight > 0:
            if self._spans and self._spans[-1][1:] == (start, weight):
                start = self._spans.pop()[0]
            self._spans.append((start, end, weight))

    def finish(self, *, end_weight: float) -> Rendered:
        """Give the row.

        Raises: EmptyRowError where there is no text; DataError for text that UTF-8 cannot hold.
        """
        if not self._texts:
            raise EmptyRowError("empty document")
        text = self._texts[0] if len(self._texts) == 1 else "".join(self._texts)
        spans = self._spans if text.isascii() else _in_bytes(text, self._spans)
        return Rendered(text=text, spans=tuple(spans), end_weight=end_weight)


def _in_bytes(text: str, spans: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    # The whole text first: an error then tells the character's place in the row.
    num_bytes = len(encode_utf8(text))
    if len(spans) == 1 and spans[0][:2] == (0, len(text)):
        return [(0, num_bytes, spans[0][2])]
    in_bytes = []
    at_character = at_byte = 0
    for start, end, weight in spans:
        first = at_byte + len(text[at_character:start].encode())
        at_character, at_byte = end, first + len(text[start:end].encode())
        in_bytes.append((first, at_byte, weight))
    return in_bytes


def scaled(rendered: Rendered, factor: float) -> Rendered:
    """Multiply all weights of a row; a factor of 0 leaves nothing to train on."""
    if factor == 1:
        return rendered
    spans = tuple((start, end, weight * factor) for start, end, weight in rendered.spans) if factor > 0 else ()
    return Rendered(text=rendered.text, spans=spans, end_weight=rendered.end_weight * factor)


def is_weight(value: object) -> bool:
    """Whether a value is a number that can weigh: finite, from 0 to 1e9, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST_WEIGHT


def found_fields(fields: Mapping[str, object]) -> str:
    """List a row's columns with their types, for messages."""
    return ", ".join(f'"{name}" ({type(value).__name__})' for name, value in fields.items()) or "none"


def leading_space_missing(rendered: Rendered) -> bool:
    """Whether a trained part follows a colon with no space or newline between them.

    World models write "Assistant: Hello" with the space as the answer's first character; an answer without it gives
    tokens that they do not expect there.
    """
    data = rendered.text.encode()
    return any(
        data[start - 1 : start] == b":" and not data[start : start + 4].decode(errors="ignore")[:1].isspace()
        for start, _, _ in rendered.spans
    )
