"""A file as a config of RWKV-infctx-trainer: its two forms, and its keys by their dotted names."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infctx.errors import RecipeError
from infctx.recipe.infctx_trainer.draft import plain, printable, shown
from infctx.recipe.schema import Recipe

_SECTIONS = ("trainer", "model", "data")
_DATAPACK = ("datapack", "default", "dataset")
_OURS_ONLY = set(Recipe.model_fields) - set(_SECTIONS)
_MOST_SETS = 255  # As data.sets can hold.
_SECRET = re.compile(r"token$|secret|password|^key$|api_?key|auth", re.IGNORECASE)


def checked_config(config: object, path: Path) -> dict[str, Any]:
    """The config's sections.

    Raises: RecipeError for what is no config of that trainer.
    """
    if config is None:
        raise RecipeError(f"{path}: expected a config of RWKV-infctx-trainer, got an empty file.")
    if not isinstance(config, dict):
        kind = "a list" if isinstance(config, list) else shown(config)
        raise RecipeError(
            f"{path}: expected a config of RWKV-infctx-trainer with trainer:, model: and data:, got {kind}."
        )
    names = [str(name) for name in config]
    if _OURS_ONLY & set(names) and "trainer" not in names:
        raise RecipeError(f"{path}: this is a recipe of infctx already. Train it as it is: infctx train {path}")
    is_datapack = "dataset" in names
    if not set(names) & set(_DATAPACK if is_datapack else _SECTIONS):
        raise RecipeError(
            f"{path}: expected a config of RWKV-infctx-trainer, with trainer:, model: and data:, or a datapack, with "
            f"datapack:, default: and dataset:; got {printable(', '.join(names[:8]))}."
        )
    sets: Any = config.get("dataset")
    if is_datapack and not (isinstance(sets, list) and sets and all(isinstance(one, dict) for one in sets)):
        raise RecipeError(f"{path}: dataset: expected a list of sets, each with keys of its own, got {shown(sets)}.")
    if is_datapack and len(sets) > _MOST_SETS:
        raise RecipeError(f"{path}: dataset: expected at most {_MOST_SETS} sets, got {len(sets):,}.")
    for name in names:
        section = config.get(name)
        if name in (*_SECTIONS, *_DATAPACK[:2]) and not isinstance(section, dict | None):
            raise RecipeError(f"{path}: {name}: expected a section with keys of its own, got {shown(section)}.")
    return config


def flat_keys(config: Mapping[Any, Any]) -> Iterator[tuple[str, object]]:
    """Every key by its dotted name. Mappings that are one setting, as of labels, stay whole."""
    for name, value in config.items():
        if name == "dataset" and isinstance(value, list):
            for number, one in enumerate(value):
                yield from ((f"dataset[{number}].{key}", _without_secrets(key, inner)) for key, inner in one.items())
        elif name in (*_SECTIONS, *_DATAPACK) and isinstance(value, dict):
            for key, inner in value.items():
                if name == "trainer" and key == "callbacks":
                    yield from _flat_callbacks(inner)
                else:
                    yield f"{name}.{key}", _without_secrets(key, inner)
        elif not (name in (*_SECTIONS, *_DATAPACK) and value is None):
            yield str(name), _without_secrets(name, value)


def _flat_callbacks(callbacks: object) -> Iterator[tuple[str, object]]:
    several = isinstance(callbacks, list)
    for number, callback in enumerate(callbacks if isinstance(callbacks, list) and callbacks else [callbacks]):
        prefix = f"trainer.callbacks[{number}]" if several and callbacks else "trainer.callbacks"
        if not isinstance(callback, dict) or not callback:
            yield prefix, plain(callback)
            continue
        for key, value in callback.items():
            if key == "init_args" and isinstance(value, dict) and value:
                yield from ((f"{prefix}.init_args.{name}", plain(inner)) for name, inner in value.items())
            else:
                yield f"{prefix}.{key}", plain(value)


def _without_secrets(key: object, value: object) -> object:
    """A value as JSON can hold it. Credentials are not copied into recipes, messages and logs."""
    if isinstance(value, list):
        return [_without_secrets(key, inner) for inner in value]
    if not isinstance(value, dict):
        return plain(value)
    hides_all = key == "data_path_storage_options"
    return {
        str(name): "(not shown)" if hides_all or _SECRET.search(str(name)) else _without_secrets(name, inner)
        for name, inner in value.items()
    }
