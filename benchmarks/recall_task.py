"""The task of benchmarks/recall.py: its documents, and one model trained on them and measured.

A document hides one key among letters of the same kind; only the marker in front tells it apart. Chunks later it is
asked for, and only the answer is trained:

    kDax>Cbq … fHsBt?        answer: C        (> marks the key, ? asks for it)

The letters are random, so there is nothing to learn in them; trained too, they would only add noise to the gradient.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infctx.assemble import run_recipe
from infctx.data.tokenizer import BytesTokenizer
from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.recipe.schema import Recipe
from infctx.trained import open_trained
from infctx.training.progress import SilentProgress

KEYS = "ABCDEFGH"
OTHERS = "abcdefghijklmnopqrstuvwx"
MARKER, QUESTION = ">", "?"
CHANCE = 1 / len(KEYS)
MODEL_SIZES = {"n_layer": 2, "n_embd": 64, "head_size": 64, "dim_ffn": 128, "lerp_rank": 8, "decay_rank": 16}
CHUNK_TOKENS = 12
# Chunk borders between key and question, of the documents that accuracy is measured on.
DISTANCES = (0, 1, 2, 3, 4, 5, 8, 16, 32)
TEST_DOCUMENTS = 200
# Seeds of documents that nothing is trained on; those of training are the runs' own.
TEST_SEED, VALIDATION_SEED = 1_000_000, 2_000_000

Window = int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallDocument:
    """A prompt and its answer, one token a character.

    key_place, question_place: tokens before each in the prompt, whose last is the question. The answer is predicted at
    the question.
    """

    prompt: str
    answer: str
    key_place: int
    question_place: int

    @property
    def distance_tokens(self) -> int:
        """Tokens from the key to the question."""
        return self.question_place - self.key_place


def make_document(source: random.Random, borders: int, *, chunk_tokens: int = CHUNK_TOKENS) -> RecallDocument:
    """Draw a document whose key is in the first chunk and whose question is so many chunk borders later.

    Letters before the key, and at least two between key and question, are drawn from keys and others alike.
    """
    assert chunk_tokens >= 8, f"chunk_tokens={chunk_tokens}: key and question would not fit into one chunk"
    marker_place = source.randrange(chunk_tokens // 4, min(chunk_tokens // 2 + 1, chunk_tokens - 4))
    key_place = marker_place + 1
    earliest = key_place + 3 if borders == 0 else borders * chunk_tokens
    question_place = source.randrange(earliest, (borders + 1) * chunk_tokens)
    answer = source.choice(KEYS)

    def letters(count: int) -> str:
        return "".join(source.choices(KEYS + OTHERS, k=count))

    between = letters(question_place - key_place - 1)
    prompt = letters(marker_place) + MARKER + answer + between + QUESTION
    return RecallDocument(prompt=prompt, answer=answer, key_place=key_place, question_place=question_place)


def make_documents(
    count: int, *, borders: Sequence[int], seed: int, chunk_tokens: int = CHUNK_TOKENS
) -> list[RecallDocument]:
    """Draw documents; the same arguments give the same ones."""
    source = random.Random(seed)
    return [make_document(source, source.choice(borders), chunk_tokens=chunk_tokens) for _ in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is trained on. borders: chunk borders between key and question, each document's drawn from these."""

    borders: tuple[int, ...]
    windows: tuple[Window, ...] = (1, 3, "document")
    chunk_tokens: int = CHUNK_TOKENS
    rows: int = 16
    steps: int = 300

    def documents(self, count: int, *, seed: int) -> list[RecallDocument]:
        """Draw documents of this setting."""
        return make_documents(count, borders=self.borders, seed=seed, chunk_tokens=self.chunk_tokens)


SETTINGS = {
    "far": Setting(borders=(3, 4, 5)),
    # Beyond a chunk, inside a window of 3 chunks.
    "near": Setting(borders=(1, 2)),
    "mixed": Setting(borders=(0, 1, 2, 3, 4, 5)),
}
QUICK = Setting(borders=(2,), windows=(1, "document"), chunk_tokens=8, rows=32, steps=90)
QUICK_RATE = 4e-3


def write_rows(documents: Iterable[RecallDocument], path: Path) -> None:
    """Write documents as rows for `data.template: completion`."""
    rows = ({"prompt": document.prompt, "completion": document.answer} for document in documents)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_fresh_model(path: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Write what `infctx model new` would, with the sizes of MODEL_SIZES."""
    model = Finch(new_config(version="6", vocab_size=BytesTokenizer.vocab_size, **MODEL_SIZES))
    initialise_(model, seed=seed)
    save_model(model, path, format="safetensors", dtype=dtype, tokenizer="bytes")


@torch.no_grad()
def accuracy(model: Finch, documents: Sequence[RecallDocument], *, rows: int = 100) -> float:
    """Share of documents whose answer is the most probable of all tokens at the question."""
    num_right = 0
    encode = BytesTokenizer().encode
    for first in range(0, len(documents), rows):
        part = documents[first : first + rows]
        tokens = torch.zeros(len(part), max(document.question_place for document in part) + 1, dtype=torch.int64)
        for row, document in zip(tokens, part, strict=True):
            row[: len(document.prompt)] = torch.from_numpy(encode(document.prompt))
        logits, _ = model(tokens)
        at_question = logits[range(len(part)), [document.question_place for document in part]]
        answers = torch.tensor([int(encode(document.answer)[0]) for document in part])
        num_right += int((at_question.argmax(-1) == answers).sum())
    return num_right / len(documents)


def write_dataset(folder: Path) -> None:
    """Write the data and the fresh model of recipes/recall.yaml: 4,000 documents of the setting "far"."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(make_documents(4000, borders=SETTINGS["far"].borders, seed=0), folder / "train.jsonl")
    write_fresh_model(folder / "model.safetensors", seed=0, dtype=torch.bfloat16)


def prepare_run(folder: Path, setting: Setting, *, window: Window, lr: float, seed: int) -> Recipe:
    """Write data and a fresh model of this seed into the folder, and a recipe that trains them in folder/run."""
    folder.mkdir(parents=True, exist_ok=True)
    # One epoch: no document is seen twice.
    write_rows(setting.documents(setting.rows * setting.steps, seed=seed), folder / "train.jsonl")
    write_rows(setting.documents(TEST_DOCUMENTS, seed=VALIDATION_SEED), folder / "validation.jsonl")
    write_fresh_model(folder / "fresh.safetensors", seed=seed)
    return Recipe.model_validate(
        {
            "model": {"path": str(folder / "fresh.safetensors")},
            "data": {
                "path": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "template": "completion",
                # For every window: each row is one whole document from a fresh state.
                "mode": "document",
            },
            "bptt": {"chunk_tokens": setting.chunk_tokens, "window": window},
            "optimizer": {"lr": lr},
            "run": {"folder": str(folder / "run"), "epochs": 1, "rows": setting.rows, "seed": seed, "devices": 1},
        }
    )


def train_and_measure(
    folder: Path, setting: Setting, *, window: Window, lr: float, seed: int, distances: Sequence[int] = DISTANCES
) -> dict[str, Any]:
    """Train one model and measure it at every distance; where the folder holds the outcome already, read it."""
    done = folder / "outcome.json"
    if done.is_file():
        outcome: dict[str, Any] = json.loads(done.read_text())
        return outcome
    began = time.perf_counter()
    result = run_recipe(prepare_run(folder, setting, window=window, lr=lr, seed=seed), SilentProgress())
    seconds = time.perf_counter() - began
    model = open_trained(folder / "run").model
    outcome = {
        "window": window,
        "lr": lr,
        "seed": seed,
        "steps": result["steps"],
        "tokens": result["tokens"],
        "seconds": round(seconds, 1),
        "validation_loss": round(result["val_loss"], 4),
        "accuracy": {str(borders): accuracy(model, documents) for borders, documents in test_sets(setting, distances)},
    }
    done.write_text(json.dumps(outcome) + "\n")
    return outcome


def test_sets(setting: Setting, distances: Sequence[int]) -> list[tuple[int, list[RecallDocument]]]:
    """The documents of each distance, the same for every run."""
    return [
        (
            borders,
            make_documents(
                TEST_DOCUMENTS, borders=[borders], seed=TEST_SEED + borders, chunk_tokens=setting.chunk_tokens
            ),
        )
        for borders in distances
    ]
