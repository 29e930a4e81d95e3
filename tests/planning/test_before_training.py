"""What a run says before it starts, and when it does not start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.errors import RecipeError
from infctx.model.finch import Finch
from infctx.planning.before_training import RunShape, least_room, plan_before_training, room_here
from infctx.planning.devices import Room
from infctx.planning.from_recipe import plan_recipe
from infctx.planning.recipe_plan import Target
from infctx.planning.settings import with_settings
from infctx.recipe.schema import Recipe
from tests.planning.planned_recipes import recipe_of, small_config

LONGEST = 16_384
PLENTY = 10**12


def shape_of(*, device: str = "cpu", ranks: int = 1) -> RunShape:
    with torch.device("meta"):
        model = Finch(small_config())
    return RunShape(ranks=ranks, longest=LONGEST, device=torch.device(device), model=model)


def needed(recipe: Recipe, kind: str = "cpu", ranks: int = 1, **room: int) -> Room:
    there = Room(**{"device": PLENTY, "host": PLENTY, "disk": PLENTY, **room})
    target = Target(kind=kind, room=there, ranks=ranks)  # type: ignore[arg-type]
    return plan_recipe(recipe.resolved(), small_config(), target, document_tokens=LONGEST).needs


def said(recipe: Recipe, shape: RunShape, room: Room) -> str:
    return "\n".join(plan_before_training(recipe.resolved(), shape, room))


def test_what_fits_is_told_in_a_line() -> None:
    lines = said(recipe_of(), shape_of(), Room(device=PLENTY, disk=PLENTY))
    assert lines.startswith("needed     memory ")
    assert "disk" in lines
    assert lines.count("\n") == 0
    assert len(lines) <= 80


def test_what_misses_by_less_than_a_tenth_is_tried_and_more_is_refused() -> None:
    recipe = recipe_of(bptt={"activations": "keep", "boundaries": "device"})
    needs = needed(recipe)
    assert needs.device is not None
    close = said(recipe, shape_of(), Room(device=round(needs.device / 1.08), disk=PLENTY))
    assert "close" in close
    with pytest.raises(RecipeError, match="cannot fit") as refused:
        said(recipe, shape_of(), Room(device=round(needs.device / 1.2), disk=PLENTY))
    message = str(refused.value)
    assert "This fits: bptt.activations=recompute" in message
    assert "needed" in message
    assert "infctx plan" in message


def test_the_settings_that_a_refusal_names_are_taken() -> None:
    recipe = recipe_of(bptt={"activations": "keep"}, run={"rows": 4})
    least = needed(with_settings(recipe, {"bptt.activations": "recompute", "run.rows": 1, "bptt.chunk_tokens": 512}))
    assert least.device is not None
    room = Room(device=least.device, disk=PLENTY)
    with pytest.raises(RecipeError) as refused:
        said(recipe, shape_of(), room)
    overrides = str(refused.value).split("This fits: ")[1].split(" behind the recipe")[0].split()
    settings = {key: int(value) if value.isdigit() else value for key, value in (one.split("=") for one in overrides)}
    assert said(with_settings(recipe, settings), shape_of(), room)


def test_nothing_that_helps_is_said_so() -> None:
    full = recipe_of(adapter={"kind": "full"})
    with pytest.raises(RecipeError, match=r"No setting of memory is enough\. Train fewer weights"):
        said(full, shape_of(), Room(device=10**6, disk=PLENTY))
    with pytest.raises(RecipeError, match=r"Make room, lower run\.keep_checkpoints"):
        said(full, shape_of(), Room(device=PLENTY, disk=1000))


def test_one_gpu_shortens_its_chunks_and_many_do_not() -> None:
    recipe = recipe_of(bptt={"activations": "keep", "chunk_tokens": 8192, "boundaries": "host"})
    room = Room(device=200_000_000, host=PLENTY, disk=PLENTY)
    assert (needed(recipe, "cuda").device or 0) - 750_000_000 > 1.5 * (room.device or 0)
    assert "chunks are made shorter" in said(recipe, shape_of(device="cuda"), room)
    spread = recipe_of(bptt={"activations": "keep", "chunk_tokens": 8192, "boundaries": "host"}, run={"devices": 2})
    with pytest.raises(RecipeError, match="cannot fit"):
        said(spread, shape_of(device="cuda", ranks=2), room)


def test_ranks_share_a_machine_and_decide_alike() -> None:
    recipe = recipe_of(run={"devices": 2})
    one, two = needed(recipe_of()), needed(recipe, ranks=2)
    assert (two.device or 0) > 1.9 * (one.device or 0)
    rooms = [Room(device=10, host=None, disk=7), Room(device=8, host=5, disk=9)]
    assert least_room(rooms) == Room(device=8, host=5, disk=7)


def test_checkpoints_of_the_run_itself_are_room(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    model = make_finch()
    before = room_here(model, torch.device("cpu"), tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_bytes(bytes(50_000_000))
    after = room_here(model, torch.device("cpu"), tmp_path / "run")
    assert before.disk is not None
    assert after.disk is not None
    # Others may write at the same time.
    assert abs(after.disk - before.disk) < 40_000_000
    assert before.host is None
