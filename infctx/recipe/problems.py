"""The problems of a recipe in words: place, key, what was expected, what came, and the key that may have been meant."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from infctx.recipe.schema import Recipe

QUOTES_HINT = "Text that begins with * & ! { [ | > % @ or holds ': ' or ' #' must stand in quotes"

MAX_PROBLEMS = 30
"""More are counted, not listed: a file that is no recipe at all should not fill the screen."""

Location = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The plain data of a recipe and the place each part of it was written at."""

    name: str
    data: dict[str, Any]
    places: dict[Location, str] = field(default_factory=dict)
    line_numbers: dict[Location, int] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """The place of the deepest part of `location` that was written down."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        return self.name

    def line(self, location: Location) -> int:
        """The line of `location` in the file; 0 where there is none, which sorts first."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.line_numbers:
                return self.line_numbers[location[:length]]
        return 0


def describe(error: ValidationError, source: Source) -> list[str]:
    """One line a problem, in the order of the file; the branches of a union are told as one problem."""
    grouped: dict[Location, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        if details["type"] == "recipe":
            for key, problem in details["ctx"]["problems"]:
                grouped.setdefault(_location(key), []).append({**details, "msg": problem})
        else:
            grouped.setdefault(_written_location(details["loc"], source.data), []).append(details)
    # A union tells of a wrong item and of the whole list being no text; the item is the mistake.
    inner = {at[:length] for at in grouped for length in range(2, len(at))}
    order = sorted((at for at in grouped if at not in inner), key=source.line)
    told = [f"{source.place(at)}: {dotted(at)}: {_problem(at, grouped[at])}" for at in order[:MAX_PROBLEMS]]
    return told + ([f"{source.name}: {len(order) - MAX_PROBLEMS} more problems."] if len(order) > MAX_PROBLEMS else [])


def _location(key: str) -> Location:
    """A dotted key, as "data.sets[0].path", in its parts."""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))


def _written_location(location: Location, data: Any) -> Location:
    """The part of pydantic's location that is in the recipe: without the names of union branches and types."""
    written: list[str | int] = []
    for part in location:
        present = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if present:
            written.append(part)
            data = data[part]
        elif len(written) < 2 and isinstance(part, str) and (not written or part in keys_of(str(written[0]))):
            # A missing key is nowhere in the data.
            written.append(part)
            break
    return tuple(written)


def _problem(location: Location, errors: list[ErrorDetails]) -> str:
    first = errors[0]
    if first["type"] == "recipe":
        return f"{first['msg']}."
    if first["type"] == "extra_forbidden":
        return f"unknown key.{suggestion(dotted(location))}"
    if first["type"] == "missing" and len(first["loc"]) > len(location):
        return f"expected more values, got {quoted(first['input'])}. {_description(location)}"
    if first["type"] == "missing":
        return f"missing. {_description(location)}"
    expected = list(dict.fromkeys(_expected(details) for details in errors))
    value = errors[-1]["input"]
    hint = f" {QUOTES_HINT}." if isinstance(value, dict) and len(location) > 1 else ""
    return f"expected {' or '.join(expected)}, got {quoted(value)}.{hint}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_unicode": "valid text",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a section with keys of its own",
    "dict_type": "a section with keys of its own",
}


def _expected(details: ErrorDetails) -> str:
    """What one branch of a field's type wanted."""
    kind, context = details["type"], details.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        signs = {"greater_than": "above", "greater_than_equal": "of at least", "less_than": "below"}
        return f"a number {signs.get(kind, 'of at most')} {next(iter(context.values()))}"
    if kind in ("too_short", "too_long"):
        length = context.get("min_length", context.get("max_length"))
        return f"a list of {'at least' if kind == 'too_short' else 'at most'} {length} values"
    return details["msg"][:1].lower() + details["msg"][1:]


def quoted(value: object) -> str:
    """A value as it should be quoted in an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    value = list(value) if isinstance(value, tuple) else value
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"


def dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _section(name: str) -> type[BaseModel]:
    annotation = Recipe.model_fields[name].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


def keys_of(section: str) -> list[str]:
    return list(_section(section).model_fields) if section in Recipe.model_fields else []


def inner_keys(section: str, key: str) -> list[str]:
    """Of a key that is a section itself, as run.wandb; of others none."""
    annotation = _section(section).model_fields[key].annotation
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return []
    return list(annotation.model_fields)


def known_keys() -> list[str]:
    return [f"{section}.{key}" for section in Recipe.model_fields for key in keys_of(section)]


def _description(location: Location) -> str:
    if len(location) == 1:
        return f"{Recipe.model_fields[str(location[0])].description}"
    return f"{_section(str(location[0])).model_fields[str(location[1])].description}"


def _candidates(key: str) -> Iterator[str]:
    """Known keys in the order in which they may be what was meant by an unknown one."""
    known = known_keys()
    section, _, name = key.rpartition(".")
    section = section.split(".")[0]
    same_name = [other for other in known if other.split(".")[1] == name]
    # The right name in the wrong section comes first, in the section most alike.
    yield from difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)
    if not section:
        yield from difflib.get_close_matches(name, list(Recipe.model_fields), n=1)
    inside = difflib.get_close_matches(name, keys_of(section), n=1)
    yield from (f"{section}.{match}" for match in inside)
    anywhere = difflib.get_close_matches(name, [other.split(".")[1] for other in known], n=1, cutoff=0.75)
    yield from (other for other in known if other.split(".")[1] in anywhere)
    yield from difflib.get_close_matches(key, known, n=1)


def suggestion(key: str) -> str:
    nearest = next(_candidates(key), None)
    if nearest is not None:
        return f" Did you mean {nearest}?"
    section = key.split(".")[0]
    if section in Recipe.model_fields:
        return f" {section} has {', '.join(keys_of(section))}."
    return f" A recipe has {', '.join(Recipe.model_fields)}."
