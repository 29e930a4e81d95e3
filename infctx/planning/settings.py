"""Settings of a recipe that fit a memory: what costs least is changed first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from infctx.errors import RecipeError
from infctx.model.config import FinchConfig
from infctx.planning.from_recipe import Planner
from infctx.planning.recipe_plan import RecipePlan, Target, missing_bytes
from infctx.recipe.run_section import SHARDING
from infctx.recipe.schema import Recipe

# Shorter ones save little and take much longer.
SHORTEST_CHUNK_TOKENS = 256
ORDER = (
    "boundary states in host memory",
    "activations recomputed",
    "one row at a time, accumulated",
    "shorter chunks, down to 256 tokens",
    "thinned boundary states, then on disk",
    "optimizer in host memory, then of 8 bits",
    "quantised base: int8, then nf4",
)
"""What is changed, and in which order; what proves unnecessary is taken back, the last first."""
FEWER_TRAINED = "adapter.kind=lora, or a lower adapter.rank"
_UNDER_AN_ADAPTER = ("lora", "rslora", "state")

Settings = dict[str, Any]
"""Dotted recipe keys and their values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """Settings with which a recipe fits, and its plan with them; no settings where it fits as it is."""

    settings: Settings
    plan: RecipePlan

    @property
    def overrides(self) -> list[str]:
        """As they are given behind a recipe."""
        return [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.settings.items()
        ]


def settings_that_fit(
    recipe: Recipe, config: FinchConfig, target: Target, *, document_tokens: int | None = None, tolerance: float = 0.0
) -> Fitting | None:
    """The recipe's own settings where they fit, else with as little changed as fits, in `ORDER`.

    All but 8-bit moments and a quantised base leave the result of the run as it was. Fewer trained weights are left to
    the user.

    Args:
        target: what it is to run on; its room has to be told.
        document_tokens: of the longest document.
        tolerance: part of the room by which it may be missed.
    Returns:
        None where nothing in the order is enough.
    """
    search = _Search(recipe, config, target, document_tokens, tolerance)
    if (plan := search.fitting({})) is not None:
        return Fitting(settings={}, plan=plan)
    changes: list[Settings] = []
    missing = search.missing_bytes({}) or 0
    for change in _changes(recipe, target):
        still_missing = search.missing_bytes(_merged([*changes, change]))
        if still_missing is None or still_missing >= missing:
            continue
        changes.append(change)
        missing = still_missing
        if missing == 0:
            break
    else:
        return None
    for index in reversed(range(len(changes) - 1)):
        without = changes[:index] + changes[index + 1 :]
        if search.fitting(_merged(without)) is not None:
            changes = without
    settings = _merged(changes)
    plan = search.fitting(settings)
    assert plan is not None, "it fitted a moment ago"
    return Fitting(settings=settings, plan=plan)


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some keys set differently.

    Raises:
        ValidationError: they do not go together with the others.
    """
    mapping = recipe.to_mapping()
    for key, value in settings.items():
        section, _, name = key.partition(".")
        mapping.setdefault(section, {})[name] = value
    return Recipe.model_validate(mapping)


class _Search:
    """Plans of a recipe with changes; each model is made once."""

    def __init__(
        self, recipe: Recipe, config: FinchConfig, target: Target, document_tokens: int | None, tolerance: float
    ) -> None:
        self._recipe, self._config, self._target = recipe, config, target
        self._document_tokens, self._tolerance = document_tokens, tolerance
        self._planners: dict[str, Planner] = {}

    def missing_bytes(self, settings: Settings) -> int | None:
        """What there is too little of, all places together; None where the settings cannot be had together."""
        try:
            plan = self._plan(settings)
        except (ValidationError, RecipeError):
            return None
        return missing_bytes(plan.needs, self._target.room, tolerance=self._tolerance)

    def fitting(self, settings: Settings) -> RecipePlan | None:
        plan = self._plan(settings)
        return None if missing_bytes(plan.needs, self._target.room, tolerance=self._tolerance) else plan

    def _plan(self, settings: Settings) -> RecipePlan:
        recipe = with_settings(self._recipe, settings) if settings else self._recipe
        # Nothing else in the order changes the model.
        known = self._planners.get(recipe.model.quantize)
        planner = Planner(recipe, self._config, self._target, model=known.model if known else None)
        self._planners.setdefault(recipe.model.quantize, planner)
        return planner.plan(self._document_tokens)


def _merged(changes: list[Settings]) -> Settings:
    return {key: value for change in changes for key, value in change.items()}


def _changes(recipe: Recipe, target: Target) -> Iterator[Settings]:
    """One after another, each on top of those before it."""
    bptt, run, is_gpu = recipe.bptt, recipe.run, target.kind == "cuda"
    crosses = bptt.window != 1
    if is_gpu and crosses and bptt.boundaries in ("auto", "device"):
        yield {"bptt.boundaries": "host"}
    if bptt.activations != "recompute":
        yield {"bptt.activations": "recompute"}
    if run.rows > 1:
        yield {"run.rows": 1, "run.accumulate": run.accumulate * run.rows}
    chunk, window = bptt.chunk_tokens, bptt.window
    while chunk // 2 >= max(SHORTEST_CHUNK_TOKENS, run.time_parallel) and (window == "document" or chunk % 2 == 0):
        # A window keeps its length in tokens, and the gradient what it was.
        chunk //= 2
        window = window if window == "document" else 2 * window
        yield {"bptt.chunk_tokens": chunk} | ({} if window == "document" else {"bptt.window": window})
    if crosses and not bptt.thin_boundaries:
        yield {"bptt.thin_boundaries": True}
    if crosses and bptt.boundaries != "disk":
        yield {"bptt.boundaries": "disk"}
    yield from _of_the_optimizer(recipe, is_gpu=is_gpu)
    if recipe.model.quantize == "none" and recipe.adapter.kind in _UNDER_AN_ADAPTER and run.strategy not in SHARDING:
        yield {"model.quantize": "int8"}
    if recipe.model.quantize in ("none", "int8", "bnb-int8") and recipe.adapter.kind in _UNDER_AN_ADAPTER:
        yield {"model.quantize": "nf4"}


def _of_the_optimizer(recipe: Recipe, *, is_gpu: bool) -> Iterator[Settings]:
    run, name = recipe.run, recipe.optimizer.name
    if run.strategy in ("auto", "single", "ddp"):
        if is_gpu and name == "adamw":
            yield {"optimizer.name": "adamw-offloaded"}
        if name == "adamw" and recipe.optimizer.fused == "auto":
            yield {"optimizer.name": "adamw-8bit"}
    elif is_gpu and run.offload == "none":
        yield {"run.offload": "all" if run.strategy in SHARDING else "optimizer"}
