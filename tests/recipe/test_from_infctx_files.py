"""What recipe-from-infctx refuses, hostile YAML included, and how it writes."""

import os
from pathlib import Path
from typing import Any

import pytest

from infctx.errors import RecipeError
from infctx.recipe.from_infctx import translate_config, write_translation
from infctx.recipe.load import MAX_RECIPE_BYTES, load_recipe, read_foreign_yaml


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got an empty file"),
        ("# nothing\n", "got an empty file"),
        ("- a\n- b\n", "got a list"),
        ("just words\n", "got just words"),
        ("name: ci\njobs: {}\n", "got name, jobs"),
        ("model: {path: m.pth}\nrun: {folder: x}\n", "a recipe of infctx already"),
        ("optimizer: {lr: 1}\n", "a recipe of infctx already"),
        ("data: 3\n", "data: expected a section"),
        ("trainer: [a]\n", "trainer: expected a section"),
        ("dataset: {a: 1}\n", "dataset: expected a list of sets"),
        ("dataset: []\n", "dataset: expected a list of sets"),
        ("datapack: {}\ndataset: [1]\n", "dataset: expected a list of sets"),
        ("dataset: [" + "{source: a}, " * 256 + "]", "at most 255 sets, got 256"),
        ("a: {b: 1\n", "line 2: expected a YAML config"),
        ("data: {}\nmodel: {}\ndata: {}\n", "line 3: expected a YAML config: data: set twice"),
        ("model: !!python/object/apply:os.system [exit]\n", "could not determine a constructor"),
        ("model: {lr_init: !!int ''}\n", "expected a YAML config"),
        ("model: {lr_init: 2024-99-01}\n", "expected a YAML config"),
        ("model: {lr_init: " + "9" * 5000 + "}\n", "expected a YAML config"),
        ("[" * 20_000, "expected a YAML config"),
        ("a: &a [*a]\n", "more than 100,000 values"),
        ("model: {? [a] : 1}\n", "unhashable key"),
        ("---\na: 1\n---\nb: 1\n", "single document"),
        ("model: {load_model: \x00}\n", "expected text"),
        ('model: {load_model: "\\ud800"}\n', "model.path: expected valid text"),
        ("data:\n" + "".join(f"  key_{i}: 1\n" for i in range(30_000)), "more than a recipe can hold"),
    ],
)
def test_what_is_no_config_is_refused_briefly(config: Any, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        config.raw(text)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(tmp_path / "config.yaml") in str(caught.value)


@pytest.mark.parametrize("link", ["[*a{0}, *a{0}]", "{{<<: [*a{0}, *a{0}]}}"])
def test_bombs_of_aliases_are_not_built(config: Any, link: str) -> None:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {link.format(i - 1)}" for i in range(1, 60)]
    with pytest.raises(RecipeError, match="more than 100,000 values"):
        config.raw("\n".join(lines))


def test_anchors_merges_and_yaml_1_1(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: yes, y: 1e-5}\nb: {<<: *a, y: 010}\n")
    assert read_foreign_yaml(path) == {"a": {"x": True, "y": "1e-5"}, "b": {"x": True, "y": 8}}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"a: \xff")
    for path, says in [
        (big, "more than 1,000,000 bytes"),
        (bad, "expected UTF-8"),
        (tmp_path / "none.yaml", "no such config file"),
        (tmp_path, "expected a readable config file"),
    ]:
        with pytest.raises(RecipeError, match=says):
            translate_config(path)


@pytest.mark.parametrize("character", ["\n", "\r", "\x85", "\u2028", "\u2029"])
def test_no_value_can_end_a_comment(config: Any, character: str) -> None:
    evil = f"x{character}run: {{folder: evil}}{character}"
    translation = config.translate(
        trainer={"default_root_dir": evil}, data={"odd": evil, "source": evil, f"k{character}y": 1}, **{evil: {}}
    )
    recipe = config.load(translation)
    assert recipe.run.folder == "runs/config"
    assert recipe.data.path == evil
    assert len(translation.of_kind("unknown")) == 3


def test_values_that_no_recipe_takes_stay_out(config: Any) -> None:
    translation = config.translate(model={"ctx_len": "many", "beta1": 3, "lr_init": -1})
    recipe = config.load(translation)
    assert recipe.bptt.chunk_tokens == 1024
    assert config.of(translation, "model.ctx_len") == (
        "without_counterpart",
        "Not a value that can be translated: many.",
    )
    assert "optimizer.lr" in translation.to_fill_in


# Writing


def test_writing(config: Any, tmp_path: Path) -> None:
    translation = config.translate()
    source, output = tmp_path / "config.yaml", tmp_path / "out.yaml"
    write_translation(translation, output, config=source, force=False)
    assert output.read_text() == translation.text
    assert load_recipe(output).model.path == "m.pth"
    output.write_text("mine")
    for path, force, says in [
        (output, False, "exists already"),
        (tmp_path / "no" / "x.yaml", False, "there is no folder"),
        (tmp_path, True, "got a folder"),
        (source, True, "the config itself"),
    ]:
        with pytest.raises(RecipeError, match=says):
            write_translation(translation, path, config=source, force=force)
    assert output.read_text() == "mine"
    write_translation(translation, output, config=source, force=True)
    assert output.read_text() == translation.text


def test_writing_is_whole_or_not_at_all(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translation = config.translate()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_translation(translation, tmp_path / "out.yaml", config=tmp_path / "config.yaml", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]
