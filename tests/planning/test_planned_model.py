"""The model on the meta device is the model of the run: shapes, dtypes, what is trained, how it is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infctx.adapters.quantized_base import quantize_
from infctx.errors import RecipeError
from infctx.model.finch import Finch
from infctx.planning.planned_model import planned_model, released_shape, released_shapes
from infctx.planning.spread import Spread, spread_of
from infctx.recipe.schema import Recipe
from infctx.run_adapter import attach_adapter
from infctx.surgery.info import RELEASED
from infctx.training.precision import apply_precision_


def recipe_with(**sections: dict[str, Any]) -> Recipe:
    run = {"folder": "runs/x", "steps": 1} | sections.pop("run", {})
    model = {"path": "x.pth"} | sections.pop("model", {})
    whole = {"model": model, "data": {"path": "x.txt"}, "optimizer": {"lr": 1e-4}, "run": run, **sections}
    return Recipe.model_validate(whole).resolved()


ADAPTERS = {
    "full": {"kind": "full", "freeze": ["embedding.weight"]},
    "lora": {"kind": "lora", "rank": 4, "ranks": {"gate": 2}, "train_also": ["*.lerp_*"], "initial_state": True},
    "dora": {"kind": "dora", "rank": 4},
    "pissa": {"kind": "pissa", "rank": 4},
    "miss": {"kind": "miss", "rank": 4},
    "state": {"kind": "state", "initial_shifts": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_same_parameters_as_the_model_of_a_run(make_finch: Callable[..., Finch], kind: str) -> None:
    recipe, model = recipe_with(adapter=ADAPTERS[kind]), make_finch()
    planned = planned_model(recipe, model.config, precision="bf16")
    attach_adapter(recipe.adapter, model)
    apply_precision_(model, "bf16")

    def described(model: Finch) -> dict[str, tuple[object, ...]]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    assert described(planned) == described(model)
    assert {tensor.device.type for tensor in (*planned.parameters(), *planned.buffers())} == {"meta"}


@pytest.mark.parametrize("kind", ["int8", "nf4", "bnb-int8"])
def test_same_bytes_as_a_quantised_model(make_finch: Callable[..., Finch], kind: str) -> None:
    recipe, model = recipe_with(model={"quantize": kind}, adapter={"kind": "lora", "rank": 4}), make_finch()
    planned = planned_model(recipe, model.config, precision="bf16")
    quantize_(model, kind)
    attach_adapter(recipe.adapter, model)
    apply_precision_(model, "bf16")

    def stored(model: Finch) -> list[tuple[str, int]]:
        return sorted(
            (name, t.nbytes) for part in (model.named_parameters(), model.named_buffers()) for name, t in part
        )

    assert stored(planned) == stored(model)


def test_released_shapes() -> None:
    parameters = {}
    for name, config in released_shapes().items():
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in Finch(config).parameters())
    assert sorted(parameters.values()) == sorted(count for *_, count in RELEASED)
    assert parameters["14b"] == 14_069_088_256
    assert released_shape("1b6") == released_shape("Finch-1.6B") == released_shapes()["1.6b"]
    with pytest.raises(RecipeError, match=r"--shape 8b: expected one of 1\.6b, 3b, 7b"):
        released_shape("8b")


def test_spread_of_a_recipe() -> None:
    assert spread_of(recipe_with()) == Spread(ranks=1, strategy="single")
    assert spread_of(recipe_with(), ranks=16) == Spread(ranks=16, strategy="ddp")
    run = {"devices": 4, "num_nodes": 2, "strategy": "fsdp", "time_parallel": 2, "offload": "all"}
    expected = Spread(ranks=8, devices_per_node=4, strategy="fsdp", time_parallel=2, offload="all")
    assert spread_of(recipe_with(run=run)) == expected
    assert (expected.num_nodes, expected.groups) == (2, 4)
