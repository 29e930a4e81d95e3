"""A file of prompts: JSON lines of {"prompt": …}, with a "seed" if a row wants its own; other columns are kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infctx.errors import DataError
from infctx.generation.row import Wish


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """columns: the row as it was."""

    prompt: str
    wish: Wish
    columns: dict[str, Any]


def read_prompts(path: Path, wish: Wish, *, largest_seed: int) -> list[PromptRow]:
    """Read the rows; a row without a seed has the wish's plus its number, from 0.

    Raises: DataError naming the file and line of a row that is none.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected a JSON object on each line, got {str(error)[:100]!r}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{where}: expected {{"prompt": "some text"}}, got {str(row)[:80]}.')
        seed = row.get("seed", (wish.seed + len(rows)) % (largest_seed + 1))
        if type(seed) is not int or not 0 <= seed <= largest_seed:
            raise DataError(f'{where}: "seed": expected a whole number from 0 to {largest_seed}, got {seed!r:.40}.')
        rows.append(PromptRow(prompt=row["prompt"], wish=replace(wish, seed=seed), columns=row))
    if not rows:
        raise DataError(f"{path}: has no rows.")
    return rows
