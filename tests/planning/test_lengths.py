"""The longest document fits, a longer one does not, and memory of the device is the same for both."""

from __future__ import annotations

import pytest

from infctx.planning.devices import Room
from infctx.planning.from_recipe import Planner
from infctx.planning.lengths import LENGTHS, longest_document, plans_by_length
from infctx.planning.recipe_plan import Target
from infctx.planning.settings import with_settings
from infctx.recipe.schema import Recipe
from infctx.training.boundary_store import BLOCK_BYTES
from tests.planning.planned_recipes import recipe_of, small_config


def planner_of(recipe: Recipe, *, kind: str = "cuda", device: int = 4 * 10**9) -> Planner:
    return Planner(
        recipe, small_config(), Target(kind=kind, room=Room(device=device, host=3 * 10**9, disk=20 * 10**9), ranks=1)
    )


@pytest.mark.parametrize("thinned", [False, True], ids=["all", "thinned"])
@pytest.mark.parametrize(("place", "kind"), [("device", "cpu"), ("host", "cuda"), ("disk", "cuda")])
def test_longest_document_is_the_longest_that_fits(place: str, kind: str, thinned: bool) -> None:
    recipe = recipe_of(bptt={"boundaries": place, "thin_boundaries": thinned, "activations": "keep"})
    planner = planner_of(recipe, kind=kind)
    longest = longest_document(planner, planner.plan(4096))
    assert longest.bound == place
    assert longest.tokens is not None
    assert longest.tokens == longest.by_place[place]
    # Blocks of several states, and the states inside a checkpoint, are what a whole answer would have to solve for.
    states = 2 * BLOCK_BYTES // planner.plan(4096).memory.one_state
    assert planner.plan(round(0.95 * longest.tokens) - states * 1024).fits
    assert planner.plan(round(1.05 * longest.tokens) + states * 1024).fits is False


def test_auto_takes_the_place_with_most_room() -> None:
    planner = planner_of(recipe_of())
    longest = longest_document(planner, planner.plan(4096))
    assert list(longest.by_place) == ["device", "host", "disk"]
    assert longest.bound == "disk"
    assert longest.tokens == max(longest.by_place.values())


def test_a_window_of_chunks_ends_no_document_and_a_full_device_every_one() -> None:
    windowed = planner_of(recipe_of(bptt={"window": 4}))
    assert longest_document(windowed, windowed.plan(4096)).tokens is None
    full = planner_of(recipe_of(), device=10**6)
    found = longest_document(full, full.plan(4096))
    assert (found.tokens, found.bound) == (0, "device")


def test_device_memory_does_not_grow_with_the_document() -> None:
    planner = planner_of(with_settings(recipe_of(), {"bptt.boundaries": "host", "bptt.activations": "keep"}))
    rows = plans_by_length(planner)
    assert [row.tokens for row in rows] == list(LENGTHS)
    assert len({row.plan.memory.device_bytes for row in rows}) == 1
    assert rows[-1].plan.memory.host_bytes > 100 * rows[0].plan.memory.one_state
    assert rows[-1].seconds > 1000 * rows[0].seconds
