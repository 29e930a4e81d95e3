"""Training from end to end, and what it leaves on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import infctx
from infctx.recipe.load import load_recipe

STEP_KEYS = {
    "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "peak_device_bytes", "peak_host_bytes", "seconds",
    "chunks", "chunk_tokens", "window", "carried_rows", "recompute_difference"
}  # fmt: skip
LORA = {"kind": "lora", "rank": 2, "alpha": 4.0}
STREAM = {"chunk_tokens": 8, "window": 2}
DOCUMENT = {"chunk_tokens": 8, "window": "document"}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in text.splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bptt", [STREAM, DOCUMENT], ids=["stream", "document"])
@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_a_run_leaves_the_folder_that_was_promised(
    cli: Any,
    make_recipe: Callable[..., Path],
    models: dict[str, Path],
    tmp_path: Path,
    adapter: dict[str, Any],
    bptt: dict[str, Any],
    precision: str,
) -> None:
    recipe = make_recipe(
        adapter=adapter,
        bptt=bptt,
        data={"validation": 0.2},
        run={"precision": precision, "checkpoint_every": 3, "validate_every": 2, "steps": 5},
    )
    cli("train", recipe).ok()
    folder = tmp_path / "run"

    promised = {"recipe.yaml", "metrics.jsonl", "checkpoints", "ledger.json"} | ({"adapter"} if adapter else set())
    names = {path.name for path in folder.iterdir()}
    assert names >= promised
    assert names - promised <= {".lock", "result.json", "report", "report.html", "run.log"}

    resolved = load_recipe(folder / "recipe.yaml")
    # What was left to the machine is filled in, so that a run goes on as it began.
    assert (resolved.kernel.backend, resolved.data.tokenizer, resolved.run.devices) == ("cpp", "bytes", 1)
    given = load_recipe(recipe).resolved()
    for name in ("run", "kernel", "data"):
        section = getattr(given, name)
        chosen = {key: getattr(getattr(resolved, name), key) for key, value in section if value == "auto"}
        given = given.model_copy(update={name: section.model_copy(update=chosen)})
    assert resolved == given
    assert resolved.data.mode == ("stream" if bptt is STREAM else "document")

    lines = lines_of(folder)
    assert [line["step"] for line in lines if line["step"] > 0] == [1, 2, 3, 4, 5]
    for line in lines:
        if line["step"] > 0:
            assert line.keys() - {"val_loss"} == STEP_KEYS
            assert line["recompute_difference"] == 0
            assert line["loss"] > 0
            assert line["grad_norm"] > 0
            assert line["lr"] > 0
            assert line["seconds"] > 0
            assert line["peak_host_bytes"] > 1_000_000
    # Before the first step, every second one, and after the last.
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 2, 4, 5]
    tokens = [line["tokens"] for line in lines if line["step"] > 0]
    if bptt is STREAM:
        assert tokens == [32, 64, 96, 128, 160]
    else:
        assert tokens == sorted(set(tokens))

    checkpoints = folder / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-000003", "step-000005", "latest"}
    assert (checkpoints / "latest").read_text().strip() == "step-000005"
    for checkpoint in (checkpoints / "step-000003", checkpoints / "step-000005"):
        files = {path.name for path in checkpoint.iterdir()}
        assert files >= {"state.json", "MANIFEST.json"}
        assert {Path(name).suffix for name in files - {"state.json", "MANIFEST.json"}} == {".safetensors"}
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
        assert manifest.keys() == files - {"MANIFEST.json"}
        for name, facts in manifest.items():
            content = (checkpoint / name).read_bytes()
            assert facts["bytes"] == len(content)
            assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert json.loads((checkpoint / "state.json").read_text())["step"] == int(checkpoint.name[-6:])

    # Weights that learn, their moments and the carried states are float32 in either precision.
    final = checkpoints / "step-000005"
    trainable = load_file(final / "trainable.safetensors")
    rows = load_file(final / "rows.safetensors")
    assert {tensor.dtype for tensor in [*trainable.values(), *rows.values()]} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(final / "optimizer.safetensors").values()} == {torch.float32}
    assert bool(rows) == (bptt is STREAM)
    assert all("lora_" in name for name in trainable) == bool(adapter)

    # They have learnt.
    base = infctx.load_model(models["pth"])
    cli("export", folder, "--output", tmp_path / "out.pth", "--dtype", "fp32").ok()
    trained = infctx.load_model(tmp_path / "out.pth")
    changed = [
        name
        for (name, before), after in zip(base.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(before, after)
    ]
    if adapter:
        expected = [f".{part}.weight" for part in ("receptance", "key", "value", "gate", "output")]
        assert changed
        assert all(name.endswith(tuple(expected)) for name in changed)
    else:
        assert len(changed) == len(list(base.parameters()))


def test_training_lowers_the_loss_on_what_was_held_out(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "same.txt").write_text("the same words again and again. " * 40)
    recipe = make_recipe(
        data={"path": str(tmp_path / "same.txt"), "validation_tail": 0.2},
        optimizer={"lr": 0.01},
        run={"steps": 20, "rows": 1},
        bptt={"chunk_tokens": 32, "window": 2},
    )
    result = cli("train", recipe, "--json").ok().json
    first = lines_of(tmp_path / "run")[0]
    assert first["step"] == 0
    assert result["val_loss"] < 0.8 * first["val_loss"]


def test_peft_opens_the_adapter_folder(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path
) -> None:
    import peft

    recipe = make_recipe(adapter={**LORA, "dropout": 0.1}, run={"steps": 10}, optimizer={"lr": 0.03})
    cli("train", recipe).ok()
    adapter = tmp_path / "run" / "adapter"
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    cli("export", tmp_path / "run", "--output", tmp_path / "merged.pth", "--dtype", "fp32").ok()

    tokens = torch.randint(1, 257, (2, 30), generator=torch.Generator().manual_seed(1))
    base = infctx.load_model(models["pth"])
    with torch.no_grad():
        before, _ = base(tokens)
        merged, _ = infctx.load_model(tmp_path / "merged.pth")(tokens)
        through_peft, _ = peft.PeftModel.from_pretrained(base, str(adapter)).eval()(tokens)
    assert (merged - before).abs().max() > 0.01
    torch.testing.assert_close(through_peft, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_a_finished_run_is_left_alone(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any, adapter: dict[str, Any]
) -> None:
    recipe = make_recipe(adapter=adapter, run={"steps": 2})
    cli("train", recipe).ok()
    before = snapshot(tmp_path)
    again = cli("train", recipe).ok()
    assert "finished" in again.err
    assert str(tmp_path / "run") in again.err
    assert snapshot(tmp_path) == before


def test_a_changed_recipe_is_refused_in_a_used_folder(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any, models: dict[str, Path]
) -> None:
    recipe = make_recipe(run={"steps": 2})
    cli("train", recipe).ok()
    before = snapshot(tmp_path)
    changes = {
        "optimizer.lr": ("0.003", "0.004"),
        "run.steps": ("2", "3"),
        "run.seed": ("0", "1"),
        "bptt.window": ("2", "3"),
        "data.validation": ("unset", "0.5"),
        "model.path": (str(models["pth"]), str(models["other"])),
    }
    for key, (old, new) in changes.items():
        for command in ("train", "check"):
            refused = cli(command, recipe, f"{key}={new}").refused(key, old, new, "--fresh", str(tmp_path / "run"))
            assert [other for other in changes if other in refused.err] == [key]
    cli("train", recipe, "adapter.kind=lora", "run.seed=1").refused("adapter.kind", "run.seed")
    cli("train", recipe, "run.rows=3", "run.accumulate=2").refused("run.rows × run.accumulate", "--fresh")
    assert snapshot(tmp_path) == before


def test_fresh_goes_to_a_folder_beside(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any
) -> None:
    recipe = make_recipe(run={"steps": 2})
    cli("train", recipe, "--fresh").ok()
    assert (tmp_path / "run").is_dir()
    before = snapshot(tmp_path / "run")
    folders = [Path(cli("train", recipe, "--fresh", "--json").ok().json["folder"]) for _ in range(2)]
    assert len({*folders, tmp_path / "run"}) == 3
    assert {folder.parent for folder in folders} == {tmp_path}
    assert all((folder / "checkpoints/step-000002/MANIFEST.json").is_file() for folder in folders)
    assert snapshot(tmp_path / "run") == before
    # The folder beside is a run folder like any other.
    assert "finished" in cli("train", recipe, f"run.folder={folders[0]}").ok().err


@pytest.mark.parametrize(
    "changes",
    [
        {"run": {"steps": None, "epochs": 1}},
        {"run": {"steps": None, "epochs": 2}, "bptt": DOCUMENT, "data": {"pack_tokens": 60}},
        {"run": {"rows": 9, "accumulate": 2, "steps": None, "epochs": 1}},
        {"run": {"rows": 1, "accumulate": 40, "steps": None, "epochs": 1}, "bptt": DOCUMENT},
        {"bptt": {"chunk_tokens": 1, "window": 1}},
        {"bptt": {"chunk_tokens": 500, "window": 2}, "run": {"steps": 2, "rows": 1}},
        {"adapter": {**LORA, "train_also": ["*.lerp_*", "head.*"], "targets": ["head", "time_mix.key"]}},
        {"adapter": {"kind": "full", "freeze": ["embedding.*", "blocks.0.*"]}, "run": {"precision": "bf16"}},
        {"optimizer": {"clip": None, "schedule": "exponential", "weight_decay": 0.1}},
        {"data": {"mode": "document"}, "bptt": {"chunk_tokens": 4, "window": 3}},
    ],
    ids=lambda changes: ",".join(f"{a}.{b}" for a in changes for b in changes[a]),
)
def test_odd_recipes_train(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, rows: Path, changes: dict[str, Any]
) -> None:
    result = cli("train", make_recipe(**changes), "--json").ok().json
    lines = lines_of(tmp_path / "run")
    assert result["steps"] == len(lines) >= 1
    assert all(line["loss"] > 0 for line in lines)
    epochs = changes.get("run", {}).get("epochs")
    if epochs:
        texts = [json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines()]
        assert result["tokens"] == epochs * sum(len(text.encode()) + 1 for text in texts)
    generated = cli("generate", tmp_path / "run", "--prompt", "a", "--max-tokens", 2, "--json").ok()
    assert "text" in generated.json


def test_paths_with_spaces_brackets_and_unicode(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "mein Ordner [1] é 世界 {x} [/bold]"
    odd.mkdir(parents=True)
    (odd / "m [2].pth").write_bytes(models["pth"].read_bytes())
    (odd / "d *.jsonl").write_bytes(rows.read_bytes())
    recipe = make_recipe(
        name=str(odd / "re cipe.yaml"),
        model={"path": str(odd / "m [2].pth")},
        data={"path": str(odd / "d *.jsonl")},
        run={"folder": str(odd / "run ü"), "steps": 2},
    )
    assert odd.name in cli("data", recipe).ok().out.replace("\n", "")
    assert cli("train", recipe, "--json").ok().json["folder"] == str(odd / "run ü")
    cli("export", odd / "run ü", "--output", odd / "aus gabe.pth").ok()
    assert "finished" in cli("train", recipe).ok().err


def test_the_place_of_a_held_out_part_is_shown(cli: Any, make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe(data={"validation_tail": 0.1})
    assert "[tokens 0-" in cli("data", recipe).ok().out.replace("\n", " ")


def test_a_run_is_used_from_another_working_directory(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], rows: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A recipe speaks of paths from where it is started; a run folder goes on working from elsewhere."""
    (tmp_path / "m.pth").write_bytes(models["pth"].read_bytes())
    (tmp_path / "d.jsonl").write_bytes(rows.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    recipe = make_recipe(model={"path": "m.pth"}, data={"path": "d.jsonl"}, run={"folder": "run", "steps": 2})
    monkeypatch.chdir(tmp_path)
    cli("train", recipe).ok()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli("generate", tmp_path / "run", "--prompt", "a", "--max-tokens", 2).ok()
    cli("export", tmp_path / "run", "--output", "out.pth").ok()


def test_a_folder_by_another_spelling_is_the_same_folder(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(run={"folder": "run", "steps": 1})
    monkeypatch.chdir(tmp_path)
    cli("train", recipe).ok()
    for same in ("./run", "run/", str(tmp_path / "run"), f"../{tmp_path.name}/run"):
        assert "finished" in cli("train", recipe, f"run.folder={same}").ok().err


def test_home_is_understood_in_every_path(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], rows: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A folder called ~ in the working directory is what nobody meant and some will remove with rm -r ~."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "m.pth").write_bytes(models["pth"].read_bytes())
    (home / "d.jsonl").write_bytes(rows.read_bytes())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(data={"path": "~/d.jsonl"}, run={"folder": "~/run", "steps": 1})
    cli("train", recipe)
    assert not (tmp_path / "~").exists()
    cli("check", recipe, "model.path=~/m.pth", f"run.folder={tmp_path / 'other'}").ok()


@pytest.mark.parametrize("steps", [2, 6])
def test_weights_that_are_not_finite(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path, steps: int
) -> None:
    """The run says so, keeps strict JSON everywhere, and loses nothing it had."""
    tensors = torch.load(models["pth"], weights_only=True)
    tensors["blocks.0.att.key.weight"].fill_(float("nan"))
    torch.save(tensors, tmp_path / "nan.pth")
    recipe = make_recipe(model={"path": str(tmp_path / "nan.pth")}, run={"steps": steps, "max_nonfinite_steps": 4})
    ended = cli("train", recipe, "--json")
    assert "not finite" in ended.err
    assert "Traceback" not in ended.err
    if steps == 2:
        assert ended.code == 0
        assert ended.json["steps"] == 2
    else:
        assert ended.code == 2
    for path in (tmp_path / "run").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda word, path=path: pytest.fail(f"{path}: {word}"))


def test_a_run_that_diverges_keeps_its_last_good_weights(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        optimizer={"lr": 1e30, "warmup_steps": 0}, run={"steps": 40, "max_nonfinite_steps": 3, "rows": 1}
    )
    cli("train", recipe).refused("not finite", "optimizer.lr")
    # The message says where the checkpoints are.
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()


def test_a_deleted_or_damaged_result_is_no_bug_of_ours(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(run={"steps": 2})
    result = cli("train", recipe, "--json").ok().json
    weights = (tmp_path / "run/checkpoints/step-000002/trainable.safetensors").read_bytes()
    for content in (None, "", "{", "[]"):
        path = tmp_path / "run" / "result.json"
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        again = cli("train", recipe, "--json")
        assert "Traceback" not in again.err, (content, again.err)
        assert again.ok().json == result
        assert (tmp_path / "run/checkpoints/step-000002/trainable.safetensors").read_bytes() == weights
