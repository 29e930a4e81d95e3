"""infctx plan: what it reads, what it says, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import infctx
from infctx.planning.devices import Room


def test_plan_of_a_file_by_its_sizes(cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path]) -> None:
    recipe = make_recipe(bptt={"chunk_tokens": 8, "window": "document"}, run={"precision": "fp32"})
    found = cli("plan", recipe, "--memory", "24GB", "--json").ok().json
    model = infctx.load_model(models["pth"])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert found["parameters"] == weights // 4
    assert found["parts"]["trained weights"] == weights
    assert found["parts"]["optimizer moments"] == 2 * weights
    assert found["device_bytes"] == sum(found["parts"].values())
    assert (found["fits"], found["settings"]["overrides"]) == (True, [])
    assert [time["document_tokens"] for time in found["times"]] == [65_536, 1_048_576, 10_485_760]
    assert [row["document_tokens"] for row in found["lengths"]][::6] == [4096, 10_485_760]
    assert found["longest_document"]["bound"] == "disk"
    assert found["measured_on_a_gpu"] is False


def test_without_a_device_it_plans_for_this_machine(
    cli: Any, make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = cli("plan", make_recipe(), "--json").ok().json
    assert (found["device"]["name"], found["device"]["kind"], found["precision"]) == ("cpu", "cpu", "fp32")
    assert "runtime" not in found["parts"]
    assert (found["host_bytes"], found["host_parts"]) == (0, {})
    assert found["fits"] is True
    words = cli("plan", make_recipe(), "--device", "cpu").ok().out
    assert "free here now" in words
    assert "GPU" not in words
    told = "Not counted: Python and its libraries"
    assert told in words
    assert told not in cli("plan", make_recipe(), "--memory", "24GB").ok().out


def test_what_does_not_fit_ends_well_and_says_what_would(cli: Any, make_recipe: Callable[..., Path]) -> None:
    lora = {"kind": "lora", "rank": 32}
    recipe = make_recipe(adapter=lora, bptt={"chunk_tokens": 4096, "window": 16}, data={"mode": "stream"})
    arguments = ("plan", recipe, "--shape", "7b", "--device", "rtx-3060", "--tokens", "100000")
    found = cli(*arguments, "--json").ok().json
    assert (found["fits"], found["short_of"]) == (False, ["device"])
    assert "model.quantize=int8" in found["settings"]["overrides"]
    assert found["settings"]["device_bytes"] <= 12 * 10**9
    words = cli(*arguments).ok().out
    assert "Finch 7B, 7,635,746,816 parameters" in words
    assert "does NOT fit" in words
    assert "not measured on a GPU" in words.replace("\n", " ")
    assert f"infctx train {recipe} {' '.join(found['settings']['overrides'])}" in words
    assert all(len(line) <= 80 for line in words.splitlines() if "infctx train" not in line)
    # They are accepted, and fit.
    again = cli(*arguments, *found["settings"]["overrides"], "--json").ok().json
    assert again["fits"] is True
    assert again["device_bytes"] == found["settings"]["device_bytes"]


def test_full_fine_tuning_is_not_given_up_for_the_user(cli: Any, make_recipe: Callable[..., Path]) -> None:
    arguments = ("plan", make_recipe(), "--shape", "7b", "--memory", "24GB")
    found = cli(*arguments, "--json").ok().json
    assert (found["fits"], found["settings"]) == (False, None)
    assert found["largest_part"] == "optimizer moments"
    assert "Train fewer weights (adapter.kind=lora" in cli(*arguments).ok().out.replace("\n", " ")
    sized = cli(*arguments[:-1], "80GiB", "run.strategy=fsdp", "--ranks", "16", "--disk", "1TB", "--json").ok().json
    assert (sized["ranks"], sized["fits"]) == (16, True)


def test_mistakes_are_named(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(model={"path": str(tmp_path / "missing.pth")})
    cli("plan", recipe).refused("model.path", "missing.pth", "--shape", "14b")
    cli("plan", recipe, "--shape", "8b").refused("--shape 8b", "1.6b")
    cli("plan", recipe, "--shape", "7b", "--memory", "big").refused("--memory big", "24GB")
    cli("plan", recipe, "--shape", "7b", "--memory", "24").refused("--memory 24:", "24GB")
    cli("plan", recipe, "--shape", "7b", "--device", "rtx-9090").refused("--device rtx-9090", "rtx-4090", "h200", "cpu")
    cli("plan", recipe, "--shape", "7b", "--device", "h100", "--measure").refused("--measure", "h100")
    cli("plan", recipe, "--shape", "7b", "--device", "cpu", "--host-memory", "1GB").refused("--host-memory", "--memory")
    cli("plan", recipe, "--shape", "7b", "--ranks", "3", "run.time_parallel=2", "run.devices=2").refused("--ranks 3")
    cli("plan", recipe, "--shape", "7b", "run.strategy=single", "--ranks", "2").refused("run.strategy: single")


def test_checkpoints_are_as_large_as_planned(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(adapter={"kind": "lora", "rank": 8}, run={"checkpoint_every": 1, "keep_checkpoints": 3})
    planned = cli("plan", recipe, "--memory", "1GB", "--tokens", "64", "--json").ok().json["disk_parts"]
    trained = cli("train", recipe).ok()
    assert "needed     " in trained.err

    def tensors(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    # Names and shapes of the tensors, and random numbers, are not in the plan; the model here is tiny.
    checkpoints = tensors(tmp_path / "run" / "checkpoints")
    assert planned["checkpoints kept"] == pytest.approx(checkpoints, rel=0.5)
    assert planned["checkpoints kept"] < checkpoints
    assert planned["adapter folder"] == pytest.approx(2 * tensors(tmp_path / "run" / "adapter"), rel=0.3)


def test_a_run_that_cannot_fit_is_refused_and_writes_nothing(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infctx.assemble.room_here", lambda *_: Room(device=100_000, disk=10**12))
    cli("train", make_recipe()).refused("cannot fit", "memory", "Train fewer weights")
    assert not (tmp_path / "run").exists()
