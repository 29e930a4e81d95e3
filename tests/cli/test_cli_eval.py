"""infctx eval: the figures of a run are those of its training, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRecipe = Callable[..., Path]


@pytest.fixture
def run(cli: Any, make_recipe: MakeRecipe, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run that held documents out, and what its training said of itself."""
    recipe = make_recipe(data={"validation": 0.3}, optimizer={"lr": 0.02}, run={"steps": 8})
    return tmp_path / "run", cli("train", recipe, "--json").ok().json


def test_the_loss_of_a_run_is_its_validation_loss(cli: Any, run: tuple[Path, dict[str, Any]]) -> None:
    folder, trained = run
    found = cli("eval", folder, "--json").ok().json
    assert found["loss"] == pytest.approx(trained["val_loss"], abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(trained["val_loss"]), rel=1e-5)
    assert found["documents"] == 4
    assert found["tokenizer"] == "bytes"
    weight = sum(place["weight"] for place in found["positions"])
    total = sum(place["loss"] * place["weight"] for place in found["positions"])
    assert total / weight == pytest.approx(found["loss"])
    # Every byte is a token, and an end of text closes each document.
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / (weight - 4))


def test_before_after_and_forgetting_name_the_models(
    cli: Any, run: tuple[Path, dict[str, Any]], models: dict[str, Path], rows: Path
) -> None:
    folder, trained = run
    found = cli("eval", folder, "--against", models["pth"], "--forgetting", rows, "--rows", 3, "--json").ok().json
    against = found["against"]
    assert against["loss"] == pytest.approx(trained["first_val_loss"], abs=1e-6)
    expected = trained["val_loss"] - trained["first_val_loss"]
    assert against["compared"]["difference"] == pytest.approx(expected, abs=1e-6)
    low, high = against["compared"]["interval"]
    assert low < expected < high < 0
    forgetting = found["forgetting"]
    assert forgetting["compared"]["difference"] < 0
    assert "nothing was forgotten" in forgetting["verdict"]
    # Without --against, before is the model that the run began with, and nothing else is measured.
    alone = cli("eval", folder, "--forgetting", rows, "--json").ok().json
    assert alone["forgetting"]["compared"]["difference"] == pytest.approx(
        forgetting["compared"]["difference"], abs=1e-6
    )
    assert "loss" not in alone
    backwards = cli("eval", models["pth"], "--against", folder, "--forgetting", rows, "--data", rows).ok()
    assert "it forgot" in backwards.out
    assert f"Beside {folder} (before):" in backwards.out


def test_a_reset_state_and_distances(cli: Any, models: dict[str, Path], rows: Path) -> None:
    command = ["eval", models["pth"], "--data", rows, "--reset-tokens", 8, "--distances", "8,4"]
    found = cli(*command, "--json").ok().json
    assert found["reset"]["loss"] != found["loss"]
    difference = found["reset"]["compared"]["difference"]
    assert difference == pytest.approx(found["reset"]["loss"] - found["loss"])
    assert [one["distance"] for one in found["distances"]] == [4, 8]
    told = cli(*command).ok().out
    assert "State set back every 8 tokens" in told
    assert max(map(len, told.splitlines()[1:])) <= 80


def test_a_table_is_within_80_columns(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "long.jsonl"
    texts.write_text("".join(json.dumps({"text": "abc d" * 400}) + "\n" for _ in range(3)))
    told = cli("eval", models["pth"], "--data", texts, "--chunk-tokens", 500).ok().out.splitlines()
    table = told[told.index("") + 1 :]
    assert table[0].split()[:2] == ["tokens", "before"]
    assert [line.split()[0] for line in table[1:]] == [
        "1–15", "16–31", "32–63", "64–127", "128–255", "256–511", "512–1,023", "1,024–2,047",
    ]  # fmt: skip
    assert max(map(len, told)) <= 80 + len(str(models["pth"]))
    assert max(map(len, table)) <= 80


def test_the_recall_map_is_written(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    picture, figures = tmp_path / "map.svg", tmp_path / "found.json"
    command = ["eval", models["pth"], "--recall", "--recall-tokens", "32,16", "--recall-depths", "0,100"]
    command += ["--recall-trials", 2, "--output", picture, "--output", figures]
    ended = cli(*command, "--json").ok()
    cells = ended.json["recall"]["cells"]
    assert [(cell["tokens"], cell["depth"]) for cell in cells] == [(16, 0), (32, 0), (16, 1), (32, 1)]
    assert json.loads(figures.read_text()) == ended.json
    assert picture.read_text().count("<rect") == 4
    cli(*command).refused(f"--output {picture}: exists", "--force")
    assert "key at" in cli(*command, "--force").ok().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["is a model and no run", "--data"]),
        (["--data", "ROWS", "--template", "chat"], ["--template chat", "they fit --template text", "rows.jsonl:1"]),
        (["--data", "ROWS", "--template", "poem"], ["--template poem: expected one of text, completion"]),
        (["--data", "none.jsonl"], ["--data none.jsonl: no such file"]),
        (["--forgetting", "ROWS"], ["--forgetting", "--against"]),
        (["--data", "ROWS", "--distances", "far"], ["--distances far: expected whole numbers from 1"]),
        (["--recall", "--recall-depths", "120"], ["--recall-depths 120", "from 0 to 100"]),
        (["--recall", "--recall-form", "poem"], ["--recall-form poem: expected auto, marker or sentence"]),
        (["--recall", "--recall-tokens", "5"], ["--recall-tokens 5", "needs at least"]),
        (["--data", "ROWS", "--output", "x.txt"], ["ends in .json or .svg"]),
        (["--data", "ROWS", "--output", "x.svg"], ["Add --recall"]),
        (["--data", "ROWS", "--output", "none/x.json"], ["folder none does not exist"]),
        (["--data", "ROWS", "--shots", "2"], ["without --tasks"]),
        (["--data", "ROWS", "--device", "tpu"], ["--device tpu"]),
        (["--data", "ROWS", "--tokenizer", "world"], ["--tokenizer world", "257 rows"]),
    ],
)
def test_what_cannot_be_measured_is_refused(
    cli: Any, models: dict[str, Path], rows: Path, options: list[str], words: list[str]
) -> None:
    cli("eval", models["pth"], *[str(rows) if one == "ROWS" else one for one in options]).refused(*words)


def test_a_file_that_trains_on_nothing_is_refused(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text(json.dumps({"messages": [{"role": "user", "content": "a question"}]}) + "\n")
    cli("eval", models["pth"], "--data", nothing, "--template", "chat").refused("nothing.jsonl:1")
    # Beside rows that fit one that does not is no less refused: the loss would be of other documents than were meant.
    nothing.write_text(json.dumps({"text": "fits"}) + "\n" + json.dumps({"body": "does not"}) + "\n")
    cli("eval", models["pth"], "--data", nothing).refused("nothing.jsonl:2")
    nothing.write_text("")
    cli("eval", models["pth"], "--data", nothing).refused("nothing.jsonl", "no rows")


def test_models_of_other_tokens_are_not_compared(
    cli: Any, models: dict[str, Path], make_finch: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    import infctx

    other = tmp_path / "wide.safetensors"
    infctx.save_model(make_finch(n_layer=1, vocab_size=300), other, format="safetensors")
    cli("eval", models["pth"], "--data", rows, "--against", other).refused("257", "300")


def test_a_run_without_held_out_documents_asks_for_some(cli: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    cli("train", make_recipe()).ok()
    cli("eval", tmp_path / "run").refused("held out no documents", "--data")


def test_tasks_without_the_harness_say_what_to_install(
    cli: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    cli("eval", models["pth"], "--tasks", "any").refused("pip install 'infctx[eval]'")


@pytest.mark.filterwarnings("ignore")
def test_tasks_from_the_command_line(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness", exc_type=ImportError)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"{number} + 1 =", "a": number % 2}) + "\n" for number in range(6))
    )
    (tmp_path / "sums.yaml").write_text(
        "task: tiny_sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: [odd, even]\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n'
    )
    command = ["eval", models["pth"], "--tasks", "tiny_sums", "--tasks-folder", tmp_path, "--limit", 4, "--rows", 3]
    found = cli(*command, "--json").ok().json
    assert 0 <= found["tasks"]["tiny_sums"]["acc"] <= 1
    told = cli(*command).ok().out.splitlines()
    assert told[0].split() == ["task", "figure", "value"]
    assert told[1].split()[:2] == ["tiny_sums", "acc"]
