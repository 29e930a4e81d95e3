"""Text as it comes, against the whole text cut by hand."""

from __future__ import annotations

import random

import pytest

from infctx.data.tokenizer import BytesTokenizer, WorldTokenizer
from infctx.errors import InfctxError
from infctx.generation.text_stream import TextStream


def streamed(tokens: list[int], stops: list[str], tokenizer: object) -> tuple[str, bool, list[str]]:
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            return "".join(pieces), True, pieces
    pieces.append(stream.finish())
    return "".join(pieces), False, pieces


def cut(data: bytes, stops: list[str]) -> tuple[str, bool]:
    """The bytes before the stop that ends first are certain when it is complete."""
    for end in range(len(data) + 1):
        found = [place for stop in stops if (place := data[:end].find(stop.encode())) >= 0]
        if found:
            return data[: min(found)].decode(errors="replace"), True
    return data.decode(errors="replace"), False


def test_random_texts_and_stops() -> None:
    generator = random.Random(0)
    num_stopped = 0
    for _ in range(400):
        data = bytes(generator.choice("abé\n世".encode()) for _ in range(generator.randint(0, 14)))
        stops = ["".join(generator.choice("ab\né世") for _ in range(generator.randint(1, 3))) for _ in range(2)]
        stops = stops[: generator.randint(0, 2)]
        text, is_stopped, _ = streamed([byte + 1 for byte in data], stops, BytesTokenizer())
        assert (text, is_stopped) == cut(data, stops), (data, stops)
        num_stopped += is_stopped
    assert num_stopped > 30


def test_a_stop_within_a_token_and_across_tokens() -> None:
    world = WorldTokenizer()
    tokens = world.encode("Hello there. \n\nUser: no").tolist()
    assert b" \n\n" in [world.decode_bytes([token]) for token in tokens]
    assert streamed(tokens, ["\n\n"], world)[:2] == ("Hello there. ", True)
    assert streamed(tokens, ["\n\nUser"], world)[:2] == ("Hello there. ", True)
    assert streamed(tokens, ["re. \n\nUs"], world)[:2] == ("Hello the", True)
    assert streamed(tokens, ["\n\nUserx", "zzz"], world)[:2] == ("Hello there. \n\nUser: no", False)


def test_nothing_is_shown_that_may_be_the_stop_and_all_else_at_once() -> None:
    _, _, pieces = streamed([ord(letter) + 1 for letter in "ab\nc\n\n"], ["\n\n"], BytesTokenizer())
    assert pieces == ["a", "b", "", "\nc", "", ""]


def test_never_half_a_character() -> None:
    text = "aé€👩‍👧東京"
    for tokenizer in (BytesTokenizer(), WorldTokenizer()):
        found, _, pieces = streamed(tokenizer.encode(text).tolist(), [], tokenizer)
        assert (found, pieces[-1]) == (text, "")


def test_half_a_character_waits() -> None:
    tokens = [byte + 1 for byte in "é".encode()]
    assert streamed(tokens, [], BytesTokenizer())[2] == ["", "é", ""]
    assert streamed(tokens[:1], [], BytesTokenizer())[2] == ["", "\ufffd"]


def test_an_empty_stop() -> None:
    with pytest.raises(InfctxError, match="--stop"):
        TextStream(BytesTokenizer(), ["a", ""])
