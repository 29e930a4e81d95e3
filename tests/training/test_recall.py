"""Recall over chunks: learned where the gradient crosses them and not where it is cut, and the documents it needs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from infctx.data.load import load_documents
from infctx.data.tokenizer import BytesTokenizer
from infctx.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent


def load_task() -> ModuleType:
    specification = importlib.util.spec_from_file_location("recall_task", ROOT / "benchmarks" / "recall_task.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up by name.
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


recall = load_task()


@pytest.mark.usefixtures("_as_users_run_it")
def test_only_the_gradient_over_the_document_learns_recall(tmp_path: Path) -> None:
    """Same weights, documents, order and steps; the key is two chunks before the question, chance is 1/8."""
    scores = {
        window: recall.train_and_measure(
            tmp_path / str(window), recall.QUICK, window=window, lr=recall.QUICK_RATE, seed=0, distances=(2, 4)
        )["accuracy"]
        for window in (1, "document")
    }
    # Measured with seeds 0 to 3: 1.00, learned within a few steps somewhere between step 59 and step 72 of 90.
    assert scores["document"]["2"] > 0.9
    # Longer than any document in training.
    assert scores["document"]["4"] > 0.9
    # 200 documents at chance: 0.125, standard deviation 0.023.
    assert scores[1]["2"] < 0.22
    assert scores[1]["4"] < 0.22


@pytest.mark.parametrize("chunk_tokens", [8, 12])
@pytest.mark.parametrize("borders", [0, 1, 5])
def test_documents_are_as_declared(borders: int, chunk_tokens: int) -> None:
    documents = recall.make_documents(300, borders=[borders], seed=1, chunk_tokens=chunk_tokens)
    for document in documents:
        prompt, key_place = document.prompt, document.key_place
        assert prompt.count(recall.MARKER) == prompt.count(recall.QUESTION) == 1
        assert prompt[key_place - 1 : key_place + 1] == recall.MARKER + document.answer
        assert document.question_place == len(prompt) - 1 == prompt.index(recall.QUESTION)
        assert key_place < chunk_tokens
        assert document.question_place // chunk_tokens - key_place // chunk_tokens == borders
        assert document.distance_tokens == document.question_place - key_place >= 3
        assert set(prompt) <= set(recall.KEYS + recall.OTHERS + recall.MARKER + recall.QUESTION)
    places = Counter(document.key_place for document in documents)
    assert len(places) >= 2, "a key at a fixed place could be found without its marker"


def test_the_marker_is_needed() -> None:
    """Answers that look at the letters alone are mostly wrong; all answers are equally frequent."""
    documents = recall.make_documents(4000, borders=[3, 4, 5], seed=2)
    keys_seen = [[letter for letter in document.prompt if letter in recall.KEYS] for document in documents]
    rules = {
        "first": [keys[0] for keys in keys_seen],
        "last": [keys[-1] for keys in keys_seen],
        "most frequent": [Counter(keys).most_common(1)[0][0] for keys in keys_seen],
        "always at its most frequent place": [document.prompt[4] for document in documents],
    }
    answers = [document.answer for document in documents]
    for rule, guesses in rules.items():
        share = sum(guess == answer for guess, answer in zip(guesses, answers, strict=True)) / len(answers)
        assert share < 0.45, f"{rule}: {share:.2f}"
    assert all(share / len(answers) == pytest.approx(recall.CHANCE, abs=0.02) for share in Counter(answers).values())


def test_documents_follow_from_the_seed() -> None:
    borders = (0, 1, 2)
    documents = recall.make_documents(500, borders=borders, seed=3)
    assert recall.make_documents(500, borders=borders, seed=3) == documents
    others = recall.make_documents(500, borders=borders, seed=4)
    assert {document.prompt for document in others}.isdisjoint(document.prompt for document in documents)


def test_accuracy_counts_answers_at_the_question() -> None:
    """A stand-in that knows the answers of every second document."""
    documents = recall.make_documents(10, borders=(0, 1, 4), seed=5)
    ids = {document.prompt: int(BytesTokenizer().encode(document.answer)[0]) for document in documents[::2]}

    def model(tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = torch.zeros(*tokens.shape, 257)
        for row, text in enumerate(tokens.tolist()):
            prompt = bytes(token - 1 for token in text if token).decode()
            if prompt in ids:
                logits[row, len(prompt) - 1, ids[prompt]] = 1.0
        return logits, None

    assert recall.accuracy(model, documents, rows=4) == 0.5


def test_the_dataset_and_the_recipe_are_those_of_the_task(tmp_path: Path) -> None:
    recall.write_dataset(tmp_path)
    folder = ROOT / "datasets" / "recall"
    assert (folder / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
    recipe = load_recipe(ROOT / "recipes" / "recall.yaml")
    assert recipe.bptt.chunk_tokens == recall.CHUNK_TOKENS
    # With bptt.window=1 as well each row is one document: only the gradient differs.
    assert recipe.data.mode == "document"
    documents = load_documents(
        [str(folder / "train.jsonl")], tokenizer=BytesTokenizer(), template="completion"
    ).documents
    answers = [json.loads(line)["completion"] for line in (folder / "train.jsonl").read_text().splitlines()]
    for document, answer in zip(documents, answers, strict=True):
        # Trained: the answer, which is predicted at the question, and the end of text after it.
        assert document.weights.nonzero()[0].tolist() == [len(document) - 2, len(document) - 1]
        assert int(document.tokens[-2]) == ord(answer) + 1
