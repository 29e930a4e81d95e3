"""A run that is killed or stopped and continued ends in the same bits as one that was left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infctx.checkpoint.run_state import load_run_state

STEPS = 32
RECIPES: dict[str, dict[str, Any]] = {
    "stream": {
        "data": {"validation": 0.2},
        "run": {"steps": STEPS, "rows": 3, "checkpoint_every": 3, "validate_every": 7},
    },
    "document": {
        "bptt": {"chunk_tokens": 30, "window": "document"},
        "run": {"steps": STEPS, "rows": 2, "accumulate": 2, "checkpoint_every": 3},
    },
    "dropout": {
        "adapter": {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.1, "train_also": ["*.lerp_key"]},
        "run": {"steps": STEPS, "rows": 2, "accumulate": 2, "checkpoint_every": 3, "precision": "bf16"},
    },
}
COMPARED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


def newest_step(folder: Path) -> int:
    """Steps taken in the newest checkpoint, which may lie inside the next one: step-000007+000012."""
    try:
        return int(
            (folder / "checkpoints" / "latest").read_text().strip().removeprefix("step-").partition("+")[0] or -1
        )
    except FileNotFoundError:
        return -1


def newest_line(folder: Path) -> int:
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return -1


def outcome(folder: Path, steps: int = STEPS) -> dict[str, object]:
    """Everything that has to be equal: weights, moments, random numbers, row states, and the numbers of each step."""
    final = folder / "checkpoints" / f"step-{steps:06d}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((final / "state.json").read_text())
    return {
        **{path.name: path.read_bytes() for path in final.glob("*.safetensors")},
        **{path.name: path.read_bytes() for path in (folder / "adapter").glob("*")},
        "lines": [tuple(line.get(key) for key in COMPARED) for line in lines],
        "facts": {key: state[key] for key in ("step", "cursor", "done")},
        "files": sorted(path.name for path in folder.iterdir()),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


def check_equal(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    assert found["lines"] == expected["lines"]
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("kind", RECIPES)
def test_killed_and_stopped_runs_end_in_the_same_bits(
    forks: Any, make_recipe: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    recipe = make_recipe(**RECIPES[kind])
    whole = forks.start("train", recipe, f"run.folder={tmp_path / 'whole'}", "--json")
    folder = tmp_path / "broken"
    command = ["train", recipe, f"run.folder={folder}", "--json"]
    # A different place each time the tests run; it is in the message of a failure.
    seed = time.time_ns() % 100_000
    places = random.Random(seed)
    print(f"seed {seed}")

    for number, first, last in (
        (signal.SIGKILL, 3, 6),
        (signal.SIGTERM, 8, 12),
        (signal.SIGKILL, 14, 17),
        (signal.SIGINT, 19, 22),
    ):
        process = forks.start(*command)
        wanted = places.randint(first, last)
        process.wait_for(lambda wanted=wanted: newest_line(folder) >= wanted and newest_step(folder) >= 3)
        time.sleep(places.random() * 0.02)
        process.signal(number)
        ended = process.wait()
        assert not (folder / "result.json").exists(), "it was too quick to be stopped"
        assert ended.out == ""
        if number == signal.SIGKILL:
            assert ended.code == -signal.SIGKILL
            continue
        ended.refused(number.name, "checkpoint", code=3)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        done = json.loads(lines[-1])["step"]
        assert newest_step(folder) in (done, done + 1)
        newest = (folder / "checkpoints" / "latest").read_text().strip()
        assert (folder / "checkpoints" / newest / "MANIFEST.json").is_file()

    last = forks.start(*command).wait().ok()
    assert "continuing after step" in last.err or "continuing inside step" in last.err
    assert {**last.json, "folder": ""} == {**whole.wait().ok().json, "folder": ""}
    check_equal(outcome(folder), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_alone_makes_a_checkpoint(
    forks: Any, make_recipe: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    """No checkpoint_every: the only checkpoint is the one the signal asks for."""
    recipe = make_recipe(run={"steps": 30, "rows": 2})
    whole = forks.start("train", recipe, f"run.folder={tmp_path / 'whole'}")
    folder = tmp_path / "broken"
    process = forks.start("train", recipe, f"run.folder={folder}")
    process.wait_for(lambda: newest_line(folder) >= 5)
    process.signal(number)
    process.wait().refused(number.name, "checkpoint", code=3)
    assert 5 <= newest_step(folder) < 30
    forks.start("train", recipe, f"run.folder={folder}").wait().ok()
    whole.wait().ok()
    found, expected = outcome(folder, 30), outcome(tmp_path / "whole", 30)
    # The one the signal made stays.
    assert len(found.pop("checkpoints")) == len(expected.pop("checkpoints")) + 1
    check_equal(found, expected)


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint(
    forks: Any, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The first waits for the end of the chunk, which is long here."""
    (tmp_path / "long.txt").write_text("abcdef" * 8000, encoding="utf-8")
    recipe = make_recipe(
        data={"path": str(tmp_path / "long.txt")},
        bptt={"chunk_tokens": 48_000, "window": 1},
        run={"steps": 1000, "rows": 1, "checkpoint_every": 1},
    )
    folder = tmp_path / "run"
    # A first signal that comes just before a chunk's end stops the run in good order; then it is tried again.
    for _ in range(10):
        process = forks.start("train", recipe)
        begun = newest_step(folder)
        process.wait_for(lambda begun=begun: newest_step(folder) > begun)
        time.sleep(0.2)
        process.signal(signal.SIGTERM)
        time.sleep(0.02)
        process.signal(signal.SIGTERM)
        ended = process.wait()
        if ended.code != 3:
            break
    assert ended.code == -signal.SIGTERM
    loaded = load_run_state(folder)
    assert loaded is not None
    assert loaded.skipped == []
    assert loaded.state.step == newest_step(folder)
    again = forks.start("train", recipe)
    again.wait_for(lambda: f"continuing after step {loaded.state.step}" in again.err)
    again.signal(signal.SIGKILL)
    again.wait()


def test_ctrl_c_before_the_first_step(forks: Any, make_recipe: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    """While a big corpus is read: one of our exit codes, no traceback, nothing left behind."""
    (tmp_path / "big.jsonl").write_bytes(rows.read_bytes() * 16000)
    recipe = make_recipe(data={"path": str(tmp_path / "big.jsonl")})
    process = forks.start("train", recipe)
    time.sleep(0.8)
    process.signal(signal.SIGINT)
    ended = process.wait()
    assert "Traceback" not in ended.err
    # 3 promises a checkpoint, which there is none of: the shell's own code for an interrupt is as good.
    assert ended.code in (3, 130)
    assert ended.err.strip()
    assert (tmp_path / "run" / "checkpoints").exists() == (ended.code == 3)
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_run_goes_on_when_nobody_reads_its_progress(
    forks: Any, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """`infctx train ... 2>&1 | head -1`: a display that went away is no reason to lose a night's work."""
    ended = forks.start("train", make_recipe(run={"steps": 5}), nobody_reads=True).wait()
    assert ended.code in (0, 3)
    assert newest_step(tmp_path / "run") >= 0


def test_in_a_shell_of_a_cluster(forks: Any, make_recipe: Callable[..., Path]) -> None:
    """Variables that a scheduler or torchrun left in the environment are not ours."""
    env = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "mine", "SLURM_JOB_ID": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    forks.start("train", make_recipe(run={"steps": 1}), env=env).wait().ok()


def test_a_second_run_in_the_same_folder_is_refused(
    forks: Any, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(run={"steps": 400, "checkpoint_every": 50})
    first = forks.start("train", recipe)
    first.wait_for(lambda: newest_line(tmp_path / "run") >= 1)
    second = forks.start("train", recipe).wait()
    second.refused(str(tmp_path / "run"), f"pid {first.pid}")
    first.signal(signal.SIGTERM)
    first.wait().refused("checkpoint", code=3)


def test_a_damaged_newest_checkpoint_is_passed_over(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(run={"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 3})
    cli("train", recipe).ok()
    folder = tmp_path / "run"
    before = outcome(folder, 6)
    (folder / "result.json").unlink()
    weights = folder / "checkpoints" / "step-000006" / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = cli("train", recipe).ok()
    assert "step-000006" in again.err
    assert "continuing after step 4" in again.err
    check_equal(outcome(folder, 6), before)

    (folder / "result.json").unlink()
    for path in folder.glob("checkpoints/*/trainable.safetensors"):
        path.write_bytes(b"")
    cli("train", recipe).refused("step-000002", "trainable.safetensors")
    cli("export", folder, "--output", tmp_path / "out.pth").refused("trainable.safetensors")


def test_what_changed_under_a_run_is_named(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], rows: Path, tmp_path: Path, snapshot: Any
) -> None:
    model, data = tmp_path / "m.pth", tmp_path / "d.jsonl"
    model.write_bytes(models["pth"].read_bytes())
    data.write_bytes(rows.read_bytes())
    recipe = make_recipe(model={"path": str(model)}, data={"path": str(data)}, run={"steps": 6, "checkpoint_every": 2})
    cli("train", recipe).ok()
    (tmp_path / "run" / "result.json").unlink()
    before = snapshot(tmp_path / "run" / "checkpoints")

    model.write_bytes(models["other"].read_bytes())
    cli("train", recipe).refused(str(tmp_path / "run"), "model")
    cli("export", tmp_path / "run", "--output", tmp_path / "out.pth").refused(str(model))
    model.write_bytes(models["pth"].read_bytes())

    data.write_bytes(rows.read_bytes() + b'{"text": "one more"}\n')
    cli("train", recipe).refused("data")
    # The same lengths, other words.
    data.write_bytes(rows.read_bytes().replace(b"a", b"b"))
    assert data.stat().st_size == rows.stat().st_size
    cli("train", recipe).refused("data")
    assert snapshot(tmp_path / "run" / "checkpoints") == before
