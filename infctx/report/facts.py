"""Everything that a report tells, read from the files of a run folder as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infctx.checkpoint.run_lock import is_in_use
from infctx.errors import CheckpointError
from infctx.recipe.load import RECIPE_FILE, load_recipe
from infctx.recipe.schema import Recipe
from infctx.training.metrics import read_metrics

State = Literal["finished", "under way", "stopped"]

MEASURED_FOLDER = "report"
BEFORE_FILE = f"{MEASURED_FOLDER}/before.json"
AFTER_FILE = f"{MEASURED_FOLDER}/after.json"
# Of before.json and after.json; another number is another meaning.
MEASURED_SCHEMA = 1

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """A run as its folder tells it.

    Attributes:
        recipe_text: of recipe.yaml, as it stands there.
        records: one for each step, step 0 (a validation before the first) included where there is one.
        result: of a run that is finished, else None.
        ledger: where every token of the data went; None where the file is missing.
        before, after: what was measured for the report, see `infctx.run_report`; None where it was not.
        checkpoint: name of the newest, None where there is none.
    """

    folder: Path
    recipe: Recipe
    recipe_text: str
    state: State
    records: tuple[Record, ...]
    result: Record | None
    ledger: Record | None
    before: Record | None
    after: Record | None
    checkpoint: str | None

    @property
    def steps(self) -> list[Record]:
        """The records of optimizer steps."""
        return [record for record in self.records if record.get("step", 0) > 0]

    @property
    def last_step(self) -> int:
        """The step that was done last; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None where nothing tells."""
        if self.state == "finished":
            return self.last_step
        return self.recipe.run.steps or _number(self.before or {}, "total_steps")

    @property
    def val_losses(self) -> list[tuple[int, float]]:
        """Step and held-out loss, wherever it was measured."""
        return [
            (int(record["step"]), float(record["val_loss"]))
            for record in self.records
            if record.get("val_loss") is not None
        ]


def read_facts(folder: Path, *, state: State | None = None) -> RunFacts:
    """Read a run folder; nothing in it is changed.

    Args:
        state: of the run; None = as its files and its lock tell.
    Raises:
        CheckpointError: no run folder; its metrics cannot be read.
        RecipeError: its recipe is of another infctx.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise CheckpointError(
            f"{folder}: expected a run folder, found no {RECIPE_FILE} in it. Give the folder of a run."
        )
    result = _read_json(folder / "result.json")
    if state is None:
        state = "under way" if is_in_use(folder) else "finished" if result is not None else "stopped"
    metrics = folder / "metrics.jsonl"
    latest = folder / "checkpoints" / "latest"
    return RunFacts(
        folder=folder,
        recipe=load_recipe(folder / RECIPE_FILE),
        recipe_text=(folder / RECIPE_FILE).read_text(encoding="utf-8"),
        state=state,
        records=tuple(read_metrics(metrics)) if metrics.is_file() else (),
        result=result if state == "finished" else None,
        ledger=_read_json(folder / "ledger.json"),
        before=read_measured(folder / BEFORE_FILE),
        after=read_measured(folder / AFTER_FILE) if state == "finished" else None,
        checkpoint=latest.read_text(encoding="utf-8").strip() if latest.is_file() else None,
    )


def read_measured(path: Path) -> Record | None:
    """What was measured before or after a run; None where it is missing, damaged or of another schema."""
    found = _read_json(path)
    return found if found is not None and found.get("schema") == MEASURED_SCHEMA else None


def _read_json(path: Path) -> dict[str, Any] | None:
    """An object; None for anything else, for a report can do without."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _number(record: Record, key: str) -> int | None:
    value = record.get(key)
    return value if isinstance(value, int) else None
