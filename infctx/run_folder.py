"""What a run folder says of the run that began in it, and the recipe as it goes on there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from infctx.errors import RecipeError
from infctx.recipe.load import RECIPE_FILE, load_recipe, recipe_differences
from infctx.recipe.schema import Recipe
from infctx.run_data import data_from_anywhere
from infctx.spread import data_ranks

RESULT_FILE = "result.json"
RESULT_KEYS = ("steps", "train_loss", "val_loss", "first_val_loss", "tokens", "folder")

# Where things are kept and for how long, and how the work is spread; nothing that is computed. Of rows and accumulate
# the product with the ranks stays, see `_with_as_many_rows`.
FREE_KEYS = (
    "bptt.activations",
    "bptt.boundaries",
    "bptt.thin_boundaries",
    "data.cache",
    "data.workers",
    "run.accumulate",
    "run.checkpoint_minutes",
    "run.deepspeed",
    "run.devices",
    "run.hang_seconds",
    "run.keep_checkpoints",
    "run.loggers",
    "run.num_nodes",
    "run.offload",
    "run.report",
    "run.rows",
    "run.strategy",
    "run.time_parallel",
    "run.wandb",
)


def from_anywhere(recipe: Recipe) -> Recipe:
    """The same recipe with paths that mean the same file from every working directory."""

    def located(path: str) -> str:
        path = os.path.expanduser(path)
        return path if path.startswith("{") else os.path.abspath(path)

    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": located(recipe.model.path)}),
            "data": data_from_anywhere(recipe.data),
            "run": recipe.run.model_copy(update={"folder": os.path.expanduser(recipe.run.folder)}),
        }
    )


def as_begun(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe as it goes on in this folder; refuses a folder of another recipe, or of something else.

    What the recipe leaves open (precision, backend, tokenizer) stays what it was when the run began. What changes no
    number (FREE_KEYS) may be changed: a run whose disk was full has to go on with other ones.
    """
    used = folder / RECIPE_FILE
    if used.is_file():
        begun = load_recipe(used)
        recipe = _filled_in(recipe, begun)
        # The folder may have been moved, or be spelt in another way.
        in_its_folder = recipe.run.model_copy(update={"folder": begun.run.folder})
        differences = recipe_differences(begun, recipe.model_copy(update={"run": in_its_folder}), but_not=FREE_KEYS)
        if differences:
            raise RecipeError(
                f"{folder}: this run folder was made with another recipe:\n  "
                + "\n  ".join(differences)
                + "\nGive another run.folder, use the old values, or start beside it with --fresh."
            )
        return _with_as_many_rows(recipe, begun)
    if folder.exists() and (not folder.is_dir() or any(entry.name != ".lock" for entry in folder.iterdir())):
        raise RecipeError(f"run.folder: {folder} exists and is not a run folder. Give a new one.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RecipeError(f"run.folder: {folder} cannot be made: {above} is not a folder that can be written.")
    return recipe


def _filled_in(recipe: Recipe, begun: Recipe) -> Recipe:
    """The recipe with what was chosen when the run began, where it says auto and the choice decides about numbers."""
    sections = {}
    for name, key in (("data", "tokenizer"), ("run", "precision"), ("kernel", "backend")):
        now, then = getattr(recipe, name), getattr(begun, name)
        sections[name] = now.model_copy(update={key: getattr(then, key)}) if getattr(now, key) == "auto" else now
    return recipe.model_copy(update=sections)


def _with_as_many_rows(recipe: Recipe, begun: Recipe) -> Recipe:
    """The recipe with as many groups of rows as make up the steps this run began with: ranks may come and go.

    Raises: RecipeError where they cannot.
    """
    rows_then = begun.run.rows * begun.run.accumulate * data_ranks(begun)
    at_once = recipe.run.rows * data_ranks(recipe)
    if at_once * recipe.run.accumulate == rows_then:
        return recipe
    if rows_then % at_once or recipe.run.accumulate != begun.run.accumulate:
        raise RecipeError(
            f"run.rows × run.accumulate × ranks: {rows_then} in the run folder, {recipe.run.rows} × "
            f"{recipe.run.accumulate} × {data_ranks(recipe)} now. A run keeps the rows of its steps: give run.rows and "
            "devices whose product divides them and leave run.accumulate as it was, or start beside it with --fresh."
        )
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"accumulate": rows_then // at_once})})


def as_kept(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe as it is written into its folder: rows, and how it is spread, stay what the run began with.

    Of these the rows of its steps are counted, however often it goes on with others.
    """
    used = folder / RECIPE_FILE
    if not used.is_file():
        return recipe
    begun = load_recipe(used).run
    keys = ("rows", "accumulate", "devices", "num_nodes", "time_parallel", "strategy", "offload", "deepspeed")
    run = recipe.run.model_copy(update={key: getattr(begun, key) for key in keys})
    return recipe.model_copy(update={"run": run})


def last_checkpoint(folder: Path) -> str:
    """A sentence that names the checkpoint a run would go on from."""
    try:
        latest = (folder / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return "There is no checkpoint of this run yet."
    good = folder / "checkpoints" / latest
    return f"The last good checkpoint is {good}; started again in this folder, the run continues from it."


def beside(recipe: Recipe) -> Recipe:
    """The recipe with a folder that nobody has used."""
    folder = Path(recipe.run.folder)
    number = 2
    while folder.exists():
        folder = Path(f"{recipe.run.folder}-{number}")
        number += 1
    run = recipe.run.model_copy(update={"folder": str(folder)})
    return recipe.model_copy(update={"run": run})


def finished_result(folder: Path) -> dict[str, Any] | None:
    """What a run that has come to its end left in its folder; None for any other."""
    try:
        result = json.loads((folder / RESULT_FILE).read_text())
    except (OSError, ValueError):
        result = None
    # Missing or damaged: the run goes on from its last checkpoint and writes it again.
    return result if isinstance(result, dict) and result.keys() == set(RESULT_KEYS) else None
