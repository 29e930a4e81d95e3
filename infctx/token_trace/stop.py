"""A stop on a token's way: where in the code it is, and what is seen there."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import infctx


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """One of the ten.

    Attributes:
        number: from 1.
        title: in a few words.
        code: what does the work here.
        values: what is seen, as JSON values.
    """

    number: int
    title: str
    code: Callable[..., Any]
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CodePlace:
    """Where a function is. file: from the folder that holds the package; name: with its class; line: from 1."""

    file: str
    name: str
    line: int


def code_place(code: Callable[..., Any]) -> CodePlace:
    """Find a function in its source, as it is now."""
    function = inspect.unwrap(code)
    path = Path(inspect.getsourcefile(function) or "?").resolve()
    above = Path(infctx.__file__).resolve().parent.parent
    # The kernels lie beside the package in a checkout, and among other packages where they are installed.
    file = path.relative_to(above) if path.is_relative_to(above) else Path(*path.parts[-3:])
    return CodePlace(file=file.as_posix(), name=function.__qualname__, line=inspect.getsourcelines(function)[1])


def stops_as_json(stops: Sequence[Stop]) -> dict[str, Any]:
    """{"stops": [{"number", "title", "where": "file:function", "line", "values"}]}; what is not finite is null."""
    told = []
    for stop in stops:
        place = code_place(stop.code)
        told.append(
            {
                "number": stop.number,
                "title": stop.title,
                "where": f"{place.file}:{place.name}",
                "line": place.line,
                "values": _json_value(stop.values),
            }
        )
    return {"stops": told}


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
