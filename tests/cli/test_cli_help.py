"""Help, the JSON of each command, and train.py."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMANDS = {
    "train": ["train"],
    "check": ["check"],
    "data": ["data"],
    "eval": ["eval"],
    "export": ["export"],
    "generate": ["generate"],
    "chat": ["chat"],
    "model new": ["model", "new"],
    "model info": ["model", "info"],
    "model upgrade": ["model", "upgrade"],
    "model grow": ["model", "grow"],
    "model vocabulary": ["model", "vocabulary"],
    "model merge": ["model", "merge"],
    "model convert": ["model", "convert"],
    "adapter import": ["adapter", "import"],
    "adapter export": ["adapter", "export"],
    "adapter info": ["adapter", "info"],
    "bench kernels": ["bench", "kernels"],
    "doctor": ["doctor"],
    "recipe-schema": ["recipe-schema"],
    "recipe-from-infctx": ["recipe-from-infctx"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_uses_what_is_listed(cli: Any, command: str) -> None:
    help_text = cli(*COMMANDS[command], "--help").ok().out
    found = re.search(r"Example: (infctx .*(?:\n +\S.*)*)", help_text)
    assert found, help_text
    words = shlex.split(" ".join(found[1].split()), comments=False)
    assert words[1 : 1 + len(COMMANDS[command])] == COMMANDS[command]
    above = help_text[: found.start()]
    for word in words:
        if word.startswith("--"):
            assert word in above, f"{word} is in the example only"
    assert "--json" in above


def test_help_of_everything_names_every_command(cli: Any) -> None:
    top, below = cli("--help").ok().out, cli("model", "--help").ok().out
    for name in (
        "train",
        "check",
        "data",
        "eval",
        "export",
        "generate",
        "chat",
        "model",
        "adapter",
        "bench",
        "doctor",
        "recipe-schema",
    ):
        assert re.search(rf"^\s*{name}\b", top, re.M), name
    for name in ("new", "info", "upgrade", "grow", "vocabulary", "merge"):
        assert re.search(rf"^\s*{name}\b", below, re.M), name


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(fresh_process: Any, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom infctx.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'lightning', 'peft', 'safetensors', 'numpy')\n"
        "print('HEAVY', [name for name in heavy if name in sys.modules])\n"
    )
    assert "HEAVY []" in fresh_process("-c", code).ok().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["doctor", "--nonsense"], ["model", "old"], []])
def test_usage_error(cli: Any, arguments: list[str]) -> None:
    ended = cli(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err


def test_train_py_is_infctx_train(
    cli: Any, fresh_process: Any, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe()
    script = Path(__file__).parents[2] / "train.py"
    there = fresh_process(script, recipe, f"run.folder={tmp_path / 'there'}", "--json", cwd=tmp_path).ok()
    here = cli("train", recipe, f"run.folder={tmp_path / 'here'}", "--json").ok()
    assert {**there.json, "folder": ""} == {**here.json, "folder": ""}
    assert there.json["folder"] == str(tmp_path / "there")
    final = "checkpoints/step-000004/trainable.safetensors"
    assert (tmp_path / "there" / final).read_bytes() == (tmp_path / "here" / final).read_bytes()


def test_json_of_train(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(data={"validation": 0.2})
    ended = cli("train", recipe, "--json").ok()
    result = ended.json
    assert ended.out.count("\n") == 1
    assert result.keys() >= {"steps", "train_loss", "val_loss", "tokens", "folder"}
    assert result["steps"] == 4
    assert result["tokens"] == 4 * 2 * 16
    assert result["folder"] == str(tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result["train_loss"] == metrics[-1]["loss"]
    assert result["val_loss"] == metrics[-1]["val_loss"]
    assert "step 4/4" in ended.err
    again = cli("train", recipe, "--json").ok()
    assert again.json == result


def test_json_of_check_and_data(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, rows: Path) -> None:
    recipe = make_recipe()
    assert cli("check", recipe, "--json").ok().json
    account = cli("data", recipe, "--json").ok().json
    texts = [json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines()]
    tokens = sum(len(text.encode()) + 1 for text in texts)
    assert account["documents"] == len(texts)
    assert account["rejected_rows"] == []
    assert account["tokens"] == {"in": tokens, "trained": tokens - len(texts), "masked": len(texts), "dropped": 0}
    assert not (tmp_path / "run").exists()


def test_ledger_does_not_call_held_out_tokens_trained(cli: Any, make_recipe: Callable[..., Path]) -> None:
    everything = cli("data", make_recipe(), "--json").ok().json["tokens"]
    half = cli("data", make_recipe(data={"validation": 0.5}), "--json").ok().json["tokens"]
    assert half["in"] == half["trained"] + half["masked"] + half["dropped"]
    assert half["trained"] < everything["trained"]


def test_json_of_export_generate_and_model(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    exported = cli("export", models["pth"], "--format", "safetensors", "--output", output, "--json").ok()
    assert exported.json.keys() >= {"path", "format", "max_logit_difference"}
    assert exported.json["path"] == str(output)
    assert exported.json["format"] == "safetensors"
    assert str(output) in exported.err
    generated = cli("generate", models["pth"], "--prompt", "ab", "--max-tokens", 3, "--json").ok().json
    assert isinstance(generated["text"], str)
    made = cli("model", "new", "--layers", 2, "--channels", 16, "--head-size", 8, "--vocab", 257,
               "--output", tmp_path / "new.pth", "--json").ok().json  # fmt: skip
    info = cli("model", "info", tmp_path / "new.pth", "--json").ok().json
    assert info["parameters"] == made["parameters"] > 0
    wanted = {"version": "6", "n_layer": 2, "n_embd": 16, "vocab_size": 257, "head_size": 8, "n_head": 2}
    assert {key: info[key] for key in wanted} == wanted


def test_json_of_doctor_and_schema(cli: Any) -> None:
    assert cli("doctor", "--json").ok().json["versions"]["torch"]
    schema = cli("recipe-schema", "--json").ok()
    assert schema.json["properties"].keys() >= {"model", "data", "adapter", "bptt", "optimizer", "run"}
    assert schema.out.count("\n") == 1
    assert cli("recipe-schema").ok().json == schema.json


@pytest.mark.parametrize("command", ["check", "data", "doctor", "recipe-schema", "info", "generate"])
def test_people_are_answered_on_stdout(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], command: str
) -> None:
    """What was asked for goes to stdout, so that it can be piped; a run's progress and the speed do not."""
    arguments = {
        "check": ["check", make_recipe()],
        "data": ["data", make_recipe()],
        "info": ["model", "info", models["pth"]],
        "generate": ["generate", models["pth"], "--prompt", "a", "--max-tokens", 2],
    }.get(command, [command])
    ended = cli(*arguments).ok()
    assert ended.out.strip()
    assert ended.err.count("\n") == (command == "generate")
    assert ("tokens/s" in ended.err) == (command == "generate")


def test_people_see_of_a_run_on_stderr_only(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    ended = cli("train", make_recipe()).ok()
    assert ended.out == ""
    assert "step 4/4" in ended.err
    assert str(tmp_path / "run") in ended.err


@pytest.mark.parametrize("command", ["check", "data", "generate"])
def test_terminals_without_utf8(
    forks: Any, make_recipe: Callable[..., Path], models: dict[str, Path], command: str
) -> None:
    """Text the terminal cannot show is no reason to fail."""
    arguments = [make_recipe()]
    if command == "generate":
        arguments = [models["pth"], "--prompt", "世界 é", "--max-tokens", 20, "--seed", 1]
    assert forks.start(command, *arguments, encoding="ascii").wait().ok().out.strip()
