"""Parts of documents as text, piece by piece, with what each piece is worth as a target."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infctx.data.document import Document
from infctx.data.tokenizer import END_OF_TEXT, TokenIds, Tokenizer
from infctx.visible_text import visible

BEGIN_TOKENS = 400
AROUND_BORDER_TOKENS = 60
END_TOKENS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text of one weight, or the end of a text. text: without control characters."""

    text: str
    weight: float
    is_end: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """Tokens [begin, end) of a document."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownDocument:
    """A document in excerpts, in their order."""

    origin: str
    set_name: str
    num_tokens: int
    num_trained: int
    excerpts: tuple[Excerpt, ...]


def show_document(document: Document, tokenizer: Tokenizer, *, set_name: str) -> ShownDocument:
    """Cut out the beginning, the surroundings of the first border between masked and trained, and the end."""
    return ShownDocument(
        origin=visible(document.origin),
        set_name=visible(set_name),
        num_tokens=len(document),
        num_trained=document.num_trained_tokens,
        excerpts=tuple(
            Excerpt(begin=begin, end=end, pieces=_pieces(document, begin, end, tokenizer))
            for begin, end in _ranges(document.weights)
        ),
    )


def _ranges(weights: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """What is shown of a document: tokens from, to."""
    length = len(weights)
    wanted = [(0, BEGIN_TOKENS)]
    # The first token is never trained, which says nothing about the document.
    is_trained = weights[1:] > 0
    changes = is_trained[1:] != is_trained[:-1]
    if changes.any():
        border = int(changes.argmax()) + 2
        wanted.append((max(0, border - AROUND_BORDER_TOKENS), border + AROUND_BORDER_TOKENS))
    wanted.append((max(0, length - END_TOKENS), length))
    ranges = [(0, 0)]
    for begin, end in wanted:
        end = min(end, length)
        # A gap shorter than the note about it is no gap.
        if begin <= ranges[-1][1] + END_TOKENS:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges


def _pieces(document: Document, begin: int, end: int, tokenizer: Tokenizer) -> tuple[Piece, ...]:
    tokens, weights = document.tokens[begin:end], document.weights[begin:end]
    is_end = tokens == END_OF_TEXT
    borders = np.flatnonzero((weights[1:] != weights[:-1]) | is_end[1:] | is_end[:-1]) + 1
    # Incremental: a character whose bytes are shared by two pieces belongs to the one that completes it.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces: list[Piece] = []
    for first, last in zip([0, *borders.tolist()], [*borders.tolist(), len(tokens)], strict=True):
        weight = float(weights[first])
        if is_end[first]:
            pieces += _text_piece(decoder.decode(b"", final=True), weight)
            pieces.append(Piece(text="", weight=weight, is_end=True))
            continue
        data = bytes_of(tokens[first:last], tokenizer)
        if first == 0 and begin > 0:
            data = _from_whole_character(data)
        pieces += _text_piece(decoder.decode(data), weight)
    if end == len(document):
        pieces += _text_piece(decoder.decode(b"", final=True), float(weights[-1]))
    return tuple(pieces)


def _text_piece(text: str, weight: float) -> list[Piece]:
    return [Piece(text=visible(text), weight=weight)] if text else []


def bytes_of(tokens: TokenIds, tokenizer: Tokenizer) -> bytes:
    """Join the bytes of tokens; an id that the tokenizer does not have becomes its number."""
    is_known = tokens < tokenizer.vocab_size
    if is_known.all():
        return tokenizer.decode_bytes(tokens)
    return b"".join(
        tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else f"<id {token}>".encode()
        for token in tokens.tolist()
    )


def _from_whole_character(data: bytes) -> bytes:
    """Leave out the rest of a character that began before."""
    for skipped in range(min(4, len(data))):
        if data[skipped] & 0xC0 != 0x80:
            return data[skipped:]
    return data
