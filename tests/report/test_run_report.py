"""What a run measures for its report: right numbers, at a bounded price, and never at the price of the run."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infctx import run_report
from infctx.assemble import run_recipe
from infctx.data.document_set import DocumentSet
from infctx.data.tokenizer import BytesTokenizer
from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.recipe.load import load_recipe
from infctx.recipe.schema import Recipe
from infctx.trained import open_trained
from infctx.training.progress import SilentProgress
from infctx.training.signals import StopRequested, StopSignals
from tests.report.test_run_measures import document

MakeFinch = Callable[..., Finch]
MakeRecipe = Callable[..., Recipe]


class Told(SilentProgress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def recipe(tmp_path: Path, make_finch: MakeFinch) -> MakeRecipe:
    """Recipes over one small model and a few documents, each in a run folder of its own."""
    model = make_finch("6", n_layer=2, n_embd=16, vocab_size=257, dim_ffn=24)
    save_model(model, tmp_path / "base.safetensors", format="safetensors", dtype=torch.float32, tokenizer="bytes")
    rows = [{"text": "The quick brown fox jumps over the lazy dog. " * (2 + n % 4)} for n in range(12)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(folder: str, *overrides: str) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"""
model: {{path: '{tmp_path}/base.safetensors'}}
data: {{path: '{tmp_path}/docs.jsonl', validation: 0.3}}
adapter: {{kind: lora, rank: 4, dropout: 0.2}}
bptt: {{chunk_tokens: 32, window: 2}}
optimizer: {{lr: 0.01}}
run: {{folder: '{tmp_path / folder}', steps: 2, rows: 2, validate_every: 2}}
"""
        )
        return load_recipe(file, overrides)

    return build


def stored(recipe: Recipe, name: str) -> dict[str, Any]:
    return json.loads((Path(recipe.run.folder) / "report" / f"{name}.json").read_text())


def weights_of(recipe: Recipe) -> dict[str, bytes]:
    """Weights, optimizer, rows and random numbers of the newest checkpoint."""
    checkpoints = Path(recipe.run.folder) / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.parametrize("options", [(), ("run.precision=bf16", "optimizer.ema_decay=0.5")])
def test_a_run_ends_in_the_same_bits_with_and_without(recipe: MakeRecipe, options: tuple[str, ...]) -> None:
    with_one, without = recipe("with", *options), recipe("without", "run.report=false", *options)
    for one in (with_one, without):
        run_recipe(one, SilentProgress())
    assert len(weights_of(with_one)) >= 4
    assert weights_of(with_one) == weights_of(without)
    assert (Path(with_one.run.folder) / "report.html").is_file()
    assert stored(with_one, "after")["problems"] == []
    assert not (Path(without.run.folder) / "report.html").exists()
    assert not (Path(without.run.folder) / "report").exists()


def test_what_is_measured_is_what_the_models_do(recipe: MakeRecipe, tmp_path: Path) -> None:
    built = recipe("run", "optimizer.lr=0.1", "adapter.dropout=0")
    result = run_recipe(built, SilentProgress())
    before, after = stored(built, "before"), stored(built, "after")
    # All held-out documents fit, so their mean is what the validation of the loop finds.
    assert before["tokens"] == before["held_out_tokens"] <= 1000
    assert before["carried"]["loss"] == pytest.approx(result["first_val_loss"], abs=1e-6)
    assert after["carried"]["loss"] == pytest.approx(result["val_loss"], abs=1e-6)
    assert (before["gain"], before["reset"]) == (None, None)
    assert after["reset_tokens"] == 32
    # Up to the first reset there is no difference, and beyond it there is.
    pairs = list(zip(after["carried"]["positions"], after["reset"]["positions"], strict=True))
    assert all(one["loss"] == pytest.approx(other["loss"], abs=1e-6) for one, other in pairs if one["to"] <= 32)
    beyond = [(one["weight"], other["loss"] - one["loss"]) for one, other in pairs if one["from"] >= 32]
    expected = sum(weight * gain for weight, gain in beyond) / sum(weight for weight, _ in beyond)
    assert after["gain"]["gain"] == pytest.approx(expected, abs=1e-9)
    assert abs(expected) > 1e-4
    assert after["gain"]["interval"][0] <= expected <= after["gain"]["interval"][1]
    # The samples are those of the base and of the merged model, token by token over the whole text.
    for path, measured in ((tmp_path / "base.safetensors", before), (built.run.folder, after)):
        model, sample = open_trained(path).model, measured["samples"][0]
        ids = BytesTokenizer().encode(sample["prompt"]).tolist()
        written = b""
        for _ in range(8):
            logits, _ = model(torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
            written += BytesTokenizer().decode_bytes(ids[-1:])
        assert sample["text"] == codecs.getincrementaldecoder("utf-8")("replace").decode(written)


def test_the_average_is_measured_where_there_is_one(recipe: MakeRecipe) -> None:
    built = recipe("run", "optimizer.ema_decay=0.9", "optimizer.lr=0.1", "adapter.dropout=0")
    result = run_recipe(built, SilentProgress())
    loss = stored(built, "after")["carried"]["loss"]
    assert loss != pytest.approx(result["val_loss"], abs=1e-4)


def test_a_stopped_run_has_a_report_and_measures_its_beginning_once(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [2]

    def count(self: StopSignals) -> int:
        left[0] -= 1
        return 15 if left[0] == 0 else 0

    built = recipe("run", "run.steps=4", "data.validation=0.3")
    straight = recipe("straight", "run.steps=4")
    run_recipe(straight, SilentProgress())
    monkeypatch.setattr(StopSignals, "number", property(count))
    left[0] = 12
    with pytest.raises(StopRequested):
        run_recipe(built, SilentProgress())
    page = (Path(built.run.folder) / "report.html").read_text()
    assert '<span class="state stopped">stopped</span>' in page
    assert "measured at its end" in page
    path = Path(built.run.folder) / "report" / "before.json"
    first, when = path.read_bytes(), path.stat().st_mtime_ns
    run_recipe(built, SilentProgress())
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (first, when)
    assert '<span class="state finished">finished</span>' in (Path(built.run.folder) / "report.html").read_text()
    assert weights_of(built) == weights_of(straight)


def test_a_beginning_that_was_lost_is_measured_as_it_was(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    built = recipe("run")
    run_recipe(built, SilentProgress())
    folder = Path(built.run.folder)
    first = stored(built, "before")
    for name in ("report/before.json", "result.json"):
        (folder / name).unlink()
    weights = weights_of(built)
    run_recipe(built, SilentProgress())
    again = stored(built, "before")
    assert {**first, "seconds": 0, "headline": []} == {**again, "seconds": 0, "headline": []}
    assert weights_of(built) == weights


@pytest.mark.parametrize(
    "broken", ["measure_losses", "write_samples", "choose_documents", "write_report", "tokenizer_by_name"]
)
def test_what_fails_is_a_line_and_not_the_run(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr(run_report, broken, fail)
    built, told = recipe("run"), Told()
    result = run_recipe(built, told)
    assert result["steps"] == 2
    lines = [line for line in told.messages if "the report goes without" in line]
    assert lines == ["the report goes without a part: RuntimeError: no such luck"] * (
        1 if broken == "write_report" else 2
    )
    page = Path(built.run.folder) / "report.html"
    assert page.is_file() == (broken != "write_report")
    if broken in ("measure_losses", "write_samples"):
        assert "Something could not be measured: RuntimeError: no such luck" in page.read_text()
        # The other part is there.
        assert bool(stored(built, "after")["samples"]) == (broken == "measure_losses")
        assert (stored(built, "after")["carried"] is not None) == (broken == "write_samples")


def test_without_held_out_documents_nothing_is_measured(recipe: MakeRecipe) -> None:
    built = recipe("run", "data.validation=null")
    run_recipe(built, SilentProgress())
    assert stored(built, "before")["carried"] is None
    assert "set data.validation" in (Path(built.run.folder) / "report.html").read_text()


def test_the_price_is_bounded(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes over held-out documents read 5 % of what the run reads: 8 steps of 2 rows of 2 x 32 tokens."""
    monkeypatch.setattr(run_report, "FEWEST_TOKENS", 4)
    built = recipe("run", "run.steps=8", "run.validate_every=8")
    run_recipe(built, SilentProgress())
    after = stored(built, "after")
    assert 8 <= 3 * after["tokens"] <= 0.05 * 8 * 2 * 2 * 32
    assert after["is_cut"]


def test_how_much_is_measured() -> None:
    assert [run_report.most_measured(tokens) for tokens in (100, 600_000, 1e12)] == [1000, 10_000, 200_000]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("run.steps=10",), 10 * 2 * 2 * 32),
        (("run.steps=10", "run.accumulate=3"), 10 * 2 * 3 * 2 * 32),
        (("run.steps=null", "run.epochs=3"), 3 * 1000),
        (("run.steps=10", "bptt.window=document"), 10 * 2 * 125),
        (("run.steps=10", "bptt.window=document", "data.pack_tokens=500"), 10 * 2 * 500),
    ],
)
def test_what_a_run_will_read(recipe: MakeRecipe, options: tuple[str, ...], tokens: float) -> None:
    data = SimpleNamespace(
        order=SimpleNamespace(epoch_tokens=1000), training=DocumentSet.of([document(50), document(200)])
    )
    assert run_report.planned_tokens(recipe("run", *options).resolved(), data, data_ranks=1) == tokens  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_told(recipe: MakeRecipe, make_finch: MakeFinch, tmp_path: Path) -> None:
    model = make_finch("6", n_layer=2, n_embd=16, vocab_size=257, dim_ffn=24)
    with torch.no_grad():
        model.head.weight[5] = math.nan
    built = recipe("run")
    save_model(model, tmp_path / "base.safetensors", format="safetensors", dtype=torch.float32, tokenizer="bytes")
    told = Told()
    run_recipe(built, told)
    problems = stored(built, "before")["problems"]
    assert len(problems) == 2
    assert all("not finite" in problem for problem in problems)
    assert (Path(built.run.folder) / "report.html").is_file()
