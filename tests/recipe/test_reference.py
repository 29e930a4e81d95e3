"""The page about every key is the schema's, and complete."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from infctx.recipe.data_section import PieceSection, SetSection, SourceSection, TemplateSection
from infctx.recipe.problems import known_keys
from infctx.recipe.reference import recipe_reference
from infctx.recipe.schema import Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"


def rows_of(page: str) -> dict[str, list[str]]:
    """Heading.key -> the other cells."""
    rows, heading = {}, ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
            assert len(cells) == 4, line
            rows[f"{heading}.{cells[0].strip('`')}"] = cells[1:]
    return rows


def test_the_page_in_the_docs_is_that_of_the_schema() -> None:
    message = "run: infctx recipe-schema --markdown > docs/recipe.md"
    assert PAGE.read_text(encoding="utf-8") == recipe_reference(), message


def test_every_key_has_a_row() -> None:
    rows = rows_of(recipe_reference())
    assert set(known_keys()) <= rows.keys()
    for name, nested in (("data.template", TemplateSection), ("data.template.pieces", PieceSection)):
        headings = {key.rpartition(".")[2] for key in rows if key.startswith(name)}
        assert set(nested.model_fields) <= headings
    of_sets = {key.rpartition(".")[2] for key in rows if key.startswith("data.sets,")}
    assert of_sets == set(SetSection.model_fields) - set(SourceSection.model_fields)
    assert all(values and default and len(meaning) >= 20 for values, default, meaning in rows.values())


def test_cells_say_what_the_schema_says() -> None:
    rows = rows_of(recipe_reference())
    assert rows["optimizer.lr"][:2] == ["number > 0", "none: required"]
    assert rows["optimizer.betas"][:2] == ["list of 2 × number ≥ 0, < 1", "`[0.9, 0.99]`"]
    assert rows["optimizer.ema_decay"][:2] == ["number > 0, < 1 or null", "null"]
    assert rows["optimizer.lr_multipliers"][:2] == ["any number of text: number > 0", "`{}`"]
    assert rows["bptt.window"][:2] == ["whole number ≥ 1 or `document`", "`document`"]
    assert rows["bptt.thin_boundaries"][:2] == ["true or false", "`false`"]
    assert rows["data.max_tokens"][0] == "whole number ≥ 2 or null"
    assert rows["data.template"][0].endswith("or keys of its own, below")
    names = get_args(Recipe.model_fields["optimizer"].annotation.model_fields["name"].annotation)
    assert rows["optimizer.name"][0] == " or ".join(f"`{name}`" for name in names)
