"""Lengths, shares, the ledger and its groups, against counts made by hand; and that no document is looked at singly."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from infctx.data.document_set import DocumentSet
from infctx.data.order import Portion
from infctx.data.sources.records import Rejection
from infctx.data.token_store import INDEX_TYPE, TokenStore
from infctx.data_view import DataToView, account_with_facts, measure
from infctx.data_view.sets import measure_lengths


def test_lengths_of_powers_of_two_and_their_neighbours() -> None:
    lengths = np.array([1, 2, 3, 4, 7, 8, 63, 64, 65, 2**40 - 1, 2**40])
    facts = measure_lengths(lengths)
    filled = {
        bucket.first: (bucket.last, bucket.num_documents, bucket.num_tokens)
        for bucket in facts.buckets
        if bucket.num_documents
    }
    assert filled == {
        1: (1, 1, 1), 2: (3, 2, 5), 4: (7, 2, 11), 8: (15, 1, 8), 32: (63, 1, 63), 64: (127, 2, 129),
        2**39: (2**40 - 1, 1, 2**40 - 1), 2**40: (2**41 - 1, 1, 2**40),
    }  # fmt: skip
    assert [bucket.first for bucket in facts.buckets] == [2**power for power in range(41)]


def test_quantiles_are_lengths_that_occur() -> None:
    facts = measure_lengths(np.arange(1, 101)[::-1] * 10)
    assert (facts.shortest, facts.tenth, facts.median, facts.ninetieth, facts.longest) == (10, 100, 500, 900, 1000)
    assert facts.mean == 505.0
    one = measure_lengths(np.array([7]))
    assert (one.shortest, one.tenth, one.median, one.ninetieth, one.longest, one.mean) == (7, 7, 7, 7, 7, 7.0)


@pytest.fixture
def mixture(make_view: Callable[..., DataToView], byte_document: Callable[..., Any]) -> Callable[..., DataToView]:
    documents = [
        byte_document("x" * 9, origin="a:1"),
        byte_document("y" * 19, origin="a:2"),
        byte_document("z" * 29, origin="a:3"),
        byte_document("question answer", trained="answer", origin="b:1", set_index=1),
    ]

    def make(**settings: Any) -> DataToView:
        return make_view(documents=documents, set_names=("plain", "chat"), **settings)

    return make


def test_sets_with_their_part_of_an_epoch(mixture: Callable[..., DataToView]) -> None:
    facts = measure(mixture(portions=[Portion(share=3), Portion(share=1)]), show=0)
    plain, chat = facts.sets
    assert (plain.name, plain.num_documents, plain.num_tokens, plain.num_trained) == ("plain", 3, 60, 57)
    assert (chat.name, chat.num_documents, chat.num_tokens, chat.num_trained) == ("chat", 1, 16, 6)
    # Every set at least once: 60 tokens are the three shares, so the other set gives 20.
    assert (plain.epoch_tokens, plain.share, plain.passes) == (60, 0.75, 1.0)
    assert (chat.epoch_tokens, chat.share, chat.passes) == (20, 0.25, 1.25)
    assert (chat.lengths.shortest, plain.lengths.shortest, plain.lengths.longest) == (16, 10, 30)
    assert facts.lengths.median == 16


def test_documents_are_shown_from_each_set_in_turn(mixture: Callable[..., DataToView]) -> None:
    assert [document.origin for document in measure(mixture(), show=3).documents] == ["a:1", "b:1", "a:2"]
    assert [document.set_name for document in measure(mixture(), show=2).documents] == ["plain", "chat"]
    assert len(measure(mixture(), show=99).documents) == 4
    assert measure(mixture(), show=0).documents == ()


def test_json_has_the_ledger_and_what_was_measured(mixture: Callable[..., DataToView]) -> None:
    rejected = [Rejection(file="a", line=4, reason="empty document")]
    view = mixture(loaded={"rejected": rejected, "dropped": {"cut": 7, "empty": 3, "long": 0}})
    account = json.loads(json.dumps(account_with_facts(measure(view, show=1)), allow_nan=False))
    assert account["documents"] == 4
    assert account["tokens"] == {"in": 86, "trained": 63, "masked": 13, "dropped": 10}
    assert account["dropped_tokens"] == {"cut": 7, "empty": 3}
    assert account["duplicate_documents"] == 0
    assert account["rejected_rows"] == [{"file": "a", "line": 4, "reason": "empty document"}]
    assert account["held_out"] == {"documents": 0, "tokens": 0}
    assert [(one["name"], one["masked"], one["passes"], one["lengths"]["max"]) for one in account["sets"]] == [
        ("plain", 3, 1.0, 30),
        ("chat", 10, 1.0, 16),
    ]
    histogram = account["lengths"].pop("histogram")
    assert account["lengths"] == {"min": 10, "p10": 10, "median": 16, "p90": 30, "max": 30, "mean": 19.0}
    assert histogram == [
        {"from": 8, "to": 15, "documents": 1, "tokens": 10},
        {"from": 16, "to": 31, "documents": 3, "tokens": 66},
    ]
    assert account["first_step"]["mode"] == "stream"
    end_never_trained, rejected_rows = account["warnings"]
    assert "set chat" in end_never_trained
    assert "First: a:4." in rejected_rows


def test_rows_left_out_are_grouped_by_reason_whatever_their_numbers(make_view: Callable[..., DataToView]) -> None:
    rejected = [
        *(Rejection(file="b.jsonl", line=line, reason="empty document") for line in (3, 9)),
        *(Rejection(file="a.jsonl", line=line, reason=f"{line * 1000:,} tokens, more than 5") for line in (1, 2, 3, 4)),
    ]
    first, second = measure(make_view(loaded={"rejected": rejected}), show=0).rejected
    assert (first.reason, first.num_rows) == ("1,000 tokens, more than 5", 4)
    assert first.places == ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3")
    assert (second.num_rows, second.places) == (2, ("b.jsonl:3", "b.jsonl:9"))


def test_a_ledger_that_does_not_add_up_is_our_bug(make_view: Callable[..., DataToView]) -> None:
    view = make_view()
    view.account["tokens"]["masked"] += 1
    with pytest.raises(AssertionError, match="add up"):
        measure(view, show=0)


def test_only_what_is_shown_is_read(make_view: Callable[..., DataToView], monkeypatch: pytest.MonkeyPatch) -> None:
    count = 50_000
    lengths = np.full(count, 40)
    index = np.zeros(count, INDEX_TYPE)
    index["end"] = np.cumsum(lengths)
    index["begin"] = index["end"] - lengths
    index["digest"] = index["line"] = np.arange(count)
    store = TokenStore(
        tokens=np.full(40 * count, 98, dtype=np.uint16),
        run_ends=np.array([40 * count]),
        run_weights=np.ones(1, dtype=np.float32),
        index=index,
    )
    documents = DocumentSet(
        stores=(store,), files=(("a",),), entries=index, set_indices=np.zeros(count, np.uint8), set_names=("one",)
    )
    read = []
    get = DocumentSet.__getitem__
    monkeypatch.setattr(DocumentSet, "__getitem__", lambda self, place: read.append(place) or get(self, place))
    facts = measure(make_view(documents=documents, held_out=documents, mode="document", rows=4), show=2)
    assert facts.lengths.buckets[0].num_documents == count
    # Two to be shown, and a row of the first step each.
    assert len(read) == 6
