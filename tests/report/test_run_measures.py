"""The parts of a measurement: which documents, how often reset, how much gained, how a text goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from infctx import run_measures
from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.tokenizer import BytesTokenizer
from infctx.evaluation.by_position import measure_by_position
from infctx.model.finch import Finch
from infctx.run_measures import Chosen, choose_documents, continue_greedily, gain_beyond, reset_length, write_samples

MakeFinch = Callable[..., Finch]


def document(length: int, *, seed: int = 0, masked: int = 1, origin: str = "a.txt") -> Document:
    tokens = np.random.default_rng(seed).integers(97, 123, length).astype(np.uint16)
    weights = np.ones(length, np.float32)
    weights[:masked] = 0
    return Document(tokens=tokens, weights=weights, origin=origin)


def test_documents_are_chosen_for_reach_and_for_number() -> None:
    documents = DocumentSet.of([document(length, seed=length) for length in (40, 5000, 300, 80, 900, 7, 400, 400)])
    everything = choose_documents(documents, most_tokens=10_000)
    assert sorted(everything.places) == list(range(8))
    assert not everything.is_cut
    some = choose_documents(documents, most_tokens=800)
    assert some.num_tokens <= 800
    assert some.is_cut
    assert some.places[0] == 1
    assert len(some.documents[0]) == 400
    assert all(len(one) <= 100 for one in some.documents[1:])
    assert len(some.documents) >= 4
    assert choose_documents(documents, most_tokens=800).places == some.places
    for place, one in zip(some.places, some.documents, strict=True):
        assert (one.tokens == documents[place].tokens[: len(one)]).all()
    alone = choose_documents(DocumentSet.of([document(5000)]), most_tokens=800)
    assert alone.num_tokens == 800
    # What would be cut before its first target is not read.
    masked = DocumentSet.of([document(500, masked=450), document(100)])
    assert choose_documents(masked, most_tokens=200).places == [1]


def test_the_length_of_a_reset() -> None:
    assert reset_length([document(10_000)], chunk_tokens=1000) == 512
    assert reset_length([document(200), document(90)], chunk_tokens=1000) == 32
    assert reset_length([document(63)], chunk_tokens=1000) is None
    assert reset_length([document(10_000)], chunk_tokens=8) is None
    assert reset_length([], chunk_tokens=8) is None


def test_the_gain_by_hand(make_finch: MakeFinch) -> None:
    """Against a pass over each piece on its own, in float64."""
    model = make_finch(vocab_size=257, dtype=torch.float64)
    documents = [document(150, seed=1), document(70, seed=2)]
    carried, reset = (measure_by_position(model, documents, reset_tokens=every) for every in (None, 32))
    found = gain_beyond(32, carried, reset)
    assert found is not None
    total = weight = 0.0
    for one in documents:
        tokens = torch.from_numpy(one.tokens.astype(np.int64))[None]
        with torch.no_grad():
            whole, _ = model(tokens)
            pieces = torch.cat([model(tokens[:, begin : begin + 32])[0] for begin in range(0, len(one), 32)], dim=1)
        targets = tokens[0, 1:]
        losses = [F.cross_entropy(logits[0, :-1], targets, reduction="none") for logits in (whole, pieces)]
        # A target has as many tokens before it as its place says.
        difference = (losses[1] - losses[0])[31:]
        total, weight = total + float(difference.sum()), weight + len(difference)
    assert found["gain"] == pytest.approx(total / weight, abs=1e-12)
    assert (found["documents"], found["tokens"]) == (2, weight)


def test_prompts_side_by_side_are_continued_as_each_alone(make_finch: MakeFinch) -> None:
    model = make_finch(vocab_size=300)
    prompts = [document(length, seed=length).tokens for length in (3, 40, 17)]
    with torch.no_grad():
        together = continue_greedily(model, prompts, max_tokens=6, usable_ids=257)
        alone = [continue_greedily(model, [prompt], max_tokens=6, usable_ids=257)[0] for prompt in prompts]
    assert together == alone
    ids = prompts[1].tolist()
    for token in together[1]:
        logits, _ = model(torch.tensor([ids]))
        assert int(logits[0, -1, :257].argmax()) == token
        ids.append(token)
    assert max(max(row, default=0) for row in together) < 257


def test_an_end_of_text_ends_its_row_only(make_finch: MakeFinch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_finch(vocab_size=50)
    prompts = [document(length, seed=length).tokens - 90 for length in (3, 9, 5)]
    with torch.no_grad():
        without = continue_greedily(model, prompts, max_tokens=8, usable_ids=50)
        # A token that one of them writes in the middle.
        end = without[1][4]
        monkeypatch.setattr(run_measures, "END_OF_TEXT", end)
        found = continue_greedily(model, prompts, max_tokens=8, usable_ids=50)
    assert found == [row[: row.index(end)] if end in row else row for row in without]
    assert len(found[1]) <= 4
    assert max(map(len, found)) == 8


def test_a_prompt_is_what_is_not_trained_or_a_beginning_that_ends_with_a_word(make_finch: MakeFinch) -> None:
    model, tokenizer = make_finch(vocab_size=257), BytesTokenizer()

    def sample(text: str, masked: int = 1, repeat: int = 1) -> dict[str, Any]:
        tokens = tokenizer.encode(text * repeat).astype(np.uint16)
        weights = np.ones(len(tokens), np.float32)
        weights[:masked] = 0
        one = Document(tokens=tokens, weights=weights, origin="/home/a/b.txt:3")
        with torch.no_grad():
            return write_samples(model, Chosen(documents=[one], places=[7], is_cut=False), tokenizer, max_tokens=6)[0]

    asked = sample("User: hi\n\nAssistant: hello", masked=20)
    assert (asked["prompt"], asked["document"], asked["is_cut"]) == ("User: hi\n\nAssistant:", " hello", False)
    assert (asked["place"], asked["origin"]) == (7, "b.txt:3")
    long = sample("word " * 300 + "answer", masked=1500)
    assert len(long["prompt"]) == 512
    assert (long["document"], long["is_cut"]) == ("answer", True)
    plain = sample("some plain text here, ", repeat=30)
    assert 80 <= len(plain["prompt"]) <= 160
    assert plain["document"].startswith(" ")
    assert not plain["prompt"].endswith(" ")
    # A character of many bytes is not torn.
    assert "\ufffd" not in sample("世界" * 100)["prompt"][:-1]
