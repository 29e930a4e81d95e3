"""A run on a quantised base: trained, stopped, continued to the same bits, exported onto either base."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import infctx

LORA = {"kind": "lora", "rank": 2, "targets": ["receptance", "key", "value", "gate", "output", "head"]}


def tensors_of(folder: Path) -> dict[str, bytes]:
    step = (folder / "checkpoints" / "latest").read_text().strip()
    found = {path.name: path.read_bytes() for path in (folder / "checkpoints" / step).glob("*.safetensors")}
    return found | {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_trained_stopped_continued_exported(
    forks: Any, cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        model={"quantize": "int8"},
        adapter=LORA,
        optimizer={"lr": 0.05},
        bptt={"chunk_tokens": 8, "window": "document"},
        run={"steps": 24, "checkpoint_every": 3},
    )
    whole = forks.start("train", recipe, f"run.folder={tmp_path / 'whole'}", "--json")
    floats = forks.start("train", recipe, f"run.folder={tmp_path / 'floats'}", "model.quantize=none", "run.steps=1")
    stopped = forks.start("train", recipe)
    folder = tmp_path / "run"
    stopped.wait_for((folder / "checkpoints" / "latest").exists)
    stopped.signal(signal.SIGTERM)
    stopped.wait().refused("SIGTERM", code=3)
    cli("train", recipe, "model.quantize=none").refused("model.quantize")
    assert "stored     int8 in the matrices of the blocks" in (folder / "run.log").read_text()
    assert cli("train", recipe, "--json").ok().json["steps"] == 24
    whole.wait().ok()
    assert tensors_of(folder) == tensors_of(tmp_path / "whole")
    steps = metrics_of(folder)
    floats.wait().ok()
    # It is the quantised base that is trained on: a fresh adapter adds nothing to it yet.
    assert 0 < abs(steps[0]["loss"] / metrics_of(tmp_path / "floats")[0]["loss"] - 1) < 1e-2
    assert {step["recompute_difference"] for step in steps} == {0.0}
    assert steps[-1]["loss"] < steps[0]["loss"]

    exported, answers = {}, {}
    for onto in (None, "trained", "original"):
        path = tmp_path / f"{onto}.pth"
        options = [] if onto is None else ["--onto", onto]
        command = ["export", folder, "--output", path, "--dtype", "fp32", *options]
        answers[onto] = cli(*command, "--json").ok().json
        exported[onto] = infctx.load_model(path)
        assert answers[onto]["onto"] == onto or onto is None
        assert answers[onto]["max_logit_difference"] < 1e-5
    said = cli("export", folder, "--output", tmp_path / "again.pth").ok().err
    assert "Merged onto the int8 base it was trained on. The two merges differ by" in said
    tokens = torch.randint(1, 257, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {onto: model(tokens)[0] for onto, model in exported.items()}
        assert torch.equal(logits[None], logits["trained"])
        difference = float((logits["trained"] - logits["original"]).abs().max())
    for answer in answers.values():
        assert answer["merge_logit_difference"] == pytest.approx(difference, rel=1e-6)
    assert 0.002 < answers["original"]["merge_weight_difference"] < 0.01
    # The original merge is that of the adapter's folder on the file.
    import peft

    by_peft = peft.PeftModel.from_pretrained(infctx.load_model(models["pth"]), str(folder / "adapter"))
    torch.testing.assert_close(by_peft(tokens)[0], logits["original"], rtol=0, atol=1e-5)


def test_what_cannot_be_quantised_is_refused(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path]
) -> None:
    cli("check", make_recipe(model={"quantize": "int8"})).refused("model.quantize", "adapter.kind full", "lora")
    cli("check", make_recipe(model={"quantize": "int4"}, adapter=LORA)).refused("model.quantize", "got 'int4'")
    train_also = LORA | {"train_also": ["*.key.weight"]}
    cli("check", make_recipe(model={"quantize": "int8"}, adapter=train_also)).refused("stored quantised")
    output = ["--output", models["pth"].with_name("x.pth"), "--onto"]
    cli("export", models["pth"], *output, "original").refused("--onto original", "not trained on a quantised base")
    cli("export", models["pth"], *output, "base").refused("--onto base: expected trained or original")
