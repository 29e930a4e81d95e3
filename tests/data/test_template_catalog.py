"""Templates by name, and what a recipe can change in them."""

import json
import pickle
from typing import Any

import pytest

from infctx.data.rendered import NothingToTrainOnError, Rendered, WrongFieldsError
from infctx.data.template_catalog import TEMPLATE_NAMES, Template, looks_like, make_template
from infctx.data.templates import make_document, make_documents
from infctx.data.tokenizer import BytesTokenizer
from infctx.errors import DataError

BYTES = BytesTokenizer()


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        ("text", {"prompt": "a", "completion": "b"}, r'"text".*"prompt".*"completion".*fit data\.template=completion$'),
        ("completion", {"text": "a"}, r'"prompt" and "completion".*"text" \(str\); they fit data\.template=text$'),
        ("completion", {"prompt": "a"}, r'expected "prompt" and "completion".*found the fields: "prompt" \(str\)$'),
        ("text", {"messages": [{"role": "user", "content": "a"}]}, r"they fit data\.template=chat$"),
        ("chat", {"question": "a", "answer": "", "text": "x"}, r"they fit data\.template=text or question$"),
        ("instruct", {"instruction": "a"}, r'expected "instruction" and "output" as strings'),
        ("text", {"text": 3}, r'"text" \(int\)$'),
        ("text", {"text": None}, r'"text" \(NoneType\)$'),
        ("text", {}, "found the fields: none$"),
    ],
)
def test_fields_that_do_not_fit_are_named(template: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(WrongFieldsError, match=rf"^data\.template={template}: .*{message}"):
        make_template(template).render(fields)


def test_every_template_is_in_the_catalog() -> None:
    assert TEMPLATE_NAMES == ("text", "completion", "instruct", "question", "chat")
    for wrong in ("txt", ""):
        with pytest.raises(DataError, match=rf"^data\.template={wrong}: expected one of text, completion, instruct, "):
            make_template(wrong)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"text": "a", "instruction": "b", "output": "c", "input": ""}, ["text", "instruct"]),
        ({"question": "a", "answer": ""}, ["question"]),
        ({"messages": [], "prompt": "a", "completion": "\ud800"}, ["chat"]),
        ({"messages": [{"role": "user", "content": "no answer"}]}, ["chat"]),
        ({"messages": [{"role": "nobody", "content": "x"}], "body": "x"}, []),
    ],
)
def test_rows_say_which_templates_they_fit(fields: dict[str, object], names: list[str]) -> None:
    assert looks_like(fields) == names


@pytest.mark.parametrize(
    ("template", "weights", "weight", "row_weight", "expected"),
    [
        ("completion", {}, 1.0, None, [0, 1, 1]),
        ("completion", {"completion": 0.5}, 1.0, None, [0, 0.5, 0.5]),
        ("completion", {"prompt": 2}, 1.0, None, [2, 1, 1]),
        ("completion", {"prompt": 1, "completion": 0}, 1.0, None, [1, 0, 0]),
        ("completion", {"prompt": 2}, 0.25, None, [0.5, 0.25, 0.25]),
        ("completion", {"prompt": 2}, 0.5, 4, [4, 2, 2]),
        ("completion", {}, 1.0, 0, [0, 0, 0]),
        ("completion", {}, 0.0, 3.0, [0, 0, 0]),
    ],
)
def test_weights_of_columns_rows_and_sets_multiply(
    template: str, weights: dict[str, float], weight: float, row_weight: float | None, expected: list[float]
) -> None:
    """Of the prompt's last byte, the completion, and the end of text."""
    made = make_template(
        template, weights=weights, weight=weight, weight_field=None if row_weight is None else "quality"
    )
    rendered = made.render({"prompt": "pq", "completion": "c", "quality": row_weight})
    batch = make_documents([rendered], BYTES)
    assert batch.weights.tolist() == [0.0, *expected]
    assert all(span[2] > 0 for span in rendered.spans)
    if not any(expected):
        with pytest.raises(NothingToTrainOnError):
            make_document(rendered, BYTES, origin="x")


@pytest.mark.parametrize("value", ["0.5", " 0.5 ", 0.5])
def test_a_rows_weight_may_be_text_as_in_csv(value: object) -> None:
    rendered = make_template("text", weight_field="quality").render({"text": "a", "quality": value})
    assert (rendered.spans, rendered.end_weight) == (((0, 1, 0.5),), 0.5)


@pytest.mark.parametrize(
    "value", ["", "half", "nan", "-1", None, True, -1, float("nan"), float("inf"), 1e10, "missing"]
)
def test_a_rows_weight_is_a_number_or_refused(value: object) -> None:
    template = make_template("text", weight_field="quality")
    fields = {"text": "a"} if value == "missing" else {"text": "a", "quality": value}
    with pytest.raises(WrongFieldsError, match=r"data\.weight_field=quality: expected a number from 0 to 1e9, got"):
        template.render(fields)


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("text", {"weights": {"body": 1}}, r"data\.weights\.body: the template's columns are text\."),
        ("instruct", {"weights": {"assistant": 1}}, r"data\.weights\.assistant: .* instruction, input, output\."),
        ("chat", {"weights": {"text": 1}}, r"data\.weights\.text: the template's roles are system, user, assistant, t"),
        ("text", {"weights": {"text": -1}}, r"data\.weights\.text: expected a number from 0 to 1e9, got -1"),
        ("text", {"weight": float("nan")}, r"data\.weight: expected a number from 0 to 1e9, got nan"),
        ("text", {"weight": True}, r"data\.weight: expected a number"),
        ("text", {"fields": {"body": "text"}}, r"data\.fields\.body: the template's columns are text\."),
        ("text", {"fields": {"text": 3}}, r"data\.fields\.text: expected the name of a column in the file, got 3"),
        ("chat", {"fields": {"text": "x"}}, r"data\.fields\.text: the template's columns and keys are messages, conv"),
        ("text", {"train_turns": "last"}, r"data\.train_turns=last: only conversations have turns"),
        ("text", {"roles": {"a": "user"}}, r"data\.roles: only conversations have turns"),
        ("chat", {"train_turns": "first"}, r"data\.train_turns=first: expected all or last"),
        ("chat", {"roles": {"a": "usr"}}, r"data\.roles\.a: expected one of system, user, assistant, tool, got 'usr'"),
    ],
)
def test_what_a_template_cannot_honour_is_an_error(template: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_template(template, **arguments)


def test_columns_can_have_other_names_in_the_file() -> None:
    row = {"q": "why", "a": "so", "text": 3}
    renamed = make_template("completion", fields={"prompt": "q", "completion": "a"}, weights={"prompt": 0.5})
    assert renamed.render(row) == Rendered(text="whyso", spans=((0, 3, 0.5), (3, 5, 1.0)), end_weight=1.0)
    with pytest.raises(WrongFieldsError, match=r'expected "q" and "a" as strings'):
        renamed.render({"q": "why"})


def templates() -> list[Template]:
    own = {"pieces": [{"text": "{a}", "train": True}]}
    return [
        *[make_template(name) for name in TEMPLATE_NAMES],
        make_template("text", weight=2.0),
        make_template("text", weight_field="w"),
        make_template("text", weights={"text": 0.5}),
        make_template("text", fields={"text": "body"}),
        make_template("chat", train_turns="last"),
        make_template("chat", roles={"narrator": "system"}),
        make_template("chat", fields={"messages": "dialog"}),
        make_template("chat", weights={"user": 0.5}),
        make_template(own),
        make_template(own | {"clean": True}),
        make_template(own | {"end_of_text": False}),
        make_template({"pieces": [{"text": "{a}", "train": 2}]}),
        make_template({"pieces": [{"text": "{{a}}{a}", "train": True}]}),
        make_template({"pieces": [{"text": "{a}", "train": True, "when": "a"}]}),
    ]


def test_a_key_tells_templates_apart_and_nothing_else() -> None:
    keys = [template.key() for template in templates()]
    assert len(set(keys)) == len(keys)
    assert keys == [template.key() for template in templates()]
    assert all(json.dumps(json.loads(key), sort_keys=True, separators=(",", ":")) == key for key in keys)
    assert make_template("chat", weights={"assistant": 1, "user": 0}).key() == make_template("chat").key()
    assert make_template("text", weight=1).key() == make_template("text").key()
    both = {"prompt": "p", "completion": "c"}
    swapped = dict(reversed(both.items()))
    assert make_template("completion", fields=both).key() == make_template("completion", fields=swapped).key()
    names = {"role": "speaker", "content": "text"}
    swapped = dict(reversed(names.items()))
    assert make_template("chat", fields=names).key() == make_template("chat", fields=swapped).key()


def test_a_template_can_be_pickled_after_use() -> None:
    for template in (make_template("instruct"), make_template("chat", roles={"x": "user"})):
        row = {
            "instruction": "a",
            "output": "b",
            "messages": [{"role": "x", "content": "q"}, {"role": "gpt", "content": "a"}],
        }
        expected = template.render(row)
        copy = pickle.loads(pickle.dumps(template))
        assert copy == template
        assert copy.render(row) == expected
        assert copy.key() == template.key()
