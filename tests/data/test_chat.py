"""Conversations: the trained bytes are the assistant's and the stop after them."""

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from infctx.data.rendered import Rendered, WrongFieldsError
from infctx.data.template_catalog import make_template
from infctx.data.templates import make_documents
from infctx.data.tokenizer import BytesTokenizer, WorldTokenizer
from infctx.errors import DataError

CHAT = make_template("chat")
DIALOG = [("system", "Be brief."), ("user", "Größe?"), ("assistant", "1 m"), ("user", "東京"), ("assistant", "京。")]
TEXT = "System: Be brief.\n\nUser: Größe?\n\nAssistant: 1 m\n\nUser: 東京\n\nAssistant: 京。"

Turns = list[tuple[str, str]]


def messages(turns: Turns) -> dict[str, object]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def parts(rendered: Rendered) -> list[tuple[str, float]]:
    """The text of each span with its weight."""
    data = rendered.text.encode()
    return [(data[start:end].decode(), weight) for start, end, weight in rendered.spans]


def test_the_world_format_and_what_is_trained_of_it() -> None:
    rendered = CHAT.render(messages(DIALOG))
    assert rendered.text == TEXT
    assert parts(rendered) == [(" 1 m\n\n", 1.0), (" 京。", 1.0)]
    assert rendered.end_weight == 1.0


def test_turns_of_one_role_stay_turns_of_their_own() -> None:
    rendered = CHAT.render(messages([("user", "q"), ("user", "r"), ("assistant", "a"), ("assistant", "b")]))
    assert rendered.text == "User: q\n\nUser: r\n\nAssistant: a\n\nAssistant: b"
    assert parts(rendered) == [(" a\n\n", 1.0), (" b", 1.0)]


def test_a_last_turn_of_the_user_stays_and_is_masked() -> None:
    rendered = CHAT.render(messages([*DIALOG[:3], ("user", "and?")]))
    assert rendered.text.endswith("Assistant: 1 m\n\nUser: and?")
    assert parts(rendered) == [(" 1 m\n\n", 1.0)]
    assert rendered.end_weight == 0.0


def test_last_turn_only() -> None:
    template = make_template("chat", train_turns="last")
    assert parts(template.render(messages(DIALOG))) == [(" 京。", 1.0)]
    rendered = template.render(messages([*DIALOG, ("user", "and?")]))
    assert parts(rendered) == [(" 京。\n\n", 1.0)]
    assert rendered.end_weight == 0.0
    both = make_template("chat", train_turns="last", weights={"system": 0.5})
    assert parts(both.render(messages(DIALOG))) == [(" Be brief.\n\n", 0.5), (" 京。", 1.0)]


def test_weights_of_roles() -> None:
    template = make_template("chat", weights={"user": 0.5, "assistant": 2, "tool": 0.25, "system": 0.125}, weight=2)
    rendered = template.render(messages([*DIALOG[:3], ("tool", "t")]))
    assert parts(rendered) == [(" Be brief.\n\n", 0.25), (" Größe?\n\n", 1.0), (" 1 m\n\n", 4.0), (" t", 0.5)]
    assert rendered.end_weight == 0.5
    masked = make_template("chat", weights={"assistant": 0, "user": 1}).render(messages(DIALOG))
    assert parts(masked) == [(" Größe?\n\n", 1.0), (" 東京\n\n", 1.0)]
    assert masked.end_weight == 0.0


def test_a_turns_own_weight_multiplies_its_roles() -> None:
    turns = [{"role": role, "content": text} for role, text in DIALOG]
    turns[2]["weight"] = 0  # type: ignore[assignment]
    turns[4]["weight"] = 0.5  # type: ignore[assignment]
    rendered = make_template("chat", weights={"assistant": 3}).render({"messages": turns})
    assert parts(rendered) == [(" 京。", 1.5)]
    assert rendered.end_weight == 1.5
    turns[4]["weight"] = "0.5"
    with pytest.raises(WrongFieldsError, match=r"turn 5: weight: expected a number from 0 to 1e9, got '0\.5'"):
        CHAT.render({"messages": turns})


def test_a_conversation_without_a_trained_turn_teaches_nothing() -> None:
    row = messages([("system", "s"), ("user", "q")])
    assert (parts(CHAT.render(row)), CHAT.render(row).end_weight) == ([], 0.0)
    assert parts(make_template("chat", weights={"user": 1}).render(row)) == [(" q", 1.0)]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match=r"lone surrogate U\+D800 at character 6,"):
        CHAT.render(messages([("user", "\ud800"), ("assistant", "é")]))


# Independent of the builder of spans: one weight for each byte, one token at a time.


def random_turns(generator: np.random.Generator) -> Turns:
    turns: Turns = [("system", "s:\n")] if generator.random() < 0.5 else []
    for _ in range(int(generator.integers(1, 8))):
        characters = generator.choice(list("ab \n\n\r\t:.。é東👩{}"), size=int(generator.integers(1, 20)))
        role = str(generator.choice(["user", "assistant", "tool"]))
        turns.append((role, str(generator.choice(["x", "。", "東", "9"])) + "".join(characters)))
    return [*turns, ("assistant", "1")]


def tidy(text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line for line in lines if line.strip()).strip()


def byte_weights(turns: Turns, weights: dict[str, float], only_last: bool) -> tuple[bytes, list[float]]:
    """The text and the weight of each of its bytes; the last weight is of the end of text."""
    last = max(place for place, (role, _) in enumerate(turns) if role == "assistant")
    data, weighed, weight = b"", [], 0.0
    for place, (role, text) in enumerate(turns):
        weight = weights[role] if not only_last or role != "assistant" or place == last else 0.0
        label = f"{role.capitalize()}:".encode()
        rest = (" " + tidy(text) + ("\n\n" if place + 1 < len(turns) else "")).encode()
        data += label + rest
        weighed += [0.0] * len(label) + [weight] * len(rest)
    return data, [*weighed, weight]


@pytest.fixture(scope="module")
def official() -> TRIE_TOKENIZER:
    return TRIE_TOKENIZER(str(files("rwkv").joinpath("rwkv_vocab_v20230424.txt")))


@pytest.mark.parametrize("only_last", [False, True])
@pytest.mark.parametrize(
    "weights",
    [{}, {"user": 0.5, "tool": 0.25, "assistant": 2.0}],
    ids=["default", "all roles"],
)
def test_random_conversations_against_a_weight_for_each_byte(
    weights: dict[str, float], only_last: bool, official: TRIE_TOKENIZER
) -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    template = make_template("chat", weights=weights, train_turns="last" if only_last else "all")
    full = {"system": 0.0, "user": 0.0, "assistant": 1.0, "tool": 0.0} | weights
    conversations = [random_turns(generator) for _ in range(50)]
    rendered = [template.render(messages(turns)) for turns in conversations]
    tokenizers: list[tuple[Any, Any]] = [
        (WorldTokenizer(), lambda data: official.encode(data.decode())),
        (BytesTokenizer(), lambda data: [byte + 1 for byte in data]),
    ]
    for tokenizer, encode in tokenizers:
        expected_ids, expected_weights = [], []
        for turns in conversations:
            data, weighed = byte_weights(turns, full, only_last)
            ids, end, token_weights = encode(data), 0, []
            for token in ids:
                end += len(tokenizer.decode_bytes([token]))
                token_weights.append(weighed[end - 1])
            expected_ids += [*ids, 0]
            expected_weights += [0.0, *token_weights[1:], weighed[-1]]
        batch = make_documents(rendered, tokenizer)
        assert batch.tokens.tolist() == expected_ids
        assert batch.weights.tolist() == expected_weights
        assert 0 < np.count_nonzero(batch.weights) < len(batch.weights)
