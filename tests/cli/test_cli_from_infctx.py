"""infctx recipe-from-infctx: what is printed, written and refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infctx.recipe.load import load_recipe

CONFIG = """\
seed_everything: 7
trainer:
  max_epochs: 2
  strategy: deepspeed_stage_2
  target_batch_size: 8
model:
  load_model: base.pth
  ctx_len: 512
  lr_init: 1e-4
  position_loss_bias: 0.5
data:
  source: json
  source_data_dir: ../rows/
  multi_colum_keys: [a, b]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_printed(cli: Any, config: Path, tmp_path: Path) -> None:
    ended = cli("recipe-from-infctx", config).ok()
    printed = tmp_path / "printed.yaml"
    printed.write_text(ended.out, encoding="utf-8")
    recipe = load_recipe(printed)
    assert (recipe.model.path, recipe.bptt.chunk_tokens, recipe.run.accumulate) == ("base.pth", 512, 8)
    for line in ("- model.position_loss_bias: 0.5. ", "multi_column_keys?"):
        assert line in ended.err
    assert re.search(r"\nKeys: 11\. Translated: 9\. .* Without a counterpart: 1\. Unknown: 1\.\n$", ended.err)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "printed.yaml"}


def test_written_and_as_json(cli: Any, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "my.yaml"
    ended = cli("recipe-from-infctx", config, "--output", output, "--json").ok()
    assert ended.out.count("\n") == 1
    answer = ended.json
    assert answer["path"] == str(output)
    assert answer["recipe"] == output.read_text(encoding="utf-8")
    assert {"key": "model.ctx_len", "value": 512, "to": "bptt.chunk_tokens: 512"} in answer["translated"]
    assert [one["key"] for one in answer["without_counterpart"]] == ["model.position_loss_bias"]
    assert all(one["reason"] for one in answer["without_counterpart"])
    assert answer["unknown"][0]["key"] == "data.multi_colum_keys"
    assert load_recipe(output).run.seed == 7
    assert f"Wrote {output}." in ended.err
    assert cli("recipe-from-infctx", config, "--json").ok().json["path"] is None


def test_what_is_there_stays_without_force(cli: Any, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "my.yaml"
    output.write_text("mine")
    cli("recipe-from-infctx", config, "--output", output).refused(str(output), "--force")
    assert output.read_text() == "mine"
    cli("recipe-from-infctx", config, "--output", output, "--force").ok()
    assert load_recipe(output).run.epochs == 2
    cli("recipe-from-infctx", config, "--output", config, "--force").refused("the config itself")
    assert config.read_text() == CONFIG


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such config file"]),
        ("", ["empty file"]),
        ("- a\n", ["a list"]),
        ("a: [1\n", ["line 2", "YAML"]),
        ("model: {path: m.pth}\nrun: {folder: x}\n", ["a recipe of infctx already"]),
        ("x" * 1_000_001, ["1,000,000 bytes"]),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bad_input(
    cli: Any, tmp_path: Path, snapshot: Callable[..., Any], text: str | None, words: list[str], options: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    before = snapshot(tmp_path)
    output = tmp_path / "my.yaml"
    cli("recipe-from-infctx", path, "--output", output, *options).refused(str(path), *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("output", "words"), [("none/my.yaml", ["there is no folder"]), (".", ["got a folder"])])
def test_bad_output(cli: Any, config: Path, tmp_path: Path, output: str, words: list[str]) -> None:
    cli("recipe-from-infctx", config, "--output", tmp_path / output, "--json").refused(*words)


def test_a_written_recipe_is_refused_as_a_config(cli: Any, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "my.yaml"
    cli("recipe-from-infctx", config, "--output", output).ok()
    cli("recipe-from-infctx", output).refused("a recipe of infctx already")


def test_help(cli: Any) -> None:
    text = cli("recipe-from-infctx", "--help").ok().out
    assert "Example: infctx recipe-from-infctx config.yaml --output my.yaml" in " ".join(text.split())
    assert all(option in text for option in ("--output", "--force", "--json"))
    assert re.search(r"^\s*recipe-from-infctx\b", cli("--help").ok().out, re.M)


def test_nothing_heavy_is_imported(fresh_process: Any, config: Path) -> None:
    code = (
        "import sys\nfrom infctx.cli import main\n"
        f"try:\n    main(['recipe-from-infctx', {str(config)!r}])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [name for name in ('torch', 'lightning', 'peft', 'numpy') if name in sys.modules])\n"
    )
    assert "HEAVY []" in fresh_process("-c", code).ok().out
