"""How commands speak: to people on stderr, to programs as one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn, TextIO

import typer

from infctx.errors import InfctxWarning

LARGEST_SEED = 2**63 - 1

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def say(text: str) -> None:
    """Tell a person."""
    with contextlib.suppress(OSError, ValueError):  # Nobody may be reading any more.
        print(text, file=sys.stderr)


@contextlib.contextmanager
def warnings_for_people() -> Iterator[None]:
    """Let our own warnings be one line each, once, without a place in the code; others are as Python shows them."""
    told: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, InfctxWarning):
                show(message, category, filename, lineno, file, line)
            elif str(message) not in told:
                told.add(str(message))
                say(f"Warning: {message}")

        warnings.showwarning = tell
        warnings.simplefilter("always", InfctxWarning)
        yield


def answer(result: dict[str, Any], as_json: bool) -> None:
    """Tell a program, if one asked."""
    if as_json:
        print(json.dumps({key: _json_value(value) for key, value in result.items()}, allow_nan=False))


def shown(value: object) -> str:
    """A fact as a person reads it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


class Left(SystemExit):
    """The end of a command that has told why."""


def leave(code: int, message: str) -> NoReturn:
    """Tell a person why, if there is anything to tell, and end with an exit code."""
    if message:
        say(message)
    raise Left(code)


def _json_value(value: object) -> object:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
