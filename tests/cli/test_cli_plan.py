"""infctx plan: what it reads, what it says, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import infctx


def test_plan_of_a_file_by_its_sizes(cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path]) -> None:
    recipe = make_recipe(bptt={"chunk_tokens": 8, "window": "document"}, run={"precision": "fp32"})
    found = cli("plan", recipe, "--json").ok().json
    model = infctx.load_model(models["pth"])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert found["parameters"] == weights // 4
    assert found["parts"]["trained weights"] == weights
    assert found["parts"]["optimizer moments"] == 2 * weights
    assert found["device_bytes"] == sum(found["parts"].values())
    assert (found["fits"], found["advice"]) == (None, None)
    assert [time["document_tokens"] for time in found["times"]] == [65_536, 1_048_576, 10_485_760]


def test_what_does_not_fit_ends_well_and_says_what_to_change(cli: Any, make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe()
    arguments = ("plan", recipe, "--shape", "7b", "--device-memory", "24GB")
    found = cli(*arguments, "--json").ok().json
    assert found["fits"] is False
    assert found["largest_part"] == "optimizer moments"
    assert "adapter.kind: lora" in found["advice"]
    words = cli(*arguments).ok().out
    assert "Finch 7B, 7,635,746,816 parameters" in words
    assert "does NOT fit a device of 24.00 GB" in words
    assert "not measured on a GPU" in words
    spread = cli(*arguments[:-1], "80GiB", "run.strategy=fsdp", "--ranks", "16", "--json").ok().json
    assert (spread["ranks"], spread["fits"], spread["advice"]) == (16, True, None)


def test_mistakes_are_named(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(model={"path": str(tmp_path / "missing.pth")})
    cli("plan", recipe).refused("model.path", "missing.pth", "--shape", "14b")
    cli("plan", recipe, "--shape", "8b").refused("--shape 8b", "1.6b")
    cli("plan", recipe, "--shape", "7b", "--device-memory", "big").refused("--device-memory big", "24GB")
    cli("plan", recipe, "--shape", "7b", "--ranks", "3", "run.time_parallel=2", "run.devices=2").refused("--ranks 3")
    cli("plan", recipe, "--shape", "7b", "run.strategy=single", "--ranks", "2").refused("run.strategy: single")
