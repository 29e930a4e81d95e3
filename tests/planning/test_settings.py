"""The settings that fit: really fit, nothing in them is too much, and what costs less comes first."""

from __future__ import annotations

from typing import Any

import pytest

from infctx.model.init import new_config
from infctx.planning.devices import Room
from infctx.planning.from_recipe import plan_recipe
from infctx.planning.recipe_plan import RecipePlan, Target, short_of
from infctx.planning.settings import ORDER, Fitting, settings_that_fit, with_settings
from infctx.recipe.schema import Recipe
from tests.planning.planned_recipes import recipe_of, small_config

DOCUMENT = 65_536
PLENTY = 10**12


def planned(recipe: Recipe, target: Target) -> RecipePlan:
    return plan_recipe(recipe, small_config(), target, document_tokens=DOCUMENT)


def room_for(recipe: Recipe, *, kind: str = "cuda", **settings: Any) -> Target:
    """Just enough for the recipe with these keys set."""
    changed = with_settings(recipe, {key.replace("__", "."): value for key, value in settings.items()})
    # Told a large room, nothing is left to auto by the shortage of it.
    needs = planned(changed, Target(kind=kind, room=Room(device=PLENTY, host=PLENTY, disk=PLENTY))).needs
    assert needs.device is not None
    return Target(kind=kind, room=Room(device=needs.device, host=PLENTY, disk=PLENTY))


def found(recipe: Recipe, target: Target) -> Fitting | None:
    return settings_that_fit(recipe, small_config(), target, document_tokens=DOCUMENT)


SAID = {"activations": "keep", "boundaries": "device"}
CASES = [
    # What is enough, set in the recipe; what has to be found.
    ({}, {}),
    ({"bptt__boundaries": "host"}, {"bptt.boundaries"}),
    ({"bptt__boundaries": "host", "bptt__activations": "recompute"}, {"bptt.boundaries", "bptt.activations"}),
    (
        {"bptt__boundaries": "host", "bptt__activations": "recompute", "bptt__chunk_tokens": 512},
        {"bptt.boundaries", "bptt.activations", "bptt.chunk_tokens"},
    ),
]


@pytest.mark.parametrize(("enough", "keys"), CASES, ids=[str(len(keys)) for _, keys in CASES])
def test_what_is_enough_is_found_and_nothing_more(enough: dict[str, Any], keys: set[str]) -> None:
    recipe = recipe_of(bptt=SAID)
    target = room_for(recipe, **enough)
    fitting = found(recipe, target)
    assert fitting is not None
    assert fitting.plan.fits
    assert set(fitting.settings) <= set(keys)
    assert set(fitting.settings) == set(keys) or len(keys) > 1
    # Every one of them is needed.
    for key in fitting.settings:
        rest = {other: value for other, value in fitting.settings.items() if other != key}
        plan = planned(with_settings(recipe, rest) if rest else recipe, target)
        assert short_of(plan.needs, target.room), key


def test_what_a_later_change_makes_unnecessary_is_taken_back() -> None:
    # Weights that are large beside the activations of a chunk.
    config = new_config(version="6", n_layer=4, n_embd=1024, vocab_size=64)
    recipe = recipe_of(bptt={"chunk_tokens": 512, "activations": "recompute", "boundaries": "host"})
    enough = {"optimizer.name": "adamw-offloaded", "model.quantize": "int8"}
    room = Room(device=PLENTY, host=PLENTY, disk=PLENTY)
    needs = plan_recipe(with_settings(recipe, enough), config, Target(room=room), document_tokens=DOCUMENT).needs
    target = Target(room=Room(device=needs.device, host=PLENTY, disk=PLENTY))
    shorter = with_settings(recipe, {"bptt.chunk_tokens": 256, "optimizer.name": "adamw-offloaded"})
    assert plan_recipe(shorter, config, target, document_tokens=DOCUMENT).fits is False
    fitting = settings_that_fit(recipe, config, target, document_tokens=DOCUMENT)
    assert fitting is not None
    # Both were set before the base was quantised; without shorter chunks it would not do.
    assert fitting.settings == {"bptt.chunk_tokens": 256, "model.quantize": "int8"}


def test_rows_become_groups_and_windows_keep_their_tokens() -> None:
    recipe = recipe_of(
        bptt={"activations": "keep", "boundaries": "host", "window": 4}, run={"rows": 4, "accumulate": 2}
    )
    target = room_for(
        recipe, bptt__activations="recompute", run__rows=1, run__accumulate=8, bptt__chunk_tokens=256, bptt__window=16
    )
    fitting = found(recipe, target)
    assert fitting is not None
    assert fitting.settings["run.rows"] * fitting.settings["run.accumulate"] == 8
    changed = with_settings(recipe, fitting.settings)
    window = changed.bptt.window
    assert changed.bptt.chunk_tokens < 1024
    assert isinstance(window, int)
    assert window * changed.bptt.chunk_tokens == 4096


def test_host_memory_that_is_short_sends_boundary_states_to_disk() -> None:
    recipe = recipe_of(bptt={**SAID, "chunk_tokens": 256})
    on_disk = room_for(recipe, bptt__boundaries="disk")
    target = Target(room=Room(device=on_disk.room.device, host=1000, disk=PLENTY))
    fitting = found(recipe, target)
    assert fitting is not None
    assert fitting.plan.chunk.boundaries in ("disk", "device")
    assert fitting.plan.fits
    nowhere = Target(room=Room(device=on_disk.room.device, host=1000, disk=1000))
    assert found(recipe, nowhere) is None


def test_a_quantised_base_is_for_adapters_only_and_comes_last() -> None:
    lora, full = recipe_of(bptt=SAID), recipe_of(bptt=SAID, adapter={"kind": "full"})
    least = room_for(
        lora,
        bptt__activations="recompute",
        bptt__boundaries="disk",
        bptt__chunk_tokens=256,
        optimizer__name="adamw-offloaded",
        model__quantize="nf4",
    )
    fitting = found(lora, least)
    assert fitting is not None
    assert "model.quantize=nf4" in fitting.overrides
    assert fitting.plan.fits
    # Weights that are trained are never given up for the user.
    assert found(full, least) is None
    assert not any("adapter" in change for change in ORDER)


def test_moments_go_to_the_host_before_they_become_8_bits() -> None:
    recipe = recipe_of(bptt={"chunk_tokens": 128, **SAID}, adapter={"kind": "full"}, data={"pack_tokens": 128})
    offloaded = room_for(
        recipe, optimizer__name="adamw-offloaded", bptt__activations="recompute", bptt__boundaries="host"
    )
    fitting = found(recipe, offloaded)
    assert fitting is not None
    assert fitting.settings["optimizer.name"] == "adamw-offloaded"
    without_host = Target(room=Room(device=offloaded.room.device * 2, host=1000, disk=PLENTY))
    again = found(recipe, without_host)
    assert again is None or again.settings.get("optimizer.name") != "adamw-offloaded"
