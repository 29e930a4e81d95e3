"""Rows of every shape that holds a conversation, read as the same turns, and rows of no such shape."""

import json

import numpy as np
import pytest

from infctx.data.rendered import EmptyRowError, Rendered, WrongFieldsError
from infctx.data.template_catalog import make_template
from infctx.data.templates import make_documents
from infctx.data.tokenizer import WorldTokenizer

CHAT = make_template("chat")
DIALOG = [("system", "Be brief."), ("user", "Größe?"), ("assistant", "1 m"), ("user", "東京"), ("assistant", "京。")]


def messages(turns: list[tuple[str, str]]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def parts(rendered: Rendered) -> list[tuple[str, float]]:
    """The text of each span with its weight."""
    data = rendered.text.encode()
    return [(data[start:end].decode(), weight) for start, end, weight in rendered.spans]


NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
PAIRS = [{"input": "Größe?", "output": "1 m"}, {"input": "東京", "output": "京。"}]
SINGLE = [{"input": "Größe?"}, {"output": "1 m"}, {"input": "東京"}, {"output": "京。"}]

SHAPES: dict[str, dict[str, object]] = {
    "messages": messages(DIALOG),
    "parts": {
        "messages": [{"role": role, "content": [{"type": "text", "text": c} for c in text]} for role, text in DIALOG]
    },
    "parquet": {"messages": [{"role": r, "content": t, "tool_calls": None, "weight": None} for r, t in DIALOG]},
    "capitals": messages([(role.upper(), text) for role, text in DIALOG]),
    "sharegpt": {"conversations": [{"from": NAMES[role], "value": text} for role, text in DIALOG]},
    "sharegpt and system": {
        "system": "Be brief.",
        "conversations": [{"from": NAMES[role], "value": text} for role, text in DIALOG[1:]],
    },
    "role in conversations": {"conversations": messages(DIALOG)["messages"]},
    "pairs": {"conversation": [{"system": "Be brief.", **PAIRS[0]}, PAIRS[1]]},
    "pairs and system": {"conversation": PAIRS, "system": "Be brief."},
    "pairs in conversations": {"conversations": [{"system": "Be brief."}, *PAIRS]},
    "single": {"conversation": [{"system": "Be brief."}, *SINGLE]},
    "single with nulls": {
        "conversation": [{"system": "Be brief.", "input": None}, *({"input": None, "output": None} | s for s in SINGLE)]
    },
    "sender": {"conversation": [{"sender": role, "message": text} for role, text in DIALOG]},
    "newlines": messages([(role, f" \r\n{text}\n\n ") for role, text in DIALOG]),
    "null lists before it": {"messages": None, "conversations": [{"from": r, "value": t} for r, t in DIALOG]},
    "keys of all shapes": {
        "conversations": [{"role": None, "content": None, "from": NAMES[role], "value": text} for role, text in DIALOG]
    },
    "an empty system turn": {"messages": [{"role": "system", "content": ""}], "system": "Be brief."},
}
SHAPES["an empty system turn"]["messages"] += messages(DIALOG[1:])["messages"]  # type: ignore[operator]


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_gives_the_same_text_and_spans(row: dict[str, object]) -> None:
    expected = CHAT.render(messages(DIALOG))
    assert CHAT.render(row) == expected
    batch = make_documents([CHAT.render(row), expected], WorldTokenizer())
    first, second = np.split(batch.tokens, 2)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *[(name, "User") for name in ("user", "human", "prompter", "question", "Human")],
        *[(name, "Assistant") for name in ("assistant", "gpt", "bot", "model", "chatgpt", "answer", "ChatGPT")],
        *[(name, "Assistant") for name in ("function_call", "tool_call")],
        *[(name, "Tool") for name in ("tool", "function", "observation", "tool_response", "function_response")],
        ("system", "System"),
    ],
)
def test_names_of_roles(name: str, label: str) -> None:
    row = {"conversations": [{"from": name, "value": "x"}, {"from": "gpt", "value": "y"}]}
    assert CHAT.render(row).text == f"{label}: x\n\nAssistant: y"


def test_renamed_columns_keys_and_roles() -> None:
    template = make_template(
        "chat",
        fields={"messages": "dialog", "role": "speaker", "content": "text", "system": "rules"},
        roles={"narrator": "system", "gpt": "user", "Elf": "assistant"},
    )
    turns = [{"speaker": "gpt", "text": "q"}, {"speaker": "Elf", "text": "a"}, {"speaker": "Narrator", "text": "n"}]
    assert template.render({"dialog": turns, "rules": "r"}).text == "User: q\n\nAssistant: a\n\nSystem: n"
    assert template.render({"dialog": turns[:2], "rules": "r"}).text == "System: r\n\nUser: q\n\nAssistant: a"
    with pytest.raises(WrongFieldsError, match=r'expected "dialog", "conversations" or "conversation"'):
        template.render(messages(DIALOG))


def test_calls_and_answers_of_tools_are_text() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2, "é"]}'}},
        {"function": {"name": "now", "arguments": {"zone": None}}},
        {"function": {"name": "say", "arguments": "not JSON"}},
    ]
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "3\n\n4"},
        {"role": "assistant", "content": None, "tool_calls": calls[1:2]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "At noon.", "tool_calls": []},
    ]
    rendered = CHAT.render({"messages": turns})
    now = '{"name":"now","arguments":{"zone":null}}'
    add, say = '{"name":"add","arguments":{"a":1,"b":[2,"é"]}}', '{"name":"say","arguments":"not JSON"}'
    first = f" Let me see.\n{add}\n{now}\n{say}\n\n"
    assert parts(rendered) == [(first, 1.0), (f" {now}\n\n", 1.0), (" At noon.", 1.0)]
    assert (
        rendered.text
        == f"User: q\n\nAssistant:{first}Tool: 3\n4\n\nAssistant: {now}\n\nTool: noon\n\nAssistant: At noon."
    )
    assert [json.loads(line)["name"] for line in first.strip().split("\n")[1:]] == ["add", "now", "say"]


def test_a_call_without_its_content_key_is_a_turn() -> None:
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    assert CHAT.render({"messages": [turn]}).text == 'Assistant: {"name":"f","arguments":""}'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (messages([("user", "q"), ("assistant", " \n")]), r"^turn 2 \(assistant\) is empty$"),
        (messages([("user", ""), ("assistant", "a")]), r"^turn 1 \(user\) is empty$"),
        (messages([("system", ""), ("user", "q"), ("tool", "")]), r"^turn 3 \(tool\) is empty$"),
        ({"conversation": [{"input": "q", "output": ""}]}, r"^turn 1 \(assistant\) is empty$"),
        ({"messages": [{"role": "user", "content": []}]}, r"^turn 1 \(user\) is empty$"),
        ({"messages": [{"role": "user", "content": None}]}, r"^turn 1 \(user\) is empty$"),
        ({"messages": []}, r'^"messages" has no turns$'),
    ],
)
def test_an_empty_turn_makes_an_empty_row(row: dict[str, object], message: str) -> None:
    with pytest.raises(EmptyRowError, match=message):
        CHAT.render(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": "hi"},
            r'expected "messages", "conversations" or "conversation" as a list of turns, found.*\(str',
        ),
        ({"dialog": []}, r'as a list of turns, found the fields: "dialog" \(list\)$'),
        ({"messages": ["hi"]}, r"turn 1: expected an object, got str"),
        (
            {"messages": [{"text": "hi"}]},
            r"turn 1: expected role/content, from/value, sender/message or input/output, f",
        ),
        ({"messages": [{"role": "user", "text": "hi"}]}, r'turn 1: expected "content" beside "role".*data\.fields'),
        (messages([("user", "q"), ("elf", "a")]), r"turn 2: unknown role 'elf'.*data\.roles: \{elf: user\}"),
        ({"messages": [{"role": 3, "content": "hi"}]}, r"turn 1: unknown role 3"),
        ({"messages": [{"role": "user", "content": 3}]}, r"turn 1: expected its content as a string or a list.*int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"turn 1: expected parts .* of type image"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, r"turn 1: expected parts .* of type str"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"turn 1: expected parts"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            r"only the assistant can have tool_calls",
        ),
        (
            {"messages": [{"role": "gpt", "content": "a", "tool_calls": [1]}]},
            r"tool_calls: expected \{function:.*got 1",
        ),
        (
            {
                "messages": [
                    {"role": "gpt", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": b"x"}}]}
                ]
            },
            r"turn 1: tool_calls: arguments that JSON cannot hold: .*bytes",
        ),
        ({"messages": [{"role": "gpt", "content": "a"}], "system": 3}, r'"system": expected a string, got int'),
    ],
)
def test_a_row_of_another_shape_is_refused(row: dict[str, object], message: str) -> None:
    with pytest.raises(WrongFieldsError, match=rf"^data\.template=chat: .*{message}"):
        CHAT.render(row)
