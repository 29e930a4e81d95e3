"""A run that is stopped anywhere and continued ends in the same bits as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from infctx.assemble import open_trained, run_recipe
from infctx.checkpoint.run_state import load_run_state
from infctx.errors import CheckpointError, InfctxError, RecipeError
from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.recipe.load import load_recipe
from infctx.recipe.schema import Recipe
from infctx.training.metrics import read_metrics
from infctx.training.progress import SilentProgress
from infctx.training.signals import StopRequested, StopSignals

MEASURED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


@pytest.fixture
def recipe(tmp_path: Path, make_finch: Callable[..., Finch]) -> Callable[..., Recipe]:
    """Builds recipes over one small model and a few documents, each in a run folder of its own."""
    model = make_finch("6", n_layer=2, n_embd=16, vocab_size=257, dim_ffn=24)
    save_model(model, tmp_path / "base.safetensors", format="safetensors", dtype=torch.float32, tokenizer="bytes")
    rows = [{"text": "The quick brown fox jumps over the lazy dog. " * n} for n in (1, 3, 2, 5, 1)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(folder: str, *overrides: str) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"""
model: {{path: '{tmp_path}/base.safetensors'}}
data: {{path: '{tmp_path}/docs.jsonl', validation: 0.2}}
bptt: {{chunk_tokens: 16, window: 3}}
optimizer: {{lr: 0.01, warmup_steps: 2, schedule: cosine}}
run: {{folder: '{tmp_path / folder}', steps: 5, rows: 2, checkpoint_every: 2, validate_every: 2}}
"""
        )
        return load_recipe(file, overrides)

    return build


KINDS = {
    "stream": (),
    "lora with dropout": ("adapter.kind=lora", "adapter.rank=4", "adapter.dropout=0.2"),
    "documents, accumulated": ("bptt.window=document", "run.rows=1", "run.accumulate=2"),
    "documents, states on disk, thinned": ("bptt.window=document", "bptt.boundaries=disk", "bptt.thin_boundaries=true"),
    "bf16": ("run.precision=bf16", "adapter.kind=lora", "adapter.rank=4"),
}


def outcome(recipe: Recipe) -> dict[str, object]:
    """Everything that must not depend on interruptions."""
    folder = Path(recipe.run.folder)
    checkpoint = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    facts = json.loads((checkpoint / "state.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    del result["folder"]
    metrics = [{key: line[key] for key in MEASURED if key in line} for line in read_metrics(folder / "metrics.jsonl")]
    return {
        "weights": (checkpoint / "trainable.safetensors").read_bytes(),
        "optimizer": (checkpoint / "optimizer.safetensors").read_bytes(),
        "rows": (checkpoint / "rows.safetensors").read_bytes(),
        "random": (checkpoint / "random.safetensors").read_bytes(),
        "result": result,
        "cursor": facts["cursor"],
        "metrics": metrics,
    }


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Lets a run be stopped at its n-th chunk, of training or validation, as a signal there would."""
    left: list[int | None] = [None]

    def count(self: StopSignals) -> None:
        if left[0] is not None:
            if left[0] == 0:
                raise StopRequested("SIGTERM")
            left[0] -= 1

    monkeypatch.setattr(StopSignals, "raise_if_requested", count)

    def set_stop(chunks: int | None) -> None:
        left[0] = chunks

    return set_stop


@pytest.mark.parametrize("kind", list(KINDS))
def test_stopped_at_any_chunk_and_continued_is_bit_identical(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], kind: str
) -> None:
    straight = recipe("straight", *KINDS[kind])
    run_recipe(straight, SilentProgress())
    expected = outcome(straight)
    stops = 0
    # A step of growing length after another: the first chunk, inside windows, between groups, inside validations.
    for distance in (1, 5, 12):
        stopped = recipe(f"stopped-{distance}", *KINDS[kind])
        while True:
            stop_after(distance if stops < 40 else None)
            try:
                result = run_recipe(stopped, SilentProgress())
                break
            except StopRequested:
                stops += 1
                distance += 1  # A stop at every first chunk would never get anywhere.
        stop_after(None)
        assert result["already_finished"] is False
        assert not Path(stopped.run.folder, "boundaries").exists()
        assert outcome(stopped) == expected
    assert stops > 5


def test_two_runs_of_a_recipe_are_bit_identical_and_another_seed_is_not(recipe: Callable[..., Recipe]) -> None:
    results = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        built = recipe(folder, f"run.seed={seed}", "adapter.kind=lora", "adapter.rank=4")
        run_recipe(built, SilentProgress())
        results.append(outcome(built)["weights"])
    assert results[0] == results[1] != results[2]


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_run(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None]
) -> None:
    straight = recipe("straight")
    run_recipe(straight, SilentProgress())
    damaged = recipe("damaged")
    stop_after(40)
    with pytest.raises(StopRequested):
        run_recipe(damaged, SilentProgress())
    stop_after(None)
    checkpoints = sorted(Path(damaged.run.folder, "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    newest = checkpoints[-1] / "trainable.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    messages: list[str] = []
    progress = SilentProgress()
    progress.message = messages.append
    run_recipe(damaged, progress)
    assert any("trainable.safetensors" in message for message in messages)
    assert outcome(damaged) == outcome(straight)


def test_another_base_model_is_refused(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], make_finch: Callable[..., Finch]
) -> None:
    built = recipe("run")
    stop_after(30)
    with pytest.raises(StopRequested):
        run_recipe(built, SilentProgress())
    stop_after(None)
    other = make_finch("6", n_layer=2, n_embd=16, vocab_size=257, dim_ffn=24, seed=5)
    save_model(other, built.model.path, format="safetensors", dtype=torch.float32, tokenizer="bytes")
    with pytest.raises(CheckpointError, match="not the one this run began with"):
        run_recipe(built, SilentProgress())
    with pytest.raises(CheckpointError, match="not the model this run began with"):
        open_trained(built.run.folder)


def test_a_finished_run_and_a_changed_recipe_change_nothing(recipe: Callable[..., Recipe]) -> None:
    built = recipe("run")
    run_recipe(built, SilentProgress())
    folder = Path(built.run.folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run_recipe(built, SilentProgress())["already_finished"] is True
    with pytest.raises(RecipeError, match=r"optimizer\.lr: 0\.01 in the run folder, 0\.02 now"):
        run_recipe(recipe("run", "optimizer.lr=0.02"), SilentProgress())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run_recipe(built, SilentProgress(), fresh=True)["folder"] == f"{folder}-2"


def test_a_run_of_gradients_that_are_not_finite_stops(recipe: Callable[..., Recipe]) -> None:
    built = recipe("run", "optimizer.lr=1e30", "optimizer.clip=null", "optimizer.warmup_steps=0", "run.steps=50")
    built = built.model_copy(update={"run": built.run.model_copy(update={"max_nonfinite_steps": 3})})
    with pytest.raises(InfctxError, match="not finite in 3 steps in a row"):
        run_recipe(built, SilentProgress())
    lines = read_metrics(Path(built.run.folder) / "metrics.jsonl")
    assert [line for line in lines if "not finite" in str(line.get("not_updated"))]
    state = load_run_state(Path(built.run.folder))
    assert state is None or all(bool(t.isfinite().all()) for t in state.state.tensors["trainable"].values())


def test_validation_leaves_the_training_alone(recipe: Callable[..., Recipe]) -> None:
    often, never = recipe("often", "run.validate_every=1"), recipe("never")
    never = never.model_copy(update={"run": never.run.model_copy(update={"validate_every": None})})
    for built in (often, never):
        run_recipe(built, SilentProgress())
    assert outcome(often)["weights"] == outcome(never)["weights"]
    lines = read_metrics(Path(often.run.folder) / "metrics.jsonl")
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 1, 2, 3, 4, 5]
    lines = read_metrics(Path(never.run.folder) / "metrics.jsonl")
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 5]
