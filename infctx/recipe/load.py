"""YAML and dotted overrides to a Recipe, and back; every mistake of a recipe is named with its line.

The YAML accepted is the plain part of it: no tags, anchors or aliases, no key twice, and only the numbers and
booleans of YAML 1.2, so that `010`, `1:30`, `no` and `2024-01-01` mean what they look like.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from infctx.errors import RecipeError
from infctx.recipe.overrides import apply_override
from infctx.recipe.problems import (
    QUOTES_HINT,
    Location,
    Source,
    describe,
    dotted,
    known_keys,
    quoted,
)
from infctx.recipe.scalars import plain_value
from infctx.recipe.schema import Recipe

RECIPE_FILE = "recipe.yaml"
"""What a resolved recipe is called in a run folder."""

MAX_RECIPE_BYTES = 1_000_000
MAX_FOREIGN_VALUES = 100_000
_MAX_DEPTH = 16
_LATER_ENTRIES_WIN = ("adapter.ranks", "adapter.alphas")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, put the overrides on top, and check all of it.

    Args:
        overrides: `section.key=value`; the value is a plain YAML scalar, or a list in brackets. A later one wins.
    Raises: RecipeError listing every problem with its line.
    """
    return parse_recipe(_read_text(Path(path), "recipe"), name=str(path), overrides=overrides)


def parse_recipe(text: str, *, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from its text; see `load_recipe`. name: of the text, in messages."""
    source = _source(text, name)
    problems = [problem for override in overrides if (problem := apply_override(source, override, _override_value))]
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
    header = "# The recipe of this run, with what was left open filled in.\n"
    write_recipe_text(header + recipe_text(recipe.resolved().to_mapping()), path)


def recipe_text(sections: Mapping[str, object]) -> str:
    """The YAML of plain sections, in the order given."""
    return yaml.dump(dict(sections), Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=10_000)


def write_recipe_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a recipe that is text already, comments included, whole or not at all; its folder must exist."""
    path = Path(path)
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
    keys = [key for key in known_keys() if key not in but_not and _in_order(key, before) != _in_order(key, now)]
    return [f"{key}: {_shown(before.get(key))} in the run folder, {_shown(now.get(key))} now" for key in keys]


def _in_order(key: str, flat: Mapping[str, object]) -> object:
    """The value of a key; of a mapping whose later entries win, its entries in their order."""
    value = flat.get(key)
    return list(value.items()) if key in _LATER_ENTRIES_WIN and isinstance(value, dict) else value


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


def read_foreign_yaml(path: str | os.PathLike[str]) -> Any:
    """The config of another program as plain data, by the rules of PyYAML's safe loader.

    Raises: RecipeError for what is no YAML, for a key set twice, and for more than MAX_FOREIGN_VALUES values once
        aliases are written out.
    """
    text = _read_text(Path(path), "config")
    try:
        return _parse(text, str(path), _foreign_data, "a YAML config")
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RecipeError(f"{path}: expected a YAML config: {error or type(error).__name__}.") from None


def _foreign_data(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    # Walked with every alias written out, before anything is built: a few lines of aliases can stand for any number.
    waiting, count = [root] if root else [], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > MAX_FOREIGN_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_FOREIGN_VALUES:,} values", problem_mark=node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += _parts(node)
    return loader.construct_document(root) if root else None


def _parts(mapping: yaml.MappingNode) -> list[yaml.Node]:
    """The keys and values; the last of two equal keys would win unseen."""
    names: set[str] = set()
    for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
        if key.value in names:
            raise yaml.MarkedYAMLError(problem=f"{key.value}: set twice", problem_mark=key.start_mark)
        names.add(key.value)
    return [part for pair in mapping.value for part in pair]


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
    """Writes lists of plain values in brackets, and quotes what would not be read back as text, or not on one line."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    is_plain = isinstance(plain_value(value), str) and value.isprintable()
    style = None if is_plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    is_flow = not any(isinstance(item, dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=is_flow)


_RecipeDumper.add_representer(str, _represent_text)
_RecipeDumper.add_representer(list, _represent_list)


def _read_text(path: Path, what: str) -> str:
    """The text of a file. what: it should be, in messages: "recipe"."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such {what} file.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: expected a readable {what} file: {reason}.") from None
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: expected a {what}, got a file of more than {MAX_RECIPE_BYTES:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: expected UTF-8 text, got byte 0x{content[error.start]:02x}.") from None


def _source(text: str, name: str) -> Source:
    node = _compose(text, name)
    source = Source(name=name, data={})
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None and node.value == ""):
        return source
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{name}, line {node.start_mark.line + 1}: expected sections (model:, data:, …), "
            f"got {quoted(_to_data(node, (), source))}."
        )
    source.data.update(_to_data(node, (), source))
    return source


def _compose(text: str, name: str) -> yaml.Node | None:
    """The node tree of one YAML document."""
    node: yaml.Node | None = _parse(
        text, name, lambda text: _RecipeLoader(text).get_single_node(), "a plain YAML recipe"
    )
    return node


def _parse(text: str, name: str, read: Callable[[str], Any], what: str) -> Any:
    """What `read` makes of the text; RecipeError with the line where it is not what it should be."""
    try:
        return read(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}" if mark else name
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        is_about_quotes = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError) or "(" in reason
        hint = f" {QUOTES_HINT}." if is_about_quotes else ""
        raise RecipeError(f"{place}: expected {what}: {reason}.{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = chr(error.character) if isinstance(error.character, int) else error.character
        raise RecipeError(f"{name}, line {line}: expected text, got {character!r} ({error.reason}).") from None


def _to_data(node: yaml.Node, location: Location, source: Source) -> Any:
    """Plain data of a node tree; notes the place of every part on the way."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return plain_value(node.value) if node.style is None else node.value
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


def _override_value(text: str) -> Any:
    """A quoted scalar or a bracketed list as YAML; all else as one plain scalar: *.txt and {stdlib} need no quotes."""
    if not text.startswith(("[", '"', "'")):
        return plain_value(text)
    node = _compose(text, "value")
    assert node is not None
    return _to_data(node, (), Source(name="value", data={}))
