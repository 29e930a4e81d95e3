"""Texts written together against each by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from infctx.generation.batch import Prompt, write_texts
from infctx.generation.reading import TokenArray, read_tokens
from infctx.generation.row import Row, Voice, Wish, write_text
from infctx.generation.sampling import SamplingOptions

OPTIONS = SamplingOptions(temperature=0.9, top_p=0.9, presence_penalty=0.2, frequency_penalty=0.3, penalty_decay=0.9)
TEXTS = ["ab", "The cat", "x", "a longer prompt than the others", "é", "zz", "0123456789"]


@pytest.fixture
def prompts(voice: Voice) -> list[Prompt]:
    lengths = [5, 40, 1, 17, 40, 0, 23]
    return [
        Prompt(
            tokens=voice.tokenizer.encode(text),
            wish=Wish(sampling=OPTIONS, seed=11 + place, max_tokens=length, stops=tuple("aeiou stQ\n,.")),
        )
        for place, (text, length) in enumerate(zip(TEXTS, lengths, strict=True))
    ]


def alone(voice: Voice, prompt: Prompt, document: TokenArray | None = None) -> Row:
    before = None if document is None else read_tokens(voice.model, document)
    row = Row(voice, prompt.wish)
    pieces = list(write_text(voice, row, read_tokens(voice.model, prompt.tokens, before)))
    assert "".join(pieces) == row.text
    return row


@pytest.mark.parametrize("num_rows", [1, 3, 20])
@pytest.mark.parametrize("has_document", [False, True])
def test_the_same_text_alone_and_in_a_batch(
    voice: Voice, prompts: list[Prompt], document: TokenArray, num_rows: int, has_document: bool
) -> None:
    before = read_tokens(voice.model, document) if has_document else None
    kept = None if before is None else [part.clone() for part in before.state]
    found = dict(write_texts(voice, prompts, num_rows=num_rows, before=before))
    assert sorted(found) == list(range(len(prompts)))
    expected = [alone(voice, prompt, document if has_document else None) for prompt in prompts]
    assert [found[number].tokens for number in sorted(found)] == [row.tokens for row in expected]
    assert [found[number].text for number in sorted(found)] == [row.text for row in expected]
    assert {row.ended for row in found.values()} >= {"length", "stop"}
    if before is not None and kept is not None:
        assert all(torch.equal(one, other) for one, other in zip(before.state, kept, strict=True))


def test_the_text_is_that_of_the_whole_model_run_again(voice: Voice, prompts: list[Prompt]) -> None:
    """The most probable token of the forward pass over everything so far, each time."""
    greedy = replace(prompts[1], wish=Wish(sampling=SamplingOptions(temperature=0), seed=0, max_tokens=12))
    tokens = greedy.tokens.tolist()
    for _ in range(12):
        with torch.no_grad():
            logits, _ = voice.model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    assert alone(voice, greedy).tokens == tokens[len(greedy.tokens) :]
    found = dict(write_texts(voice, [greedy, *prompts], num_rows=4))
    assert found[0].tokens == tokens[len(greedy.tokens) :]


def test_end_of_text_ends_a_row_and_is_not_in_it(voice: Voice) -> None:
    with torch.no_grad():
        voice.model.head.weight.zero_()
    prompt = Prompt(
        tokens=np.array([5], dtype=np.int32), wish=Wish(sampling=SamplingOptions(temperature=0), seed=0, max_tokens=9)
    )
    row = alone(voice, prompt)
    assert (row.tokens, row.text, row.ended) == ([], "", "end_of_text")


def test_rows_leave_and_others_come(voice: Voice, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    step = type(voice.step).advance_

    def watched(self: object, tokens: torch.Tensor, state: object) -> torch.Tensor:
        sizes.append(len(tokens))
        return step(self, tokens, state)

    monkeypatch.setattr(type(voice.step), "advance_", watched)
    rows = dict(write_texts(voice, prompts, num_rows=3))
    assert max(sizes) == 3
    # Each token but a row's last was read once, in no row that had ended.
    assert sum(sizes) == sum(max(0, len(row.tokens) - 1) + (row.ended == "end_of_text") for row in rows.values())
