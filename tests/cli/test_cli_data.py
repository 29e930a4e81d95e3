"""`infctx data`: what is shown, written and refused; and the data of a run through the command line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infctx import run_data
from infctx.data import prepare

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
    for n in range(12)
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in CHATS).encode()))
    return path


@pytest.fixture
def mixture(make_recipe: Callable[..., Path], chats: Path, rows: Path) -> Callable[..., Path]:
    """A recipe over two sets; keyword arguments are keys of its data section."""

    def make(**keys: Any) -> Path:
        sets = [
            {"name": "chats", "path": str(chats), "template": "chat", "share": 1},
            {"name": "texts", "path": str(rows), "share": 2},
        ]
        return make_recipe(data={"path": None, "sets": sets, **keys})

    return make


def test_the_account_adds_up_and_names_the_sets(cli: Any, mixture: Callable[..., Path]) -> None:
    account = cli("data", mixture(validation=0.2), "--json").ok().json
    tokens = account["tokens"]
    assert tokens["in"] == tokens["trained"] + tokens["masked"] + tokens["dropped"]
    assert account["rejected_rows"] == []
    assert [one["name"] for one in account["sets"]] == ["chats", "texts"]
    assert sum(one["tokens"] for one in account["sets"]) == tokens["in"]
    shares = [one["share"] for one in account["sets"]]
    assert shares[1] == pytest.approx(2 * shares[0], rel=0.01)
    assert account["held_out"]["documents"] > 0


def test_what_is_shown(cli: Any, mixture: Callable[..., Path]) -> None:
    shown = cli("data", mixture(), "--show", 2).ok().out
    assert "Assistant:⟦ 0.⟧⟦⏹⟧" in shown
    for heading in ("Sets", "Lengths in tokens", "Ledger", "First step", "Warnings"):
        assert heading in shown


def test_a_page_is_written_whole_and_not_over_another(cli: Any, mixture: Callable[..., Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    cli("data", mixture(), "--html", page).ok()
    content = page.read_text(encoding="utf-8")
    assert content.startswith("<!doctype html>")
    assert str(tmp_path) not in content
    cli("data", mixture(), "--html", page).refused("exists", "--force")
    cli("data", mixture(), "--html", page, "--force").ok()
    cli("data", mixture(), "--html", tmp_path / "no" / "page.html").refused("does not exist")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl.gz", "page.html", "recipe.yaml"]


def test_tokens_for_other_trainers_and_back(
    cli: Any, make_recipe: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "tokens"
    cli("data", make_recipe(), "--binidx", prefix).ok()
    cli("data", make_recipe(), "--binidx", prefix).refused("exists", "--force")
    texts = [json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines()]
    expected = [token for text in texts for token in [*(byte + 1 for byte in text.encode()), 0]]
    assert np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16).tolist() == expected
    account = cli("data", make_recipe(data={"path": str(prefix)}), "--json").refused("no such file")
    account = cli("data", make_recipe(data={"path": str(prefix), "format": "binidx"}), "--json").ok().json
    assert (account["documents"], account["tokens"]["in"]) == (len(texts), len(expected))
    flat = make_recipe(data={"path": f"{prefix}.idx", "rechunk_tokens": 7})
    account = cli("data", flat, "--json").ok().json
    assert (account["documents"], account["tokens"]["in"]) == (-(-len(expected) // 7), len(expected))


def test_masks_lost_in_binidx_are_said(cli: Any, mixture: Callable[..., Path], tmp_path: Path) -> None:
    ended = cli("data", mixture(), "--binidx", tmp_path / "x").ok()
    assert "masked tokens will be trained by others" in ended.err


def test_a_run_over_a_mixture_reports_every_set(cli: Any, mixture: Callable[..., Path], tmp_path: Path) -> None:
    cli("train", mixture(validation=0.2), "--json").ok()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]["val_loss_by_set"]) == {"chats", "texts"}
    steps = [line["sets"] for line in lines[1:]]
    assert sum(one["tokens"] for sets in steps for one in sets.values()) == lines[-1]["tokens"]
    assert {name for sets in steps for name in sets} == {"chats", "texts"}
    assert all(isinstance(one["loss"], float | None) for sets in steps for one in sets.values())


def test_a_cache_and_processes_may_change_between_runs(cli: Any, mixture: Callable[..., Path], tmp_path: Path) -> None:
    cli("train", mixture(), "run.steps=4").ok()
    before = (tmp_path / "run" / "result.json").read_text()
    (tmp_path / "run" / "result.json").unlink()
    cli("train", mixture(cache=str(tmp_path / "cache"), workers=2), "run.steps=4").ok()
    assert (tmp_path / "run" / "result.json").read_text() == before
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("command", ["data", "check", "train"])
def test_a_long_preparation_says_how_far_it_is(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(prepare, "UNIT_BYTES", 100)
    monkeypatch.setattr(run_data, "SECONDS_BETWEEN_LINES", 1e-9)
    recipe = make_recipe(data={"cache": str(tmp_path / "kept"), "workers": 1}, run={"steps": 1})
    assert "preparing data: 0.00 of 0.00 GB" in cli(command, recipe).ok().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_full_is_the_machines_fault_and_loses_nothing(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    texts = [{"text": f"{number} " * 4000} for number in range(200)]
    (tmp_path / "large.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    recipe = make_recipe(
        data={"path": str(tmp_path / "large.jsonl"), "cache": str(tmp_path / "kept"), "workers": workers}
    )
    # No file above 400 KB; Python 3.11.2 would write cut-off bytecode.
    command = f"ulimit -f 400; exec {sys.executable} -B -m infctx data {recipe} --json"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (4, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "The disk failed: File too large" in ended.stderr
    assert cli("data", recipe, "--json").ok().json["documents"] == 200


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"template": "chatt"}, ("data.template", "chat", "line 2")),
        ({"template": {"pieces": [{"text": "{a"}]}}, ("data.template.pieces[0].text", "{column}")),
        ({"max_tokens": 4}, ("more than data.max_tokens=4", "data.on_long")),
        ({"on_long": "cut"}, ("data.on_long", "max_tokens")),
        ({"fields": {"txt": "text"}}, ("data.fields", "text")),
        ({"weights": {"user": 1}}, ("data.weights", "text")),
        ({"train_turns": "last"}, ("data.train_turns=last", "chat")),
        ({"weight_field": "w"}, ("data.weight_field=w", "no such column")),
        ({"tokenizer": "neox"}, ("data.tokenizer",)),
        ({"sets": [{"path": "a"}]}, ("data.path", "data.sets")),
        ({"format": "parquet"}, ("rows.jsonl", "Parquet")),
        ({"min_tokens": 10_000}, ("expected at least one document", "rejected")),
        ({"order": "sorted"}, ("data.order", "length")),
        ({"workers": 0}, ("data.workers",)),
    ],
)
def test_mistakes(cli: Any, make_recipe: Callable[..., Path], keys: dict[str, Any], words: tuple[str, ...]) -> None:
    cli("data", make_recipe(data=keys)).refused(*words)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([{"template": "chat"}], ("data.sets[0]", "path")),
        ([{"path": "a", "share": 1}, {"path": "b"}], ("data.sets", "share")),
        ([{"path": "a", "share": 1, "epochs": 2}], ("data.sets[0]", "exclude each other")),
        ([{"path": "a"}, {"path": "a"}], ("two sets have the same name",)),
        ([{"path": "a", "template_": "chat"}], ("data.sets[0].template_", "unknown key")),
        ([], ("data.sets", "at least 1")),
    ],
)
def test_mistakes_of_sets(
    cli: Any, make_recipe: Callable[..., Path], sets: list[dict[str, Any]], words: tuple[str, ...]
) -> None:
    cli("data", make_recipe(data={"path": None, "sets": sets})).refused(*words)
