"""How a recipe is spread over processes, and how a run that goes on keeps the rows of its steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from infctx.errors import RecipeError
from infctx.model.init import new_config
from infctx.recipe.load import write_recipe
from infctx.recipe.schema import Recipe
from infctx.run_folder import as_begun, as_kept
from infctx.spread import check_alone, check_model_spread, check_spread, data_ranks, is_spread, num_processes


def make(folder: Path = Path("runs/x"), **run: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "m.pth"},
            "data": {"path": "docs.jsonl"},
            "optimizer": {"lr": 1e-4},
            "run": {"folder": str(folder), "steps": 10, **run},
        }
    )


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a machine have so many GPUs."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_processes(gpus: Any) -> None:
    gpus(0)
    assert not is_spread(make())
    assert is_spread(make(devices=2))
    assert is_spread(make(num_nodes=2))
    assert is_spread(make(strategy="fsdp"))
    assert data_ranks(make(devices=4, num_nodes=2, time_parallel=4)) == 2
    gpus(8)
    assert num_processes(make()) == 8
    assert is_spread(make())
    assert num_processes(make(strategy="single")) == 1
    assert not is_spread(make(strategy="single"))


def test_what_is_not_there_is_refused(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    check_spread(make(devices=2, strategy="deepspeed_2"))
    with pytest.raises(RecipeError, match="at most the 2 GPUs"):
        check_spread(make(devices=4))
    with pytest.raises(RecipeError, match=r"divisor of the 2 processes .*\(1, 2\), got 3"):
        check_spread(make(time_parallel=3))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"deepspeed_2 needs the package deepspeed.*infctx\[deepspeed\]"):
        check_spread(make(devices=2, strategy="deepspeed_2"))
    check_spread(make(devices=2, strategy="fsdp"))


def test_attention_over_ranks_that_share_a_chunk_is_refused() -> None:
    sizes = {"n_layer": 6, "n_embd": 64, "vocab_size": 10}
    check_model_spread(make(time_parallel=2), new_config(version="6c2", **sizes))
    check_model_spread(make(), new_config(version="goldfinch", **sizes))
    with pytest.raises(
        RecipeError, match=r"time_parallel: expected 1, got 2: the layers behind the first 4 of this GoldFinch"
    ):
        check_model_spread(make(time_parallel=2), new_config(version="goldfinch", **sizes))


def test_processes_that_nobody_asked_for_are_refused() -> None:
    check_alone({})
    check_alone({"WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    check_alone({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"})
    with pytest.raises(RecipeError, match="torchrun has started 2 processes"):
        check_alone({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"})


def test_a_run_keeps_the_rows_of_its_steps(tmp_path: Path, gpus: Any) -> None:
    gpus(0)
    write_recipe(make(tmp_path, devices=4, rows=2, accumulate=1), tmp_path / "recipe.yaml")

    def go_on(**run: Any) -> tuple[int, int]:
        recipe = as_begun(tmp_path, make(tmp_path, **run).resolved())
        return recipe.run.rows, recipe.run.accumulate

    assert go_on(devices=4, rows=2) == (2, 1)
    assert go_on(devices=2, rows=2) == (2, 2)
    assert go_on(devices=1, rows=8) == (8, 1)
    assert go_on(devices=1, rows=2) == (2, 4)
    assert go_on(devices=8, rows=2, time_parallel=2, strategy="fsdp") == (2, 1)
    assert go_on(devices=2, rows=2, accumulate=2) == (2, 2)
    # However often it goes on.
    one = as_begun(tmp_path, make(tmp_path, devices=1, rows=2).resolved())
    write_recipe(as_kept(tmp_path, one), tmp_path / "recipe.yaml")
    assert go_on(devices=1, rows=2) == (2, 4)
    assert go_on(devices=4, rows=2) == (2, 1)
    for run in ({"devices": 3, "rows": 2}, {"devices": 4, "rows": 2, "accumulate": 2}, {"devices": 8, "rows": 2}):
        with pytest.raises(RecipeError, match=r"A run keeps the rows of its steps"):
            go_on(**run)
    with pytest.raises(RecipeError, match=r"run\.seed"):
        go_on(devices=4, rows=2, seed=5)
