"""Keys that the command line sets differently from the recipe file."""

from collections.abc import Callable
from typing import Any

from infctx.errors import RecipeError
from infctx.recipe.problems import Source, inner_keys, keys_of, known_keys, suggestion
from infctx.recipe.schema import Recipe


def apply_override(source: Source, override: str, read_value: Callable[[str], Any]) -> str | None:
    """Put `section.key=value` into the data of a recipe.

    Args: read_value: gives the value of the text after the sign; RecipeError or ValueError where it has none.
    Returns: the problem, if there is one.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    place = f"override {override}"
    if not equals or not key:
        return f"{place}: expected section.key=value, e.g. optimizer.lr=1e-5."
    if key in Recipe.model_fields:
        return f"{place}: {key} is a section: expected {key}.key=value, with one of {', '.join(keys_of(key))}."
    section, _, name = key.partition(".")
    name, _, inner = name.partition(".")
    if f"{section}.{name}" not in known_keys() or (inner and not inner_keys(section, name)):
        return f"{place}: {key}: unknown key.{suggestion(key)}"
    if inner and inner not in (names := inner_keys(section, name)):
        return f"{place}: {key}: unknown key. Expected {section}.{name} with one of {', '.join(names)}."
    try:
        value = read_value(text.strip())
    except (RecipeError, ValueError) as error:
        return f"{place}: {key}: expected a plain value, or a list in brackets: {error}"
    path = (section, name, inner) if inner else (section, name)
    target = source.data
    for part in path[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            # The file has something else there, and is told so.
            return None
    target[path[-1]] = value
    # Items of a list the file gave are no place of this value.
    for location in [known for known in source.places if known[: len(path)] == path]:
        del source.places[location]
    source.places[path] = place
    return None
