"""The recall probe: the key is where it should be, and scores are those of whole texts read anew."""

from __future__ import annotations

import dataclasses
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
import pytest
import torch

from infctx.data.tokenizer import BytesTokenizer, WorldTokenizer
from infctx.errors import InfctxError
from infctx.evaluation.recall import RecallMap, make_texts, measure_recall
from infctx.evaluation.recall_picture import draw_map, map_in_words
from infctx.evaluation.recall_text import RECALL_FORMS
from infctx.model.finch import Finch

MARKER, SENTENCE = RECALL_FORMS["marker"], RECALL_FORMS["sentence"]
# Values of one token and of two.
UNEVEN = dataclasses.replace(MARKER, draw=lambda source: source.choice([*"ABCDEFGH", "AB", "CD"]))


def fillers(form, tokenizer, trials: int, length: int) -> np.ndarray:
    return np.stack([form.draw_filler(random.Random(trial), tokenizer, num_tokens=length) for trial in range(trials)])


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_marker_text_is_like_those_that_models_are_trained_on(depth: float) -> None:
    tokenizer = BytesTokenizer()
    texts = make_texts(MARKER, tokenizer, fillers(MARKER, tokenizer, 5, 60), length=60, depth=depth, seed=0)
    assert texts.tokens.shape == (5, 60)
    for row, answer in zip(texts.tokens, texts.answers, strict=True):
        text, value = tokenizer.decode(row), tokenizer.decode(answer)
        assert value in "ABCDEFGH"
        assert text.count(">") == text.count("?") == 1
        assert text.endswith("?")
        assert text[text.index(">") + 1] == value
        assert text.index(">") == texts.place
        # At least 3 letters before the mark and 2 behind the key, as in datasets/recall.
        assert texts.place >= 3
        assert len(text) - 1 - (texts.place + 2) >= 2
    assert texts.place == {0.0: 3, 0.3: 3 + round(0.3 * 51), 1.0: 60 - 1 - 3 - 2}[depth]


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), WorldTokenizer()])
def test_a_sentence_text_has_exactly_so_many_tokens(tokenizer) -> None:
    texts = make_texts(SENTENCE, tokenizer, fillers(SENTENCE, tokenizer, 6, 300), length=300, depth=0.5, seed=1)
    assert texts.tokens.shape == (6, 300)
    for row, answer, is_answer in zip(texts.tokens, texts.answers, texts.is_answer, strict=True):
        value = tokenizer.decode(answer[is_answer])
        assert f"The secret number is{value}. Remember it.\n" in tokenizer.decode(row)
        assert tokenizer.decode(row).endswith("\nWhat is the secret number? The secret number is")
        assert len(value) == 6
    with pytest.raises(InfctxError, match=r"--recall-tokens 20: a text of the form sentence needs at least"):
        make_texts(SENTENCE, tokenizer, fillers(SENTENCE, tokenizer, 1, 20), length=20, depth=0.5, seed=1)


def test_a_longer_filler_begins_with_a_shorter_one() -> None:
    tokenizer = BytesTokenizer()
    short = SENTENCE.draw_filler(random.Random(7), tokenizer, num_tokens=90)
    assert np.array_equal(SENTENCE.draw_filler(random.Random(7), tokenizer, num_tokens=200)[:90], short)


@pytest.fixture
def byte_model(make_finch: Callable[..., Finch]) -> Finch:
    return make_finch(vocab_size=257, dtype=torch.float64, n_layer=2)


@pytest.mark.parametrize(("form", "lengths"), [(UNEVEN, (16, 40)), (SENTENCE, (120, 110))])
def test_scores_are_those_of_whole_texts(byte_model: Finch, form, lengths: tuple[int, ...]) -> None:
    tokenizer, depths, trials = BytesTokenizer(), (0.0, 0.5, 1.0), 6 if form is UNEVEN else 2
    if form is UNEVEN:
        # So that some are right: the letters that may be keys are the likely ones.
        with torch.no_grad():
            byte_model.head.weight[66:74].mul_(3.0)
    found = measure_recall(
        byte_model, tokenizer, form, lengths=lengths, depths=depths, trials=trials, chunk_tokens=11, seed=5
    )
    filler = np.stack(
        [
            form.draw_filler(random.Random(f"5 filler {trial}"), tokenizer, num_tokens=max(lengths))
            for trial in range(trials)
        ]
    )
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            texts = make_texts(form, tokenizer, filler, length=length, depth=depth, seed=5)
            right, log_probabilities = [], []
            for tokens, answer, is_answer in zip(texts.tokens, texts.answers, texts.is_answer, strict=True):
                value = answer[is_answer]
                with torch.no_grad():
                    logits, _ = byte_model(torch.from_numpy(np.concatenate([tokens, value]))[None])
                at_value = logits[0, len(tokens) - 1 : -1]
                chosen = torch.log_softmax(at_value, -1)[range(len(value)), value.tolist()]
                log_probabilities.append(float(chosen.sum()))
                right.append(at_value.argmax(-1).tolist() == value.tolist())
            assert found.right[row][column] == pytest.approx(np.mean(right))
            assert found.log_probabilities[row][column] == pytest.approx(np.mean(log_probabilities), rel=1e-9)
    if form is UNEVEN:
        assert 0 < np.mean(found.right) < 1


def test_the_filler_is_read_once(byte_model: Finch) -> None:
    read = []
    handle = byte_model.embedding.register_forward_pre_hook(lambda module, given: read.append(given[0].shape[1]))
    measure_recall(byte_model, BytesTokenizer(), MARKER, lengths=(30, 60), depths=(0.5, 1.0), trials=2)
    handle.remove()
    # Key at 14 and 25 of 30, at 29 and 54 of 60; each text from its key on, with one pass for the question.
    places = {length: [3 + round(depth * (length - 9)) for depth in (0.5, 1.0)] for length in (30, 60)}
    expected = max(max(of_length) for of_length in places.values())
    expected += sum(length - place for length, of_length in places.items() for place in of_length)
    assert sum(read) == expected


def make_map() -> RecallMap:
    return RecallMap(
        form="marker",
        lengths=(64, 1024, 2**20),
        depths=(0.0, 1.0),
        trials=8,
        chance=0.125,
        right=((0.0, 0.5, 1.0), (1.0, 0.125, 0.0)),
        log_probabilities=((-2.0, -1.0, -0.1), (-0.1, -3.0, -9.0)),
    )


def test_the_map_is_readable_without_colour() -> None:
    lines = map_in_words(make_map())
    assert lines[-3].split() == ["key", "at", "64", "1k", "1M"]
    assert lines[-2].split() == ["0", "%", "·", "0", "▄", "50", "█", "100"]
    assert lines[-1].split() == ["100", "%", "█", "100", "▁", "12", "·", "0"]
    many = RecallMap(
        form="marker",
        lengths=tuple(range(100, 130)),
        depths=(0.5,),
        trials=8,
        chance=0.125,
        right=((0.5,) * 30,),
        log_probabilities=((-1.0,) * 30,),
    )
    assert max(map(len, map_in_words(many))) <= 80
    # 30 cells, and the depth in front of 3 rows.
    assert sum(line.count("50") for line in map_in_words(many)) == 33


def test_the_picture_has_every_cell() -> None:
    root = ElementTree.fromstring(draw_map(make_map(), title="Recall of <a> & b"))
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names.count("rect") == 6
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert "Recall of <a> & b" in texts
    assert sorted(text for text in texts if text.isdigit()) == ["0", "0", "100", "100", "12", "50", "64"]
    assert len(make_map().to_json()["cells"]) == 6
