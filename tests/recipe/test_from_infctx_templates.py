"""Rows of RWKV-infctx-trainer as templates: the text is the same, and what differs is told."""

from collections.abc import Mapping
from typing import Any

import pytest

from infctx.data.rendered import Rendered
from infctx.recipe.schema import Recipe
from infctx.run_data import set_spec


def rendered(recipe: Recipe, row: Mapping[str, object]) -> Rendered:
    (_, source), *_ = recipe.data.sources()
    return set_spec("x", source).template.render(row)


def trained(text: Rendered) -> list[str]:
    content = text.text.encode()
    return [content[start:end].decode() for start, end, _ in text.spans]


def as_that_trainer_joins(row: Mapping[str, str], keys: dict[str, Any]) -> str:
    """The text of a row as RWKV-infctx-trainer puts it together."""
    parts = []
    for place, column in enumerate(keys["multi_column_keys"]):
        if row.get(column):
            parts.append(keys["multi_column_separator"] if parts else "")
            parts.append(keys["multi_column_prefix"][place] + row[column] + keys["multi_column_suffix"][place])
    return "".join(parts)


@pytest.mark.parametrize(
    "row", [{"q": "Q", "c": "C", "a": "A"}, {"q": "Q", "a": "{A}"}, {"q": "é\n", "c": "", "a": "A"}]
)
@pytest.mark.parametrize("mask", [[True, False, True], [False, False, True], [True, True, True], [False]])
def test_merged_columns_give_the_same_text(config: Any, row: dict[str, str], mask: list[bool]) -> None:
    keys = {
        "multi_column_keys": ["q", "c", "a"],
        "multi_column_prefix": ["Question {1}:\n", "Context: ", "é"],
        "multi_column_suffix": ["", "", "</s>"],
        "multi_column_train_mask": mask,
        "multi_column_separator": "\n\n",
    }
    translation = config.translate(data=keys)
    text = rendered(config.load(translation), row)
    assert text.text == as_that_trainer_joins(row, keys)
    # What stands around a column is trained like it; a column that the mask does not reach is trained.
    masks = dict(zip(keys["multi_column_keys"], [*mask, True, True], strict=False))
    for column, value in row.items():
        if value:
            assert any(value in part for part in trained(text)) == masks[column]
    assert all(config.of(translation, f"data.{name}")[0] == "translated" for name in keys)
    assert any("trained there whatever" in note for note in translation.notes)


def test_columns_with_odd_names(config: Any) -> None:
    keys = {"multi_column_keys": ["a:b", "{x}"], "multi_column_prefix": [None, "> "]}
    recipe = config.recipe(data=keys)
    assert recipe.data.fields == {"column_1": "a:b", "column_2": "{x}"}
    assert rendered(recipe, {"a:b": "1", "{x}": "2"}).text == "1> 2"


def test_single_quoted_new_lines_stay_and_are_told(config: Any) -> None:
    translation = config.raw(
        """\
data:
  source: a/b
  multi_column_keys: ['q', 'a']
  multi_column_prefix: ['Q:\\n', 'A:\\n']
  multi_column_separator: "\\n\\n"
""",
    )
    text = rendered(config.load(translation), {"q": "x", "a": "y"}).text
    assert text == "Q:\\nx\n\nA:\\ny"
    (note,) = [note for note in translation.notes if "backslash" in note]
    assert "multi_column_prefix" in note


def test_which_template_comes_first(config: Any) -> None:
    several = {"custom_text_key": "code", "conversation_format": "iopairs", "multi_column_keys": ["a", "b"]}
    several["disable_prompt_completion_mask"] = True
    translation = config.translate(data=several)
    recipe = config.load(translation)
    assert (recipe.data.template, recipe.data.fields) == ("text", {"text": "code"})
    assert config.of(translation, "data.conversation_format")[1] == "custom_text_key comes before it."
    assert config.of(translation, "data.multi_column_keys")[1] == "custom_text_key comes before it."
    assert config.of(translation, "data.disable_prompt_completion_mask")[1] == "custom_text_key comes before it."
    translation = config.translate(data={"multi_column_keys": ["a", "b"], "conversation_format": "sender"})
    assert config.load(translation).data.template == "chat"
    assert config.of(translation, "data.multi_column_keys")[1] == "conversation_format comes before it."


def test_prompt_and_completion(config: Any) -> None:
    recipe = config.recipe(data={"disable_prompt_completion_mask": True})
    assert trained(rendered(recipe, {"prompt": "p", "completion": "c"})) == ["pc"]
    translation = config.translate(data={"disable_prompt_completion_mask": False, "multi_column_keys": []})
    assert config.load(translation).data.template == "text"
    assert any("Nothing says which columns" in note for note in translation.notes)


IOPAIRS = {
    "conversation_format": "iopairs",
    "conversation_key": "talk",
    "conversation_input_key_prefix_map": {"ask": "\n\nUser: ", "reply": "\n\nAssistant: "},
    "conversation_input_key_mask": {"ask": False, "reply": True},
    "conversation_sender_suffix": {"ask": "", "reply": ""},
    "conversation_end_of_conversation": "\n\nUser:",
}
SENDER = {
    "conversation_format": "sender",
    "conversation_key": "conversations",
    "conversation_sender_key": "who",
    "conversation_input_key_map": {"says": "\n\n{sender}: "},
    "conversation_sender_value_map": {"human": "User", "gpt": "Assistant", "rules": "System"},
    "conversation_sender_mask": {"human": False, "gpt": True},
    "conversation_sender_suffix": {},
}
PAIR_ROW = {"talk": [{"ask": "q", "reply": "r"}, {"ask": "q2", "reply": "r2"}]}
SENDER_ROW = {
    "conversations": [
        {"who": "rules", "says": "s"},
        {"who": "human", "says": "q"},
        {"who": "gpt", "says": "r"},
    ]
}


def test_pairs_as_a_chat(config: Any) -> None:
    translation = config.translate(data=IOPAIRS)
    recipe = config.load(translation)
    assert recipe.data.fields == {"conversation": "talk", "input": "ask", "output": "reply"}
    text = rendered(recipe, PAIR_ROW)
    assert text.text == "User: q\n\nAssistant: r\n\nUser: q2\n\nAssistant: r2"
    assert trained(text) == [" r\n\n", " r2"]
    assert [one.key for one in translation.of_kind("without_counterpart")] == ["data.conversation_end_of_conversation"]
    everything = config.recipe(data={**IOPAIRS, "conversation_input_key_mask": {"reply": False}})
    assert everything.data.weights == {"user": 1, "assistant": 0}


def test_senders_as_a_chat(config: Any) -> None:
    translation = config.translate(data=SENDER)
    recipe = config.load(translation)
    assert recipe.data.fields == {"sender": "who", "message": "says"}
    assert recipe.data.roles == {"human": "user", "gpt": "assistant", "rules": "system"}
    # What is not in the mask was trained.
    assert recipe.data.weights == {"system": 1}
    text = rendered(recipe, SENDER_ROW)
    assert text.text == "System: s\n\nUser: q\n\nAssistant: r"
    assert trained(text) == [" s\n\n", " r"]
    assert translation.of_kind("without_counterpart") == []


@pytest.mark.parametrize(
    ("base", "change", "without"),
    [
        (
            IOPAIRS,
            {"conversation_input_key_prefix_map": {"ask": "Q: ", "reply": "A: "}},
            {"conversation_input_key_prefix_map", "conversation_input_key_mask"},
        ),
        (
            IOPAIRS,
            {"conversation_input_key_prefix_map": {"ask": "\\n\\nUser: ", "reply": "\n\nAssistant: "}},
            {"conversation_input_key_prefix_map", "conversation_input_key_mask"},
        ),
        (IOPAIRS, {"conversation_sender_suffix": {"ask": "</s>"}}, {"conversation_sender_suffix"}),
        (
            IOPAIRS,
            {"conversation_format": "other"},
            set(IOPAIRS),
        ),
        (
            SENDER,
            {"conversation_sender_value_map": {"human": "Instruction", "gpt": "Response"}},
            {"conversation_sender_value_map", "conversation_input_key_map", "conversation_sender_mask"},
        ),
        (
            SENDER,
            {"conversation_sender_value_map": {"human": "User", "person": "User"}},
            {"conversation_sender_value_map", "conversation_input_key_map", "conversation_sender_mask"},
        ),
        (
            SENDER,
            {"conversation_input_key_map": {"says": "\n\n{sender}: ", "context": ""}},
            {"conversation_input_key_map"},
        ),
    ],
)
def test_conversations_of_another_form_are_told(
    config: Any, base: dict[str, Any], change: dict[str, Any], without: set[str]
) -> None:
    keys = {**base, "conversation_end_of_conversation": None, **change}
    translation = config.translate(data=keys)
    config.load(translation)
    expected = {f"data.{name}" for name in without if keys.get(name) is not None}
    assert {one.key for one in translation.of_kind("without_counterpart")} == expected
