"""Small runs, and a way to stop them anywhere."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.recipe.load import load_recipe
from infctx.recipe.schema import Recipe
from infctx.training.signals import StopSignals


@pytest.fixture
def recipe(tmp_path: Path, make_finch: Callable[..., Finch]) -> Callable[..., Recipe]:
    """Builds recipes over one small model and a few documents, each in a run folder of its own."""
    model = make_finch("6", n_layer=2, n_embd=16, vocab_size=257, dim_ffn=24)
    save_model(model, tmp_path / "base.safetensors", format="safetensors", dtype=torch.float32, tokenizer="bytes")
    rows = [{"text": "The quick brown fox jumps over the lazy dog. " * n} for n in (1, 3, 2, 5, 1)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(folder: str, *overrides: str) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"""
model: {{path: '{tmp_path}/base.safetensors'}}
data: {{path: '{tmp_path}/docs.jsonl', validation: 0.2}}
bptt: {{chunk_tokens: 16, window: 3}}
optimizer: {{lr: 0.01, warmup_steps: 2, schedule: cosine}}
run: {{folder: '{tmp_path / folder}', steps: 5, rows: 2, checkpoint_every: 2, validate_every: 2}}
"""
        )
        return load_recipe(file, overrides)

    return build


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Lets a run be stopped at its n-th chunk, of training or validation, as a signal there would."""
    left: list[int | None] = [None]

    def count(self: StopSignals) -> int:
        if left[0] is None:
            return 0
        if left[0] == 0:
            return signal.SIGTERM.value
        left[0] -= 1
        return 0

    monkeypatch.setattr(StopSignals, "number", property(count))

    def set_stop(chunks: int | None) -> None:
        left[0] = chunks

    return set_stop
