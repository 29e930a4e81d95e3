"""Keys that the command line sets differently from the recipe file."""

from collections.abc import Callable
from typing import Any

from infctx.errors import RecipeError
from infctx.recipe.problems import Source, keys_of, known_keys, suggestion
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
    if key not in known_keys():
        return f"{place}: {key}: unknown key.{suggestion(key)}"
    try:
        value = read_value(text.strip())
    except (RecipeError, ValueError) as error:
        return f"{place}: {key}: expected a plain value, or a list in brackets: {error}"
    section, name = key.split(".")
    target = source.data.get(section)
    if target is None:
        target = source.data[section] = {}
    if isinstance(target, dict):
        target[name] = value
        # Items of a list the file gave are no place of this value.
        for location in [known for known in source.places if known[:2] == (section, name)]:
            del source.places[location]
        source.places[(section, name)] = place
    return None
