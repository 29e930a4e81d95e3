"""YAML and dotted overrides to a Recipe, and back; every mistake of a recipe is named with its line.

The YAML accepted is the plain part of it: no tags, anchors or aliases, no key twice, and only the numbers and
booleans of YAML 1.2, so that `010`, `1:30`, `no` and `2024-01-01` mean what they look like.
"""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from infctx.errors import RecipeError
from infctx.recipe.problems import (
    QUOTES_HINT,
    Location,
    Source,
    describe,
    dotted,
    keys_of,
    known_keys,
    quoted,
    suggestion,
)
from infctx.recipe.schema import Recipe

MAX_RECIPE_BYTES = 1_000_000
_MAX_DEPTH = 16

_INTEGER = re.compile(r"[-+]?[0-9]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, put the overrides on top, and check all of it.

    Args:
        overrides: `section.key=value`; the value is a plain YAML scalar, or a list in brackets. A later one wins.
    Raises: RecipeError listing every problem with its line.
    """
    source = _read_file(Path(path))
    problems = [problem for override in overrides if (problem := _apply_override(source, override))]
    for key, value in source.data.items():
        if value is None and key in Recipe.model_fields:
            # `kernel:` with nothing below it is an empty section.
            source.data[key] = {}
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        problems += describe(error, source)
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def write_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write the resolved recipe as YAML, whole or not at all; its folder must exist."""
    path = Path(path)
    text = "# The recipe of this run, with what was left open filled in.\n" + yaml.dump(
        recipe.resolved().to_mapping(), Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=10_000
    )
    sibling = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with sibling.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)


def recipe_differences(old: Recipe, new: Recipe, *, but_not: Collection[str] = ()) -> list[str]:
    """One line for each key that differs between a run folder's recipe and the one given now, both resolved.

    Args: but_not: keys that may differ.
    """
    before, now = _flat(old), _flat(new)
    keys = [key for key in known_keys() if key not in but_not and before.get(key) != now.get(key)]
    return [f"{key}: {_shown(before.get(key))} in the run folder, {_shown(now.get(key))} now" for key in keys]


def recipe_json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "infctx recipe"}


def _flat(recipe: Recipe) -> dict[str, object]:
    mapping = recipe.resolved().to_mapping()
    return {f"{section}.{key}": value for section, keys in mapping.items() for key, value in keys.items()}


def _shown(value: object) -> str:
    """A value of a recipe, as one would write it in YAML."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


# Reading


class _RecipeLoader(yaml.SafeLoader):
    """A YAML reader that stops at tags, anchors, aliases and deep nesting, before anything is built from them."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        for attribute, what in (("anchor", "anchors (&name) and aliases (*name)"), ("tag", "tags (!name)")):
            if getattr(event, attribute, None) is not None:
                raise yaml.MarkedYAMLError(problem=f"{what} are not used in recipes", problem_mark=event.start_mark)
        if self.depth >= _MAX_DEPTH:
            problem = f"nested more than {_MAX_DEPTH} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _RecipeDumper(yaml.SafeDumper):
    """Writes lists of plain values in brackets, and quotes what would not be read back as text."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if isinstance(_plain_value(value), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_RecipeDumper.add_representer(str, _represent_text)
_RecipeDumper.add_representer(list, _represent_list)


def _read_file(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file.") from None
    except OSError as error:
        raise RecipeError(f"{path}: expected a readable recipe file: {error.strerror or error}.") from None
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: expected a recipe, got a file of more than {MAX_RECIPE_BYTES:,} bytes.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: expected UTF-8 text, got byte 0x{content[error.start]:02x}.") from None
    node = _compose(text, str(path))
    source = Source(name=str(path), data={})
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None and node.value == ""):
        return source
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{path}, line {node.start_mark.line + 1}: expected sections (model:, data:, …), "
            f"got {quoted(_to_data(node, (), source))}."
        )
    source.data.update(_to_data(node, (), source))
    return source


def _compose(text: str, name: str) -> yaml.Node | None:
    """The node tree of one YAML document; RecipeError with the line where it is not one."""
    try:
        # The reader looks at the first characters at once, so even making it may fail.
        loader = _RecipeLoader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}" if mark else name
        what = ", ".join(part for part in (error.context, error.problem) if part)
        is_about_quotes = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError) or "(" in what
        hint = f" {QUOTES_HINT}." if is_about_quotes else ""
        raise RecipeError(f"{place}: expected a plain YAML recipe: {what}.{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = chr(error.character) if isinstance(error.character, int) else error.character
        raise RecipeError(f"{name}, line {line}: expected text, got {character!r} ({error.reason}).") from None


def _to_data(node: yaml.Node, location: Location, source: Source) -> Any:
    """Plain data of a node tree; notes the place of every part on the way."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return _plain_value(node.value) if node.style is None else node.value
        except ValueError:
            raise RecipeError(f"{source.place(location)}: {dotted(location)}: a number of too many digits.") from None
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note(source, (*location, index), item)
        return [_to_data(item, (*location, index), source) for index, item in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{source.name}, line {line}: expected a name before the colon, got a list or mapping.")
        inner = (*location, key_node.value)
        if key_node.value in mapping:
            raise RecipeError(
                f"{source.name}, line {line}: {dotted(inner)}: set twice, first in line {source.line(inner)}. Keep one."
            )
        _note(source, inner, key_node)
        mapping[key_node.value] = _to_data(value_node, inner, source)
    return mapping


def _note(source: Source, location: Location, node: yaml.Node) -> None:
    line = node.start_mark.line + 1
    source.line_numbers[location] = line
    source.places[location] = f"{source.name}, line {line}"


def _plain_value(text: str) -> str | int | float | bool | None:
    """An unquoted scalar by the rules of YAML 1.2's core schema. Raises: ValueError at absurdly long integers."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _REAL.fullmatch(text):
        return float(text)
    return text


# Overrides


def _apply_override(source: Source, override: str) -> str | None:
    """Put `section.key=value` into the data. Returns the problem, if there is one."""
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
        value = _override_value(text.strip())
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


def _override_value(text: str) -> Any:
    """A quoted scalar or a bracketed list as YAML; all else as one plain scalar: *.txt and {stdlib} need no quotes."""
    if not text.startswith(("[", '"', "'")):
        return _plain_value(text)
    node = _compose(text, "value")
    assert node is not None
    return _to_data(node, (), Source(name="value", data={}))
