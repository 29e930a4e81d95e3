"""benchmarks/recall_hybrid.py: its documents say what they should, its models are of one size, its dataset is there."""

from __future__ import annotations

import importlib
import types
from collections import Counter
from pathlib import Path

import pytest

from infctx.checkpoint.model_file import open_model
from infctx.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hybrid(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("recall_hybrid")


def test_a_document_asks_for_one_of_its_pairs(hybrid: types.ModuleType) -> None:
    documents = hybrid.make_pairs(2000, pairs=(4, 32), seed=1)
    for document in documents:
        pairs, asked = document.prompt.split("?")
        names, values = pairs[::2], pairs[1::2]
        assert len(names) == len(set(names)) in (4, 32)
        assert set(names) <= set(hybrid.NAMES)
        assert set(values) <= set(hybrid.VALUES)
        assert dict(zip(names, values, strict=True))[asked] == document.answer
        assert pairs[document.key_place] == document.answer
        assert document.question_place == len(document.prompt) - 1
    answers = Counter(document.answer for document in documents)
    assert all(count / len(documents) == pytest.approx(1 / 8, abs=0.03) for count in answers.values())
    places = [document.key_place / (len(document.prompt) - 2) for document in documents]
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.05)
    assert hybrid.make_pairs(5, pairs=(4,), seed=2) == hybrid.make_pairs(5, pairs=(4,), seed=2)
    assert not set(hybrid.NAMES) & set(hybrid.VALUES)


def test_the_models_have_as_many_parameters(hybrid: types.ModuleType) -> None:
    counts = [sum(p.numel() for p in hybrid.fresh_model(name, seed=0).parameters()) for name in hybrid.MODELS]
    assert max(counts) / min(counts) < 1.001


def test_the_dataset_is_what_the_benchmark_writes(hybrid: types.ModuleType, tmp_path: Path) -> None:
    hybrid.write_dataset(tmp_path)
    folder = ROOT / "datasets" / "recall_pairs"
    assert (folder / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
    for name, sizes in hybrid.MODELS.items():
        recipe = load_recipe(ROOT / "recipes" / f"recall_pairs_{name}.yaml")
        assert recipe.bptt.chunk_tokens == hybrid.TASKS["pairs"].chunk_tokens
        assert recipe.model.path == f"datasets/recall_pairs/{name}.safetensors"
        assert open_model(folder / f"{name}.safetensors").config.version == sizes["version"]
