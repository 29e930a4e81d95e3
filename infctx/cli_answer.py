"""How commands answer: people on stderr, one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def say(text: str) -> None:
    """Tell a person, on stderr."""
    with contextlib.suppress(OSError, ValueError):  # Nobody may be reading any more.
        print(text, file=sys.stderr)


def answer(result: dict[str, Any], as_json: bool) -> None:
    """Print the result as JSON, if that was asked for."""
    if as_json:
        print(json.dumps({key: _json_value(value) for key, value in result.items()}, allow_nan=False))


def _json_value(value: object) -> object:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: object) -> str:
    """A fact in words."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
