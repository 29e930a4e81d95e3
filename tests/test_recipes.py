"""Every recipe of the project can be read."""

from pathlib import Path

import pytest

from infctx.recipe.load import load_recipe, recipe_differences, write_recipe

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 0
    assert list(FOLDER.rglob("*.yml")) == [], "one ending for all, so that none is missed here"


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(FOLDER)) for path in RECIPES])
def test_recipe_loads_and_survives_its_run_folder(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert recipe_differences(load_recipe(tmp_path / "recipe.yaml"), recipe) == []


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(FOLDER)) for path in RECIPES])
def test_recipe_says_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# "), "a recipe begins with its purpose, hardware and figures"
