"""Each warning where it is due, with its numbers and places, and none over sound data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infctx.data.document_set import DocumentSet
from infctx.data.order import Portion
from infctx.data.prepare import DUPLICATE
from infctx.data.sources.records import Rejection
from infctx.data.split import split_tail, split_validation
from infctx.data_view import DataToView, measure

MakeView = Callable[..., DataToView]
ByteDocument = Callable[..., Any]
MakeSamples = Callable[..., Any]

CHAT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def warnings(view: DataToView) -> list[str]:
    return [advice.text for advice in measure(view, show=0).warnings]


def only(view: DataToView) -> str:
    """The one warning there is."""
    (warning,) = warnings(view)
    return warning


@pytest.fixture
def numbered(byte_document: ByteDocument) -> Callable[..., list[Any]]:
    """Distinct documents of 32 tokens, with `trained` of each trained."""

    def make(count: int, *, set_index: int = 0, trained: str | None = None, end: str = "") -> list[Any]:
        return [
            byte_document(
                f"{set_index}{number:04}{'x' * (26 - len(end))}{end}",
                trained=trained,
                origin=f"rows{set_index}.jsonl:{number + 1}",
                set_index=set_index,
            )
            for number in range(count)
        ]

    return make


def test_sound_data_gives_none(make_view: MakeView, make_samples: MakeSamples, numbered: Callable[..., Any]) -> None:
    documents = numbered(100)
    chat = make_samples("chat", [CHAT_ROW] * 20)
    question = make_samples("question", [{"question": "Who is User: or Assistant:?", "answer": "Roles"}] * 20, "1")
    own = {"pieces": [{"text": "Q: {q}\nA:", "train": False}, {"text": " {a}", "train": True}]}
    pieces = make_samples(own, [{"q": "1", "a": "2"}])
    about_formats = [{"text": "Chat formats.\nUser: hi\nAssistant: hello"}, *({"text": f"text {n}"} for n in range(19))]
    text = make_samples("text", about_formats, "2")
    for mode in ("stream", "document"):
        assert (
            warnings(
                make_view(
                    documents=documents,
                    held_out=[replace(document, tokens=document.tokens + 1) for document in documents[:9]],
                    samples=[*chat, *question, *pieces, *text],
                    mode=mode,
                    loaded={"rejected": [Rejection(file="a", line=1, reason="empty document")], "dropped": {"cut": 9}},
                )
            )
            == []
        ), mode


def test_nothing_trained_names_the_set(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    masked = [replace(one, weights=one.weights * 0) for one in numbered(4, set_index=1)]
    found = warnings(make_view(documents=[*numbered(400), *masked], set_names=("books", "chat")))
    assert found[0].startswith("Nothing is trained: all 128 tokens of the set chat are masked. Check data.template")
    alone = warnings(make_view(documents=[replace(one, set_index=0) for one in masked]))
    assert alone[0].startswith("Nothing is trained: all 128 tokens are masked.")
    # The other rules do not say it again in other words, but for the end of text.
    assert len(alone) == 2


def test_less_than_a_hundredth_trained(make_view: MakeView, byte_document: ByteDocument) -> None:
    def make(length: int) -> Any:
        document = byte_document("x" * (length - 1))
        return replace(document, weights=(np.arange(length) == length - 1).astype(np.float32))

    assert only(make_view(documents=[make(101)])).startswith("Only 1 of 101 tokens are trained (0.99%).")
    assert warnings(make_view(documents=[make(100)])) == []


def test_documents_without_a_trained_token(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    documents = numbered(100)
    for place in (7, 8):
        documents[place] = replace(documents[place], weights=documents[place].weights * 0)
    warning = only(make_view(documents=documents))
    assert warning.startswith("2 of 100 documents have no trained token. First: rows0.jsonl:8, rows0.jsonl:9. ")
    assert warnings(make_view(documents=documents[8:] + numbered(8, set_index=0))) == []


@pytest.mark.parametrize(
    ("template", "fields", "mark"),
    [
        ("text", {"text": "User: Hi\n\nAssistant: Hello"}, '"User:" and "Assistant:"'),
        ("text", {"text": "Human: Hi\n\nAssistant: Hello"}, '"Human:" and "Assistant:"'),
        ("text", {"text": "Below is a task.\n\n### Instruction:\nSing\n\n### Response:\nLa"}, '"### Instruction"'),
        ("text", {"text": "<|im_start|>user\nHi<|im_end|>"}, '"<|im_start|>"'),
        ("text", {"text": "<s>[INST] Hi [/INST] Hello</s>"}, '"[INST]"'),
        ("instruct", {"instruction": "User: Hi\nAssistant: Hello\nUser: And?", "output": "More"}, '"User:"'),
        ("question", {"question": "### Instruction:\nSing", "answer": "La"}, '"### Instruction"'),
        (
            "chat",
            {"messages": [{"role": "user", "content": "<|im_start|>Hi"}, CHAT_ROW["messages"][1]]},
            '"<|im_start|>"',
        ),
    ],
)
def test_conversations_inside_of_the_text(
    make_view: MakeView, make_samples: MakeSamples, template: str, fields: dict[str, Any], mark: str
) -> None:
    warning = only(make_view(samples=make_samples(template, [fields] * 3)))
    assert warning.startswith("3 of the first 3 rows hold conversations already")
    assert mark in warning
    assert f"data.template={template}" in warning
    assert 'begins "' in warning


def test_rows_with_the_columns_of_another_template(make_view: MakeView, make_samples: MakeSamples) -> None:
    both = make_samples("text", [{"text": "Hi. Hello.", **CHAT_ROW}] * 4)
    assert only(make_view(samples=both)) == (
        "4 of the first 4 rows have the columns of data.template=chat beside the text that data.template=text trains "
        "whole. Set data.template: chat to train the answers only."
    )
    # With another column chosen as the text, somebody has looked.
    chosen = [replace(row, fields={"instruction": "a", "output": "b"}) for row in both]
    assert warnings(make_view(samples=chosen)) == []


def test_rows_that_fit_another_template_only(make_view: MakeView, make_samples: MakeSamples) -> None:
    samples = make_samples("completion", [{"prompt": "a", "completion": " b"}] * 9 + [{"question": "a", "answer": "b"}])
    warning = only(make_view(samples=samples))
    assert warning.startswith("1 of the first 10 rows do not fit data.template=completion and would fit question. ")
    unknown = make_samples("completion", [{"prompt": "a", "completion": " b"}] * 9 + [{"other": "a"}])
    assert warnings(make_view(samples=unknown)) == []


def test_answers_without_a_space(make_view: MakeView, make_samples: MakeSamples) -> None:
    good = {"prompt": "User: 1\n\nAssistant:", "completion": " 2"}
    samples = make_samples("completion", [good] * 98 + [{**good, "completion": "2"}] * 2, "qa")
    warning = only(make_view(samples=samples))
    assert warning.startswith('In 2 of the first 100 rows the answer follows a colon without a space, as in "User: 1 ')
    assert 'Assistant:2"' in warning
    assert warnings(make_view(samples=make_samples("completion", [good] * 199 + [{**good, "completion": "2"}]))) == []


def test_the_end_of_text_is_never_trained(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    stopless = numbered(5, set_index=1, trained="x")
    warning = only(make_view(documents=[*numbered(5), *stopless], set_names=("books", "chat")))
    assert warning.startswith("The end of text is trained in none of the 5 whole documents of the set chat, so that")
    one_does = [*stopless[:4], *numbered(6, set_index=1)[5:]]
    assert warnings(make_view(documents=[*numbered(5), *one_does])) == []


def test_pieces_of_documents_have_no_end_to_be_trained(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    # Only the beginnings are trained, and the ends are held out.
    train, held_out = split_tail(numbered(20, trained="000"), fraction=0.2)
    assert warnings(make_view(documents=train, held_out=held_out)) == []


def test_documents_shorter_than_a_chunk(make_view: MakeView, byte_document: ByteDocument) -> None:
    documents = [byte_document(f"{place}" * (8 if place % 2 else 2)) for place in range(8)]
    settings = {"documents": documents, "mode": "document", "rows": 2, "chunk_tokens": 64}
    warning = only(make_view(**settings))
    # Rows of 3 and 9 tokens side by side.
    assert warning.startswith("The mean document has 6 tokens, fewer than a chunk of 64, and each row of a step is one")
    assert "33% of the first step is padding, 33% of the first epoch, and a chunk holds 12 tokens." in warning
    assert "Set data.pack_tokens (for example 64)" in warning
    # Rows of one length leave nothing empty; a row alone fills little of a chunk.
    alike = [byte_document(f"{place}" * 5) for place in range(8)]
    assert warnings(make_view(**{**settings, "documents": alike})) == []
    assert "a chunk holds 6 tokens." in only(make_view(**{**settings, "documents": alike, "rows": 1}))
    assert warnings(make_view(**settings, pack_tokens=64)) == []
    assert warnings(make_view(**{**settings, "mode": "stream"})) == []
    assert warnings(make_view(**{**settings, "chunk_tokens": 6})) == []


def test_more_than_a_hundredth_of_duplicates(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    documents = numbered(100)
    documents += [replace(documents[3], origin="again:1"), replace(documents[3], origin="again:2", set_index=1)]
    warning = only(make_view(documents=documents))
    assert warning.startswith(
        "2 of 102 documents (2.0%) are the same as an earlier one. First: again:1 as rows0.jsonl:4, "
    )
    assert "again:2 as rows0.jsonl:4. Set data.on_duplicate: skip" in warning
    assert warnings(make_view(documents=documents[:101])) == []


def test_duplicates_are_found_before_documents_are_cut_anew(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    documents = DocumentSet.of([*numbered(50), *numbered(2)])
    assert only(make_view(documents=documents.rechunked(40))).startswith("2 of 52 documents (3.8%) are the same")


def test_held_out_documents_that_are_trained_on(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    documents = numbered(300)
    others = numbered(5, set_index=1)
    # Pieces of documents are no documents that are in both.
    tails = split_tail(documents, fraction=0.5)
    assert warnings(make_view(documents=tails[0], held_out=tails[1])) == []
    held_out = [replace(others[0], set_index=0), replace(documents[7], origin="held.jsonl:2")]
    warning = only(make_view(documents=documents, held_out=held_out))
    assert warning.startswith("1 of 2 held-out documents are also trained on")
    assert "First: held.jsonl:2 as rows0.jsonl:8." in warning
    assert warnings(make_view(documents=documents, held_out=[replace(one, set_index=0) for one in others])) == []


def test_a_split_of_duplicates_is_seen_on_both_sides(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    train, held_out = split_validation(numbered(10) + numbered(10), fraction=0.5, seed=0)
    found = warnings(make_view(documents=train, held_out=held_out))
    assert found[0].startswith("10 of 20 documents (50.0%)")
    assert "held-out documents are also trained on" in found[1]


def test_many_rows_left_out(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    rejected = [Rejection(file="a.jsonl", line=line, reason="not JSON\x1b") for line in range(1, 7)]
    held_out = [replace(one, set_index=0) for one in numbered(9, set_index=1)]
    settings = {"documents": numbered(100), "held_out": held_out}
    warning = only(make_view(**settings, loaded={"rejected": rejected}))
    assert warning.startswith("6 of 115 rows (5.2%) are left out, the first because: not JSON␛. First: a.jsonl:1, ")
    assert warnings(make_view(**settings, loaded={"rejected": rejected[:5]})) == []
    # Asked for in the recipe.
    skipped = [Rejection(file="a.jsonl", line=line, reason=DUPLICATE) for line in range(50)]
    assert warnings(make_view(**settings, loaded={"rejected": skipped})) == []


def test_a_set_read_very_often(make_view: MakeView, numbered: Callable[..., Any]) -> None:
    documents = [*numbered(40), *numbered(2, set_index=1)]
    settings = {"documents": documents, "set_names": ("books", "chat")}
    portions = [Portion(epochs=1), Portion(epochs=10.5)]
    assert only(make_view(**settings, portions=portions)).startswith(
        "One epoch reads the 2 documents of the set chat 10.5 times. Lower its share, epochs or tokens"
    )
    assert warnings(make_view(**settings, portions=[Portion(), Portion(epochs=10)])) == []
