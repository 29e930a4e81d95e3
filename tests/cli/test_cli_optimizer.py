"""Every option of the optimizer section at once, from the command line to an exported model; and its mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import infctx

OPTIONS: dict[str, Any] = {
    "name": "adamw-8bit",
    "lr": 0.003,
    "warmup_steps": 1,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "lr_final": 0.001,
    "weight_decay": 0.01,
    "lr_multipliers": {"*.time_mix.*": 2.0, "head*": 0.5},
    "l2_wrap": 0.001,
    "z_loss": 0.001,
    "min_token_loss": 1.0,
    "token_dropout": 0.2,
    "embedding_noise": 5,
    "ema_decay": 0.6,
}


def test_every_option_together(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(optimizer=OPTIONS, run={"steps": 6}, data={"validation": 0.2})
    cli("check", recipe, "--json").ok()
    result = cli("train", recipe, "--json").ok().json
    assert result["steps"] == 6
    assert result["val_loss"] is not None
    folder = tmp_path / "run"
    rates = [line["lr"] for line in metrics_of(folder) if line["lr"] is not None]
    assert rates == pytest.approx([0.00003, 0.003, 0.003, 0.003 - 0.002 / 3, 0.003 - 0.004 / 3, 0.001])
    # Again = nothing to do; another value is another recipe.
    assert "finished" in cli("train", recipe).ok().err
    cli("train", recipe, "optimizer.ema_decay=0.7").refused("optimizer.ema_decay")

    checkpoint = folder / "checkpoints" / "step-000006"
    for flags, name in (((), "averaged"), (("--last-weights",), "trainable")):
        output = tmp_path / f"{name}.safetensors"
        arguments = ["export", folder, "--format", "safetensors", "--output", output, "--dtype", "fp32", *flags]
        exported = cli(*arguments, "--json").ok()
        assert exported.json["averaged_weights"] is (name == "averaged")
        assert ("average" in exported.err) is (name == "averaged")
        weights = load_file(checkpoint / f"{name}.safetensors")
        found = dict(infctx.load_model(output).named_parameters())
        assert all(torch.equal(found[key], tensor) for key, tensor in weights.items())
    assert "average" in cli("generate", folder, "--prompt", "a", "--max-tokens", 2).ok().err


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lr_multipliers": {"*.decay_bas": 2.0}}, ("optimizer.lr_multipliers", "*.decay_bas", "decay_base")),
        ({"state_lr": 1.0}, ("optimizer.state_lr", "no initial state is trained")),
        ({"decay_fraction": 0.1}, ("optimizer.decay_fraction", "schedule constant", "optimizer.schedule: wsd")),
        ({"name": "adam"}, ("optimizer.name", "adamw-8bit")),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_made(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    recipe = make_recipe(optimizer=keys)
    for command in ("check", "train"):
        cli(command, recipe).refused(*words)
    assert not (tmp_path / "run").exists()


def test_the_page_of_keys(cli: Any) -> None:
    page = cli("recipe-schema", "--markdown").ok()
    assert page.out.startswith("# The keys of a recipe")
    assert "| `ema_decay` |" in page.out
    cli("recipe-schema", "--markdown", "--json").refused("--markdown")
