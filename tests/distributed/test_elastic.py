"""A run that is stopped on so many ranks goes on with another number, with the same steps and the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import infctx
from infctx.model.finch import Finch
from infctx.trained import open_trained
from tests.distributed.processes import run_ranks

WORKER = str(Path(__file__).with_name("run_worker.py"))
# How a run is spread over so many ranks; a step has 4 rows in all.
SPREAD = {
    1: ["run.devices=1", "run.rows=4"],
    2: ["run.devices=2", "run.rows=2", "run.strategy=fsdp"],
    4: ["run.devices=4", "run.rows=2", "run.strategy=ddp", "run.time_parallel=2"],
}
# Some modes spread their weights otherwise.
STRATEGIES = {
    ("document", 2): ["run.strategy=deepspeed_3"],
    ("document", 4): ["run.strategy=deepspeed_1"],
    ("adapter", 2): ["run.strategy=ddp"],
    ("adapter", 4): ["run.strategy=fsdp"],
}
MODES = {
    "document": ["bptt.window=document"],
    "stream": ["bptt.window=2"],
    "adapter": ["bptt.window=2", "adapter.kind=lora", "adapter.rank=3", "optimizer.ema_decay=0.7"],
}
# Ranks before and after: all pairs of the first mode, and of the others as many as have each number on each side.
PAIRS = {
    "document": [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)],
    "stream": [(1, 4), (2, 1), (4, 2)],
    "adapter": [(1, 2), (2, 4), (4, 1)],
}


@pytest.fixture
def recipe(make_finch: Callable[..., Finch], tmp_path: Path) -> Path:
    model = make_finch("6", n_layer=2, n_embd=32, vocab_size=257)
    infctx.save_model(model, tmp_path / "model.safetensors", format="safetensors", dtype=torch.float32)
    rows = [
        json.dumps({"text": "".join(chr(97 + (i * i + 3 * j) % 26) for j in range(5 + 13 * i % 90))}) for i in range(40)
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
model: {{path: {tmp_path}/model.safetensors}}
data: {{path: {tmp_path}/documents.jsonl, template: text, tokenizer: bytes, validation: 0.2}}
bptt: {{chunk_tokens: 16}}
optimizer: {{lr: 0.003, warmup_steps: 2, eps: 1.0e-4}}
run: {{folder: {tmp_path}/run, steps: 6, validate_every: 3, precision: fp32, report: false}}
"""
    )
    return file


def spread(recipe: Path, runs: list[dict], *, ranks: int, seconds: float = 250.0) -> list[list[dict]]:
    """What each run came to on each rank."""
    report = recipe.parent / f"report-{ranks}-{len(list(recipe.parent.glob('report*')))}"
    run_ranks([WORKER, json.dumps(runs), str(report)], ranks=ranks, seconds=seconds)
    of_ranks = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(ranks)]
    return [list(of_run) for of_run in zip(*of_ranks, strict=True)]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, group: str = "trainable") -> dict[str, torch.Tensor]:
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    tensors: dict[str, torch.Tensor] = {}
    for file in newest.glob(f"{group}*.safetensors"):
        tensors |= load_file(file)
    return tensors


def overrides(mode: str, ranks: int, folder: str) -> list[str]:
    return [*MODES[mode], *SPREAD[ranks], *STRATEGIES.get((mode, ranks), []), folder]


@pytest.mark.timeout(900)
def test_ranks_come_and_go(recipe: Path, tmp_path: Path) -> None:
    begun = {ranks: [] for ranks in SPREAD}
    continued = {ranks: [] for ranks in SPREAD}
    for mode, pairs in PAIRS.items():
        for before, after in pairs:
            folder = f"run.folder={tmp_path}/{mode}-{before}-{after}"
            stop = {"rank": before - 1, "step": 3, "do": "SIGTERM"}
            begun[before].append({"recipe": str(recipe), "overrides": overrides(mode, before, folder), "at": stop})
            continued[after].append({"recipe": str(recipe), "overrides": overrides(mode, after, folder)})
    for mode in MODES:
        folder = f"run.folder={tmp_path}/{mode}-straight"
        continued[1].append({"recipe": str(recipe), "overrides": overrides(mode, 1, folder)})
    for ranks, runs in begun.items():
        for of_ranks in spread(recipe, runs, ranks=ranks):
            assert [told.get("stopped") for told in of_ranks] == ["SIGTERM"] * ranks, of_ranks
            assert [told["is_told"] for told in of_ranks] == [rank > 0 for rank in range(ranks)]
    for ranks, runs in continued.items():
        for of_ranks in spread(recipe, runs, ranks=ranks):
            assert [told.get("steps") for told in of_ranks] == [6] * ranks, of_ranks
    for mode, pairs in PAIRS.items():
        straight = tmp_path / f"{mode}-straight"
        expected, expected_weights = lines(straight), weights(straight)
        tokens = torch.arange(97, 123)[None]
        expected_logits, _ = open_trained(straight).model(tokens)
        for before, after in pairs:
            folder = tmp_path / f"{mode}-{before}-{after}"
            found = lines(folder)
            assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
            for line, other in zip(found, expected, strict=True):
                for key in ("loss", "val_loss", "grad_norm"):
                    assert (line.get(key) is None) == (other.get(key) is None)
                    if other.get(key) is None:
                        continue
                    assert line.get(key) == pytest.approx(other.get(key), rel=1e-6), (folder.name, key, line["step"])
            for group in ["trainable"] + ["averaged"] * (mode == "adapter"):
                assert weights(folder, group).keys() == weights(straight, group).keys()
            for name, tensor in weights(folder).items():
                difference = float((tensor - expected_weights[name]).norm() / expected_weights[name].norm())
                assert difference < 1e-6, (folder.name, name, difference)
            # What is exported, by this process alone.
            logits, _ = open_trained(folder).model(tokens)
            torch.testing.assert_close(logits, expected_logits, rtol=0.0, atol=1e-5)
            if mode == "adapter":
                found_adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
                for name, tensor in load_file(straight / "adapter" / "adapter_model.safetensors").items():
                    torch.testing.assert_close(found_adapter[name], tensor, rtol=1e-4, atol=1e-6)
