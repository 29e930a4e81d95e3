"""A run that is stopped anywhere and continued ends in the same bits as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.assemble import run_recipe
from infctx.checkpoint.run_state import load_run_state
from infctx.errors import CheckpointError, InfctxError, RecipeError
from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.recipe.schema import Recipe
from infctx.trained import open_trained
from infctx.training.bptt import ChunkObjective
from infctx.training.metrics import read_metrics
from infctx.training.progress import SilentProgress
from infctx.training.resume import save_run
from infctx.training.signals import StopRequested

MEASURED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


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
        "averaged": average.read_bytes() if (average := checkpoint / "averaged.safetensors").exists() else None,
        "numbers": {key: facts.get(key) for key in ("optimizer_numbers", "averaged_updates")},
        "result": result,
        "cursor": facts["cursor"],
        "metrics": metrics,
    }


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
            stop_after(distance if stops < 24 else None)
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


@pytest.mark.parametrize("kind", ["stream", "documents, accumulated", "documents, states on disk, thinned", "dropout"])
def test_a_run_that_is_stopped_behind_every_chunk_gets_to_its_end(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], kind: str
) -> None:
    """One chunk of work at a time, in either sweep: nothing in a checkpoint is lost, and nothing else changes."""
    settings = KINDS["lora with dropout"] + KINDS["documents, accumulated"] if kind == "dropout" else KINDS[kind]
    settings = (*settings, "data.validation=null", "run.steps=2" if kind == "stream" else "run.steps=1")
    if kind != "stream":
        settings = (*settings, "bptt.chunk_tokens=20")
    straight = recipe("straight", *settings)
    run_recipe(straight, SilentProgress())
    stopped = recipe("stopped", *settings)
    passes = set()
    for _ in range(200):
        stop_after(1)
        try:
            run_recipe(stopped, SilentProgress())
            break
        except StopRequested:
            loaded = load_run_state(Path(stopped.run.folder))
            assert loaded is not None
            place = loaded.state.facts.get("under_way")
            assert loaded.state.passes == (place["passes"] if place else 0)
            if place:
                passes.add((loaded.state.step, place["group"], place["in_sweep_2"], place["next_chunk_of_window"]))
                assert loaded.state.tensors["under_way"]
                has_run_backward = place["group"] > 0 or place["window_first_chunk"] > 0
                has_run_backward |= "0.adjoint.wkv" in loaded.state.tensors["under_way"]
                assert bool(loaded.state.tensors["gradient"]) == has_run_backward
    stop_after(None)
    assert outcome(stopped) == outcome(straight)
    assert {in_sweep_2 for _, _, in_sweep_2, _ in passes} == {False, True}
    assert len(passes) > 5


# Everything of the optimizer section that leaves something to be continued.
ALL_OPTIONS = (
    "optimizer.schedule=wsd",
    "optimizer.decay_fraction=0.4",
    "optimizer.ema_decay=0.7",
    "optimizer.embedding_noise=5",
    "optimizer.token_dropout=0.3",
    "optimizer.min_token_loss=2.0",
    "optimizer.z_loss=0.001",
    "optimizer.l2_wrap=0.001",
)
EVERY_OPTION = {
    "8 bits": ("optimizer.name=adamw-8bit", "bptt.window=document"),
    "offloaded": (
        "optimizer.name=adamw-offloaded",
        *("adapter.kind=lora", "adapter.rank=4", "adapter.dropout=0.2", "bptt.window=2", "run.accumulate=2"),
    ),
}


@pytest.mark.parametrize("kind", list(EVERY_OPTION))
def test_every_option_of_the_optimizer_in_a_run_that_is_stopped_behind_every_chunk(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], kind: str
) -> None:
    settings = (*ALL_OPTIONS, *EVERY_OPTION[kind], "run.steps=3", "bptt.chunk_tokens=60", "data.validation=null")
    straight = recipe("straight", *settings)
    run_recipe(straight, SilentProgress())
    expected = outcome(straight)
    assert expected["averaged"] is not None
    stopped, stops = recipe("stopped", *settings), 0
    for _ in range(100):
        stop_after(1)
        try:
            run_recipe(stopped, SilentProgress())
            break
        except StopRequested:
            stops += 1
    stop_after(None)
    assert stops > 8
    assert outcome(stopped) == expected


def test_an_interval_of_time_makes_checkpoints_inside_a_step(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("bptt.window=document", "run.checkpoint_every=null", "run.steps=2", "data.validation=null")
    straight = recipe("straight", *settings)
    run_recipe(straight, SilentProgress())
    saved = []
    monkeypatch.setattr(
        "infctx.training.loop.save_run",
        lambda run, done, place: (
            save_run(run, done, place),
            saved.append((done.step, place.under_way and place.under_way.passes)),
        ),
    )
    often = recipe("often", *settings, "run.checkpoint_minutes=0.0000001")
    run_recipe(often, SilentProgress())
    assert saved[:4] == [(0, None), (0, 1), (0, 2), (0, 3)]
    assert saved[-1] == (2, None)
    assert {step for step, _ in saved} == {0, 1, 2}
    names = sorted(path.name for path in Path(often.run.folder, "checkpoints").iterdir())
    assert names == ["latest", f"step-000001+{saved[-2][1]:06d}", "step-000002"]
    # Its settings are in its checkpoints' cursor and nowhere else.
    assert outcome(often) == outcome(straight)


def test_going_on_inside_a_step_repeats_little(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("bptt.window=document", "bptt.chunk_tokens=4", "run.steps=1", "run.rows=1", "data.validation=null")
    calls = 0
    forward = ChunkObjective.forward

    def counted(*arguments: object, **settings: object) -> object:
        nonlocal calls
        calls += 1
        return forward(*arguments, **settings)

    monkeypatch.setattr(ChunkObjective, "forward", counted)
    straight = recipe("straight", *settings)
    run_recipe(straight, SilentProgress())
    in_one_go, calls = calls, 0
    assert in_one_go > 40
    stopped = recipe("stopped", *settings)
    num_measured = 2  # For the choice of what to keep in memory, each time a run begins.
    stop_after(in_one_go * 3 // 4)
    with pytest.raises(StopRequested):
        run_recipe(stopped, SilentProgress())
    stop_after(None)
    run_recipe(stopped, SilentProgress())
    # Of the states before the place, about a square root was kept; the others were computed once more.
    num_chunks = in_one_go // 2
    assert in_one_go < calls <= in_one_go + num_measured + num_chunks // 2
    assert outcome(stopped) == outcome(straight)


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


def test_what_changes_no_number_may_be_changed_under_a_run(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None]
) -> None:
    settings = ("bptt.window=document", "run.steps=2", "data.validation=null")
    straight = recipe("straight", *settings)
    run_recipe(straight, SilentProgress())
    changes = [
        ("bptt.boundaries=disk", "bptt.activations=recompute"),
        ("bptt.boundaries=host", "bptt.thin_boundaries=true", "run.checkpoint_minutes=1"),
        ("bptt.boundaries=disk", "bptt.activations=keep", "run.keep_checkpoints=3"),
    ]
    for changed in changes:
        stop_after(8)
        with pytest.raises(StopRequested):
            run_recipe(recipe("changed", *settings, *changed), SilentProgress())
    stop_after(None)
    changed = recipe("changed", *settings)
    run_recipe(changed, SilentProgress())
    assert outcome(changed) == outcome(straight)


def test_a_step_without_a_target_can_be_stopped(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    (tmp_path / "masked.jsonl").write_text(json.dumps({"prompt": "only read " * 30, "completion": ""}) + "\n")
    built = recipe("run", f"data.path='{tmp_path}/masked.jsonl'", "data.validation=null", "data.template=completion")
    stop_after(2)
    with pytest.raises(StopRequested):
        run_recipe(built, SilentProgress())
    loaded = load_run_state(Path(built.run.folder))
    assert loaded is not None
    assert loaded.state.step == 0


def test_a_run_of_gradients_that_are_not_finite_stops(recipe: Callable[..., Recipe]) -> None:
    built = recipe("run", "optimizer.lr=1e30", "optimizer.clip=null", "optimizer.warmup_steps=0", "run.steps=50")
    built = built.model_copy(update={"run": built.run.model_copy(update={"max_nonfinite_steps": 3})})
    with pytest.raises(InfctxError, match="not finite in 3 steps in a row"):
        run_recipe(built, SilentProgress())
    lines = read_metrics(Path(built.run.folder) / "metrics.jsonl")
    left_out = [line for line in lines if "not finite" in str(line.get("not_updated"))]
    assert len(left_out) == 3
    assert all(line["documents"] and "docs.jsonl:" in line["documents"][0] for line in left_out)
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
