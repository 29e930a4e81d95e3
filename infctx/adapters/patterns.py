"""Which parameters a recipe's patterns mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from infctx.errors import RecipeError


def matching_parameters(model: nn.Module, patterns: Sequence[str], *, key: str) -> set[str]:
    """Names of the parameters that match any glob pattern.

    Args:
        key: the recipe key the patterns come from, for the message.
    Raises:
        RecipeError: a pattern matches nothing; names the nearest.
    """
    names = [name for name, _ in model.named_parameters()]
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise RecipeError(f"{key}: {pattern!r} matches no parameter. {nearest_names(pattern, names)}")
        matched |= hits
    return matched


def nearest_names(wanted: str, names: Iterable[str]) -> str:
    """A sentence naming what comes closest, layer numbers aside."""
    distinct = sorted({part for name in names for part in (re.sub(r"\.\d+\.", ".*.", name), name.rsplit(".", 2)[-1])})
    close = difflib.get_close_matches(wanted, distinct, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(close)}." if close else f"There are: {', '.join(distinct[:12])}."
