"""What a run says of its memory before it begins, and the refusal of one that cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from infctx.adapters.quantized_base import stored_bytes
from infctx.errors import RecipeError
from infctx.free_memory import free_host_bytes
from infctx.model.finch import Finch
from infctx.planning.devices import UNCERTAIN_SHARE, Place, Room, free_disk_bytes
from infctx.planning.from_recipe import Planner
from infctx.planning.recipe_plan import RecipePlan, Target, short_of
from infctx.planning.report import gigabytes
from infctx.planning.settings import FEWER_TRAINED, Settings, settings_that_fit
from infctx.recipe.schema import Recipe
from infctx.training.memory_ladder import SMALLEST_CHUNK_TOKENS

_NAMES: dict[Place, str] = {"device": "device", "host": "host memory", "disk": "disk"}


def room_here(model: Finch, device: torch.device, folder: Path) -> Room:
    """What this machine has for a run whose model is open on the host already, and whose folder may hold checkpoints.

    Args:
        device: that this process will use.
        folder: of the run; what is in it counts as free, since new checkpoints take the place of old ones.
    """
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    disk = free_disk_bytes(folder) + written
    # Of a mapped file the weights are free as well as taken: counting them twice errs on the side of trying.
    host = free_host_bytes() + stored_bytes(model)
    if device.type == "cpu":
        return Room(device=host, disk=disk)
    return Room(device=torch.cuda.mem_get_info(device)[0], host=host, disk=disk)


def least_room(rooms: Sequence[Room]) -> Room:
    """What every rank has, so that all of them decide alike."""

    def least(place: Place) -> int | None:
        sizes = [size for room in rooms if (size := room.of(place)) is not None]
        return min(sizes, default=None)

    return Room(device=least("device"), host=least("host"), disk=least("disk"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunShape:
    """What is known of a run once its parts are open.

    ranks: in all. longest: tokens of the longest document. folder: of the run.
    """

    ranks: int
    longest: int
    device: torch.device
    model: Finch


def plan_before_training(recipe: Recipe, shape: RunShape, room: Room) -> list[str]:
    """The plan of a run in a few lines.

    What is short by less than a tenth is tried; and on one GPU what shorter chunks would mend, since a run shortens
    them by itself when the memory runs out.

    Args:
        recipe: resolved.
        room: the least of all ranks.
    Raises:
        RecipeError: it cannot fit; names the first settings that do.
    """
    kind = "cpu" if shape.device.type == "cpu" else "cuda"
    target = Target(kind=kind, room=room, ranks=shape.ranks)
    tokens = max(shape.longest, recipe.data.pack_tokens or 0)
    plan = Planner(recipe, shape.model.config, target).plan(tokens)
    missing = short_of(_beside_the_context(plan), room, tolerance=UNCERTAIN_SHARE)
    if missing and not (missing == ["device"] and _shortens_chunks(plan) and _fits_shortened(recipe, plan, tokens)):
        raise RecipeError(_refusal(recipe, plan, missing, tokens))
    lines = [f"needed     {_needed_in_words(plan)}"]
    if close := short_of(_beside_the_context(plan), room, tolerance=-UNCERTAIN_SHARE):
        names = " and ".join(_NAMES[place] for place in close)
        more = "; chunks are made shorter if it runs out" if close == ["device"] and _shortens_chunks(plan) else ""
        lines.append(f"           close: the plan may be wrong by a tenth, and there is little {names} left{more}")
    return lines


def _beside_the_context(plan: RecipePlan) -> Room:
    """What is needed where the runtime of a GPU has been taken already."""
    needs = plan.needs
    return replace(needs, device=(needs.device or 0) - plan.memory.device.get("runtime", 0))


def _shortens_chunks(plan: RecipePlan) -> bool:
    """Whether a run goes on in shorter chunks when the memory runs out; a CPU's system may end it instead."""
    return plan.spread.ranks == 1 and plan.target.kind == "cuda"


def _fits_shortened(recipe: Recipe, plan: RecipePlan, tokens: int) -> bool:
    """Whether what `shorten_chunks` can do is enough."""
    shortest = {"bptt.chunk_tokens": min(recipe.bptt.chunk_tokens, SMALLEST_CHUNK_TOKENS)}
    again = _with(recipe, plan, {**shortest, "bptt.window": 1}, min(tokens, SMALLEST_CHUNK_TOKENS))
    return not short_of(_beside_the_context(again), plan.target.room, tolerance=UNCERTAIN_SHARE)


def _with(recipe: Recipe, plan: RecipePlan, settings: Settings, tokens: int) -> RecipePlan:
    bptt = recipe.bptt.model_copy(update={key.partition(".")[2]: value for key, value in settings.items()})
    return Planner(recipe.model_copy(update={"bptt": bptt}), plan.config, plan.target).plan(tokens)


def _needed_in_words(plan: RecipePlan) -> str:
    """What is needed of what there is, place by place."""
    names: list[tuple[Place, str]] = [("device", "memory" if plan.target.kind == "cpu" else "device")]
    names += [("host", "host"), ("disk", "disk")]
    needs, room = _beside_the_context(plan), plan.target.room
    told = [(name, needs.of(place) or 0, room.of(place)) for place, name in names if needs.of(place)]
    words = [f"{name} {gigabytes(size)}" + (f" of {gigabytes(there)}" if there else "") for name, size, there in told]
    unmeasured = " (not measured on a GPU)" if plan.target.kind == "cuda" else ""
    return ", ".join(words) + unmeasured


def _refusal(recipe: Recipe, plan: RecipePlan, missing: list[Place], tokens: int) -> str:
    needs, room = _beside_the_context(plan), plan.target.room
    names = {**_NAMES, "device": "memory"} if plan.target.kind == "cpu" else _NAMES
    short = " and ".join(
        f"{names[place]}: {gigabytes(needs.of(place) or 0)} needed, {gigabytes(room.of(place) or 0)} free"
        for place in missing
    )
    found = settings_that_fit(recipe, plan.config, plan.target, document_tokens=tokens)
    if found is not None and found.settings:
        advice = f"This fits: {' '.join(found.overrides)} behind the recipe."
    elif missing == ["disk"]:
        advice = "Make room, lower run.keep_checkpoints, or set run.folder on another disk."
    else:
        advice = f"No setting of memory is enough. Train fewer weights ({FEWER_TRAINED}), or use more devices."
    parts = {"device": plan.memory.device, "host": plan.memory.host, "disk": plan.disk}
    largest = max(parts[missing[0]].items(), key=lambda part: part[1])
    return (
        f"run: this cannot fit. {short[0].upper()}{short[1:]}, most of it {largest[0]} ({gigabytes(largest[1])}). "
        f"{advice} `infctx plan` shows it by part."
    )
