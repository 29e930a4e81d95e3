"""Templates made of pieces: the built-in texts, the newline rule, and templates of one's own."""

import re
from typing import Any

import numpy as np
import pytest

from infctx.data.rendered import EmptyRowError, Rendered, WrongFieldsError
from infctx.data.template_catalog import Template, make_template
from infctx.data.template_pieces import clean_text
from infctx.errors import DataError


def own(*pieces: dict[str, Any], **settings: bool) -> Template:
    return make_template({"pieces": list(pieces), **settings})


def parts(rendered: Rendered) -> list[tuple[str, float]]:
    """The text of each span with its weight."""
    data = rendered.text.encode()
    return [(data[start:end].decode(), weight) for start, end, weight in rendered.spans]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        (" \r\n\t ", ""),
        ("a", "a"),
        ("  a b  \n", "a b"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\r\r\nb", "a\nb"),
        ("a\n\n\n\nb", "a\nb"),
        ("a\n \t\n\u3000\nb", "a\nb"),
        ("a\n\n    indented", "a\n    indented"),
        ("a  \n\nb", "a  \nb"),
        ("a\n  b\n  c", "a\n  b\n  c"),
        ("a\n\x0c\n\x85\n\u2028b", "a\n\u2028b"),
        ("東\n\n京", "東\n京"),
    ],
)
def test_a_cleaned_text_has_no_blank_line(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_cleaning_is_line_by_line() -> None:
    """Against the rule written with lines: those that are only white space go, both ends are stripped."""
    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(2000):
        text = "".join(generator.choice(list("ab \n\n\n\r\t\u3000é"), size=int(generator.integers(1, 15))))
        lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
        cleaned = clean_text(text)
        assert cleaned == "\n".join(lines).strip()
        assert clean_text(cleaned) == cleaned


def test_cleaning_takes_linear_time() -> None:
    # A pattern that tries again at each space would not come back from this.
    assert clean_text("a" + "\n" + " " * 500_000 + "b" + ("\n" + " " * 1000) * 500 + "c").count("\n") == 2


@pytest.mark.parametrize(
    ("template", "row", "text", "trained"),
    [
        (
            "instruct",
            {"instruction": "Add.", "input": "1", "output": "2"},
            "Instruction: Add.\n\nInput: 1\n\nResponse: 2",
            " 2",
        ),
        ("instruct", {"instruction": "Add.", "output": "2"}, "Instruction: Add.\n\nResponse: 2", " 2"),
        ("instruct", {"instruction": "Add.", "input": None, "output": "2"}, "Instruction: Add.\n\nResponse: 2", " 2"),
        ("instruct", {"instruction": "Add.", "input": " \n", "output": "2"}, "Instruction: Add.\n\nResponse: 2", " 2"),
        (
            "instruct",
            {"instruction": " é\r\n\r\n{x}", "output": "2\n\n3 "},
            "Instruction: é\n{x}\n\nResponse: 2\n3",
            " 2\n3",
        ),
        ("question", {"question": "Why?\n", "answer": "東"}, "Question: Why?\n\nAnswer: 東", " 東"),
    ],
)
def test_world_texts(template: str, row: dict[str, object], text: str, trained: str) -> None:
    rendered = make_template(template).render(row)
    assert rendered.text == text
    assert parts(rendered) == [(trained, 1.0)]
    assert rendered.end_weight == 1.0


@pytest.mark.parametrize(
    ("template", "row", "empty"),
    [
        ("instruct", {"instruction": "", "output": "a"}, "instruction"),
        ("instruct", {"instruction": "a", "input": "b", "output": "\n"}, "output"),
        ("question", {"question": "a", "answer": ""}, "answer"),
    ],
)
def test_a_part_without_text_is_an_empty_row(template: str, row: dict[str, object], empty: str) -> None:
    with pytest.raises(EmptyRowError, match=f'^"{empty}" is empty$'):
        make_template(template).render(row)


def test_a_column_has_its_weight_and_its_label_none() -> None:
    row = {"instruction": "i", "input": "x", "output": "o"}
    rendered = make_template("instruct", weights={"instruction": 0.5, "input": 2, "output": 0.25}).render(row)
    assert parts(rendered) == [(" i", 0.5), (" x", 2.0), (" o", 0.25)]
    assert rendered.end_weight == 0.25


def test_a_template_of_ones_own() -> None:
    template = own(
        {"text": "{{{context}}}\n", "train": False, "when": "context"},
        {"text": "Q: {question} {question}\nA:", "train": False},
        {"text": " {answer}", "train": 0.5},
        {"text": "{{}}", "train": True},
    )
    rendered = template.render({"question": "é{x}", "answer": "{context}", "context": "東"})
    assert rendered.text == "{東}\nQ: é{x} é{x}\nA: {context}{}"
    assert parts(rendered) == [(" {context}", 0.5), ("{}", 1.0)]
    assert rendered.end_weight == 1.0
    for nothing in ({}, {"context": None}, {"context": ""}):
        rendered = template.render({"question": "q", "answer": "", **nothing})
        assert rendered.text == "Q: q q\nA: {}"
        assert parts(rendered) == [(" ", 0.5), ("{}", 1.0)]


def test_the_end_of_text_has_the_weight_of_the_last_piece_that_is_there() -> None:
    pieces = [{"text": "{a}", "train": 0.5}, {"text": "{b}", "train": 2, "when": "b"}]
    assert own(*pieces).render({"a": "x", "b": "y"}).end_weight == 2.0
    assert own(*pieces).render({"a": "x"}).end_weight == 0.5
    assert own(*pieces, end_of_text=False).render({"a": "x"}).end_weight == 0.0


def test_values_are_cleaned_where_the_template_says_so() -> None:
    piece = {"text": "A:\n\n{a}", "train": True}
    assert own(piece).render({"a": " x\r\n\r\ny "}).text == "A:\n\n x\r\n\r\ny "
    assert own(piece, clean=True).render({"a": " x\r\n\r\ny "}).text == "A:\n\nx\ny"
    assert own(piece).render({"a": ""}).text == "A:\n\n"
    with pytest.raises(EmptyRowError, match='"a" is empty'):
        own(piece, clean=True).render({"a": " "})
    only_if_there = own(piece | {"when": "a"}, {"text": "{b}", "train": True}, clean=True)
    assert only_if_there.render({"a": " ", "b": "c"}).text == "c"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r'expected "a" as strings \(str\), found the fields: none'),
        ({"a": 3}, r'"a" \(int\)'),
        ({"a": "x", "b": 1.5}, r'"b" \(float\)'),
        ({"a": "x", "b": True}, r'"b" \(bool\)'),
        ({"a": "x", "b": "y"}, r'expected "a" and "c" as strings.*"b" \(str\)$'),
    ],
)
def test_columns_are_text(row: dict[str, object], message: str) -> None:
    template = own({"text": "{a}", "train": True}, {"text": "{b}{c}", "train": True, "when": "b"})
    assert template.render({"a": "x"}).text == "x"
    with pytest.raises(WrongFieldsError, match=rf"^data\.template: .*{message}"):
        template.render(row)


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("{", 0, "{"),
        ("ab}", 2, "}"),
        ("{a}}", 3, "}"),
        ("{a", 0, "{"),
        ("a {{b}} {}", 8, "{}"),
        ("{ a }", 0, "{ a }"),
        ("{a:>3}", 0, "{a:>3}"),
        ("{a!r}", 0, "{a!r}"),
        ("{a{b}", 0, "{"),
    ],
)
def test_a_wrong_brace_is_shown_by_its_place(text: str, place: int, found: str) -> None:
    message = rf"^data\.template\.pieces\[1\]\.text: at character {place}: .*got '{re.escape(found)}'\. "
    with pytest.raises(DataError, match=message):
        own({"text": "{a}", "train": True}, {"text": text, "train": True})


def test_any_name_without_braces_colon_and_bang_is_a_column() -> None:
    template = own({"text": "{a b}{0}{x.y}{東}{_}", "train": True})
    assert template.render({"a b": "1", "0": "2", "x.y": "3", "東": "4", "_": "5"}).text == "12345"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({}, r"data\.template\.pieces: expected a list of \{text, train, when\}, got None"),
        ({"pieces": []}, r"data\.template\.pieces: expected a list"),
        ({"pieces": "{a}"}, r"data\.template\.pieces: expected a list"),
        ({"pieces": ["{a}"]}, r"data\.template\.pieces\[0\]: expected \{text, train, when\}, got '\{a\}'"),
        ({"pieces": [{"text": "{a}"}]}, r"pieces\[0\]\.train: expected true, false or a weight.*got None"),
        ({"pieces": [{"text": "{a}", "train": "yes"}]}, r"pieces\[0\]\.train: .*got 'yes'"),
        ({"pieces": [{"text": "{a}", "train": -1}]}, r"pieces\[0\]\.train: .*got -1"),
        ({"pieces": [{"text": "", "train": True}]}, r"pieces\[0\]\.text: expected a text, got ''"),
        ({"pieces": [{"text": 3, "train": True}]}, r"pieces\[0\]\.text: expected a text, got 3"),
        ({"pieces": [{"text": "{a}", "train": True, "when": "{b}"}]}, r"pieces\[0\]\.when: .*without braces"),
        ({"pieces": [{"text": "{a}", "train": True, "if": "b"}]}, r"pieces\[0\]\.if: expected text, train or when"),
        ({"pieces": [{"text": "{a}", "train": True}], "strip": True}, r"data\.template\.strip: expected pieces, clean"),
        (
            {"pieces": [{"text": "{a}", "train": True}], "clean": 1},
            r"data\.template\.clean: expected true or false, got 1",
        ),
        ({"pieces": [{"text": "{{a}}", "train": True}]}, r"at least one \{column\}.*single|write \{question\}"),
    ],
)
def test_a_malformed_template_is_refused(template: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_template(template)


def test_names_of_ones_own_template_can_be_mapped_and_weighed() -> None:
    mapping = {
        "pieces": [
            {"text": "{a}", "train": False, "when": "c"},
            {"text": "{b}", "train": True},
            {"text": ".", "train": 0},
        ]
    }
    template = make_template(mapping, fields={"a": "x", "c": "z"}, weights={"a": 0.5, "b": 2})
    rendered = template.render({"x": "1", "b": "2", "z": "there"})
    assert parts(rendered) == [("1", 0.5), ("2", 2.0)]
    assert template.render({"x": "1", "b": "2", "c": "not asked for"}).text == "2."
    with pytest.raises(DataError, match=r"data\.fields\.d: the template's columns are a, b, c\."):
        make_template(mapping, fields={"d": "x"})
    with pytest.raises(DataError, match=r"data\.weights\.c: the template's columns are a, b\."):
        make_template(mapping, weights={"c": 1})


def test_columns_of_one_piece_have_one_weight() -> None:
    mapping = {"pieces": [{"text": "{a}{b}", "train": True}]}
    assert make_template(mapping, weights={"a": 2, "b": 2}).render({"a": "x", "b": "y"}).spans == ((0, 2, 2.0),)
    with pytest.raises(DataError, match=r"data\.weights: a and b stand in one piece"):
        make_template(mapping, weights={"a": 2, "b": 3})
