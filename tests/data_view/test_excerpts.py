"""Which parts of a document are shown, what their pieces are worth, and that nothing in them commands a terminal."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from infctx.data.document import Document
from infctx.data.tokenizer import tokenizer_by_name
from infctx.data_view.excerpts import AROUND_BORDER_TOKENS, BEGIN_TOKENS, ShownDocument, show_document
from infctx.visible_text import visible

BYTES = tokenizer_by_name("bytes")


def shown(document: Document, tokenizer: str = "bytes") -> ShownDocument:
    return show_document(document, tokenizer_by_name(tokenizer), set_name="a set")


def pieces(document: Document, tokenizer: str = "bytes") -> list[tuple[str, float]]:
    return [
        ("END" if piece.is_end else piece.text, piece.weight)
        for excerpt in shown(document, tokenizer).excerpts
        for piece in excerpt.pieces
    ]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain ü 世界 שלום 😀", "plain ü 世界 שלום 😀"),
        ("two\nlines\tand tab", "two\nlines\tand tab"),
        ("\0\a\x1b[31m\x7f", "␀␇␛[31m␡"),
        ("a\r\nb", "a␍\nb"),
        ("\x9b31m\u202e\u2066\ufeff\u2028", "<U+009B>31m<U+202E><U+2066><U+FEFF><U+2028>"),
        ("\ud800\ue000", "<U+D800><U+E000>"),
        ("wide\u3000no-break\u00a0می\u200cخواهم 👩\u200d👧", "wide\u3000no-break\u00a0می\u200cخواهم 👩\u200d👧"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_a_sign(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_pieces_have_the_weights_of_their_tokens(byte_document: Callable[..., Document]) -> None:
    document = byte_document("User: hi\n\nAssistant: hello", trained=" hello")
    assert pieces(document) == [("User: hi\n\nAssistant:", 0.0), (" hello", 1.0), ("END", 0.0)]
    document = replace(document, weights=document.weights * np.float32(0.5))
    assert pieces(document)[1] == (" hello", 0.5)
    assert shown(document).num_trained == 6
    # All trained but the first token, which nothing predicts.
    assert pieces(byte_document("abc")) == [("a", 0.0), ("bc", 1.0), ("END", 1.0)]


def test_the_end_of_text_is_a_piece_wherever_it_stands(byte_document: Callable[..., Document]) -> None:
    document = byte_document("ab")
    twice = Document(tokens=np.tile(document.tokens, 2), weights=np.zeros(6, np.float32), origin="")
    assert pieces(twice) == [("ab", 0.0), ("END", 0.0), ("ab", 0.0), ("END", 0.0)]


def test_a_character_shared_by_two_weights_is_shown_once_and_whole(
    byte_document: Callable[..., Document],
) -> None:
    document = byte_document("a世b")
    weights = np.array([0, 0, 0, 1, 1, 0], dtype=np.float32)
    assert pieces(replace(document, weights=weights)) == [("a", 0.0), ("世b", 1.0), ("END", 0.0)]


def test_bytes_that_are_no_text_and_ids_that_do_not_exist(byte_document: Callable[..., Document]) -> None:
    ids = np.array([98, 0xE4 + 1, 0xB8 + 1, 0], dtype=np.uint16)
    weights = np.zeros(4, np.float32)
    assert pieces(Document(tokens=ids, weights=weights, origin="")) == [("a", 0.0), ("\ufffd", 0.0), ("END", 0.0)]
    # A file of tokens may hold one of the embedding's padding rows.
    ids = np.array([33155, 65533, 0], dtype=np.uint16)
    assert pieces(Document(tokens=ids, weights=np.zeros(3, np.float32), origin=""), "world")[0][0].endswith(
        "<id 65533>"
    )


def test_of_a_long_document_the_beginning_the_first_border_and_the_end(
    byte_document: Callable[..., Document],
) -> None:
    text = "q" * 5000 + "ANSWER" + "z" * 5000
    excerpts = shown(byte_document(text, trained="ANSWER")).excerpts
    assert [(excerpt.begin, excerpt.end) for excerpt in excerpts] == [
        (0, BEGIN_TOKENS),
        (5000 - AROUND_BORDER_TOKENS, 5000 + AROUND_BORDER_TOKENS),
        (10007 - 20, 10007),
    ]
    assert ("ANSWER", 1.0) in [(piece.text, piece.weight) for piece in excerpts[1].pieces]
    assert excerpts[2].pieces[-1].is_end


def test_a_short_document_is_shown_whole(byte_document: Callable[..., Document]) -> None:
    for length in (1, BEGIN_TOKENS - 1, BEGIN_TOKENS, BEGIN_TOKENS + 30):
        text = "x" * length
        excerpts = shown(byte_document(text)).excerpts
        assert [(excerpt.begin, excerpt.end) for excerpt in excerpts] == [(0, length + 1)]
        assert "".join(piece.text for piece in excerpts[0].pieces) == text


def test_an_excerpt_begins_and_ends_with_whole_characters(byte_document: Callable[..., Document]) -> None:
    # Three bytes a character: 400 and all the other borders cut one through.
    text = "世" * 3000 + "ANSWER" + "界" * 3000
    document = byte_document(text, trained="ANSWER")
    for shift in range(3):
        moved = byte_document("x" * shift + text, trained="ANSWER")
        assert "\ufffd" not in "".join(piece.text for excerpt in shown(moved).excerpts for piece in excerpt.pieces)
    assert len(shown(document).excerpts) == 3


def test_origin_and_set_are_shown_without_control_characters(byte_document: Callable[..., Document]) -> None:
    document = byte_document("a", origin="\x1b]0;\udcff.jsonl:1")
    made = show_document(document, BYTES, set_name="\x1b[2J")
    assert made.origin == "␛]0;<U+DCFF>.jsonl:1"
    assert made.set_name == "␛[2J"
