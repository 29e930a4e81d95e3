"""A page about every key of a recipe, written from the schema, so that it cannot say anything else."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from infctx.recipe.data_section import PieceSection, SetSection, SourceSection, TemplateSection
from infctx.recipe.run_section import WandbSection
from infctx.recipe.schema import Recipe

_INTRODUCTION = """# The keys of a recipe

Written by `infctx recipe-schema --markdown`; without that option, the command gives a JSON schema for editors. A recipe
is a YAML file of these sections, and keys can be set behind a command, as `optimizer.lr=1e-5`. A key without a default
has to be given. A key that is unknown, or that would have no effect beside the others, is an error.
"""
_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", JsonValue: "any value"}
_NESTED: list[tuple[str, type[BaseModel], type[BaseModel] | None]] = [
    ("data.template, of one's own", TemplateSection, None),
    ("data.template.pieces", PieceSection, None),
    ("data.sets, beside the keys of data up to rechunk_tokens, which here are of one set", SetSection, SourceSection),
    ("run.wandb", WandbSection, None),
]


def recipe_reference() -> str:
    """The page, in Markdown: a table for each section with the values, default and meaning of every key."""
    parts = [_INTRODUCTION]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        parts.append(f"## {name}\n\n{field.description}\n\n{_table(section, {})}")
        parts += [
            f"### {heading}\n\n{_table(nested, base.model_fields if base else {})}"
            for heading, nested, base in _NESTED
            if heading.startswith(f"{name}.")
        ]
    return "\n".join(parts)


def _table(section: type[BaseModel], but_not: dict[str, FieldInfo]) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name not in but_not:
            cells = (f"`{name}`", _values(field), _default(field), str(field.description))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _values(field: FieldInfo) -> str:
    """What may stand there, in words."""
    kinds = list(dict.fromkeys(_kinds(field.annotation, field.metadata)))
    return " or ".join(kinds)


def _kinds(kind: Any, limits: list[Any]) -> Iterator[str]:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        # The limits of a part of a union are its own.
        yield from _kinds(inside[0], _flat(inside[1:]) + limits)
    elif origin in (Union, types.UnionType):
        for part in inside:
            yield from _kinds(part, limits if part is not type(None) else [])
    elif origin is Literal:
        yield " or ".join(f"`{value}`" for value in inside)
    elif origin is list:
        yield f"list of {_one(inside[0])}" + _lengths(limits)
    elif origin is tuple:
        yield f"list of {len(inside)} × {_one(inside[0])}"
    elif origin is dict:
        yield f"any number of {_one(inside[0])}: {_one(inside[1])}"
    elif kind is type(None):
        yield "null"
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield "keys of its own, below"
    else:
        yield _NAMES[kind] + (_limits(limits) if kind in (int, float) else "")


def _one(kind: Any) -> str:
    return " or ".join(dict.fromkeys(_kinds(kind, [])))


def _flat(metadata: tuple[Any, ...]) -> list[Any]:
    """Limits may be given one by one or as a field of several."""
    return [limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _limits(limits: list[Any]) -> str:
    """Of a number, in signs: the narrowest of each; those that only keep the machine from overflowing are left out."""
    signs = []
    for kind, sign, narrowest in ((Ge, "≥", max), (Gt, ">", max), (Le, "≤", min), (Lt, "<", min)):
        bounds = [getattr(limit, kind.__name__.lower()) for limit in limits if isinstance(limit, kind)]
        if bounds and abs(narrowest(bounds)) < 1e6:
            signs.append(f"{sign} {narrowest(bounds):g}")
    return f" {', '.join(signs)}" if signs else ""


def _lengths(limits: list[Any]) -> str:
    least = [f"at least {limit.min_length}" for limit in limits if isinstance(limit, MinLen)]
    most = [f"at most {limit.max_length}" for limit in limits if isinstance(limit, MaxLen)]
    return "".join(f", {length}" for length in least + most)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "as below"
    if field.default is PydanticUndefined:
        return "none: required"
    if field.default is None:
        return "null"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, list | tuple):
        return f"`[{', '.join(map(str, field.default))}]`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"
