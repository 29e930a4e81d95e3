"""What rows of a set show about its template: whether it fits them, and how their answers begin."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from infctx.data.rendered import leading_space_missing
from infctx.data.template_catalog import looks_like
from infctx.data_view.advice import Advice

if TYPE_CHECKING:
    from infctx.run_data import SampledRow

# Shares of the sampled rows: a document about chat formats may well hold their marks.
MOST_WITH_MARKS = 0.1
MOST_OF_ANOTHER_TEMPLATE = 0.05
MOST_WITHOUT_SPACE = 0.01
QUOTED_CHARACTERS = 60

# At the beginning of a line, or of a column that a template puts after a label of its own.
_BEGIN = r"(?:^|: )[ \t]*"
_CONVERSATION_MARKS = {
    f'"{name}:" and "Assistant:"': re.compile(rf"{_BEGIN}{name}:.*^[ \t]*Assistant:", re.DOTALL | re.MULTILINE)
    for name in ("User", "Human")
}
_FORMAT_MARKS = {
    '"### Instruction"': re.compile(rf"{_BEGIN}### Instruction\b", re.MULTILINE),
    '"<|im_start|>"': re.compile(r"<\|im_start\|>"),
    '"[INST]"': re.compile(r"\[INST\]"),
}
# Text trains all of a conversation; the others would put labels of their own around it.
_MARKS_OF_TEMPLATE = {
    "text": {**_CONVERSATION_MARKS, **_FORMAT_MARKS},
    "instruct": {**_CONVERSATION_MARKS, **_FORMAT_MARKS},
    "question": {**_CONVERSATION_MARKS, **_FORMAT_MARKS},
    "chat": _FORMAT_MARKS,
}

NameSet = Callable[[str], str]


def warnings_of_samples(samples: Sequence[SampledRow], *, name_set: NameSet) -> Iterator[Advice]:
    """Judge each set by its sampled rows.

    Args: name_set: how a sentence names a set, with a space before it.
    """
    by_set: dict[str, list[SampledRow]] = {}
    for row in samples:
        by_set.setdefault(row.set_name, []).append(row)
    for name, rows in by_set.items():
        for rule in (_marks_in_text, _columns_of_another, _not_fitting, _without_space):
            yield from rule(rows, name_set(name))


def _marks_in_text(rows: Sequence[SampledRow], of_set: str) -> Iterator[Advice]:
    template = rows[0].template_name
    for mark, pattern in _MARKS_OF_TEMPLATE.get(template, {}).items():
        found = [row for row in rows if row.rendered is not None and pattern.search(row.rendered.text)]
        if len(found) > MOST_WITH_MARKS * len(rows):
            effect = "trains the questions as well" if template == "text" else "puts its own labels around them"
            yield Advice(
                seen=f"{_count(found, rows)}{of_set} hold conversations already, marked by {mark}, and "
                f"data.template={template} {effect}; the first begins {_beginning(found[0])}.",
                to_do="Give the turns as a column of messages for data.template=chat, or prompt and answer as two "
                "columns for data.template=completion.",
            )
            return


def _columns_of_another(rows: Sequence[SampledRow], of_set: str) -> Iterator[Advice]:
    """Rows that are read as plain text, and have the columns of a template that masks the questions."""
    if rows[0].template_name != "text":
        return
    fitting = [_others(row) if row.rendered is not None and "text" in row.fields else [] for row in rows]
    found = [names for names in fitting if names]
    if len(found) > MOST_OF_ANOTHER_TEMPLATE * len(rows):
        names = " or ".join(found[0])
        yield Advice(
            seen=f"{_count(found, rows)}{of_set} have the columns of data.template={names} beside the text that "
            "data.template=text trains whole.",
            to_do=f"Set data.template: {found[0][0]} to train the answers only.",
        )


def _not_fitting(rows: Sequence[SampledRow], of_set: str) -> Iterator[Advice]:
    found = [(row, names) for row in rows if row.problem is not None and (names := _others(row))]
    if len(found) > MOST_OF_ANOTHER_TEMPLATE * len(rows):
        row, names = found[0]
        yield Advice(
            seen=f"{_count(found, rows)}{of_set} do not fit data.template={row.template_name} and would fit "
            f"{' or '.join(names)}.",
            to_do=f"Set data.template: {names[0]}, for these rows in a set of their own (data.sets).",
        )


def _without_space(rows: Sequence[SampledRow], of_set: str) -> Iterator[Advice]:
    found = [row for row in rows if row.rendered is not None and leading_space_missing(row.rendered)]
    if len(found) > MOST_WITHOUT_SPACE * len(rows):
        yield Advice(
            seen=f"In {_count(found, rows)}{of_set} the answer follows a colon without a space, as in "
            f"{_answer(found[0])}.",
            to_do='Begin the answers with a space: World models expect "Assistant: Hello", the space being part of the '
            "answer's first token.",
        )


def _others(row: SampledRow) -> list[str]:
    return [name for name in looks_like(row.fields) if name not in ("text", row.template_name)]


def _count(found: Sequence[object], rows: Sequence[SampledRow]) -> str:
    return f"{len(found):,} of the first {len(rows):,} rows"


def _beginning(row: SampledRow) -> str:
    return _quoted(row.rendered.text[:QUOTED_CHARACTERS])


def _answer(row: SampledRow) -> str:
    """The surroundings of the first answer that follows a colon."""
    data = row.rendered.text.encode()
    start = next(start for start, _, _ in row.rendered.spans if data[max(0, start - 1) : start] == b":")
    return _quoted(data[max(0, start - 20) : start + 20].decode(errors="ignore"))


def _quoted(text: str) -> str:
    return f'"{" ".join(text.split())}"'
