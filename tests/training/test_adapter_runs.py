"""Runs of every kind of adapter: stopped and continued, and what their folders hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import infctx
from infctx.adapters.load import load_adapter
from infctx.assemble import open_trained, run_recipe
from infctx.checkpoint.model_file import read_model_file
from infctx.errors import CheckpointError
from infctx.recipe.schema import Recipe
from infctx.run_adapter import START_FILE
from infctx.training.progress import SilentProgress
from infctx.training.signals import StopRequested

SHORT = ("run.steps=2", "run.checkpoint_every=1", "run.validate_every=null", "adapter.rank=4", "data.validation=null")
TOKENS = torch.arange(40)[None]
KINDS = {
    "lora": ("adapter.kind=lora", "adapter.initial_state=true", "adapter.initial_shifts=true", "adapter.dropout=0.1"),
    "rslora": ("adapter.kind=rslora", "adapter.targets=[embedding, '*.key']"),
    "dora": ("adapter.kind=dora", "bptt.window=document"),
    "pissa": ("adapter.kind=pissa", "adapter.targets=[key, head]", "adapter.dropout=0.1", "run.precision=bf16"),
    "olora": ("adapter.kind=olora",),
    "miss": ("adapter.kind=miss", "adapter.initial_state=true"),
    # A window of one chunk: in some steps no document starts, and nothing has a gradient.
    "state": ("adapter.kind=state", "bptt.window=1", "optimizer.lr=1.0"),
}


def short(recipe: Callable[..., Recipe], folder: str, kind: str) -> Recipe:
    settings = tuple(key for key in SHORT if kind != "state" or "rank" not in key)
    return recipe(folder, *settings, *KINDS[kind])


def outcome(folder: Path) -> dict[str, bytes]:
    """Every file that must be the same, by its name."""
    checkpoint = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    files = [*checkpoint.glob("*.safetensors"), *(folder / "adapter").glob("*"), *folder.glob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_of_a_run_is_what_it_learned(recipe: Callable[..., Recipe], kind: str, tmp_path: Path) -> None:
    run_recipe(short(recipe, "run", kind), SilentProgress())
    assert (START_FILE in outcome(tmp_path / "run")) == (kind in ("pissa", "olora"))
    base = read_model_file(tmp_path / "base.safetensors")
    before = base.model(TOKENS)[0].detach()
    trained = open_trained(tmp_path / "run").model
    load_adapter(base.model, tmp_path / "run" / "adapter", base_fingerprint=base.fingerprint)
    with torch.no_grad():
        learned, _ = trained(TOKENS)
        assert float((learned - before).abs().max()) > 1e-3
        torch.testing.assert_close(base.model(TOKENS)[0], learned, rtol=0, atol=1e-5)
    facts = json.loads((tmp_path / "run" / "adapter" / "infctx.json").read_text())
    assert (facts["kind"], facts["base_fingerprint"]) == (kind, base.fingerprint)
    infctx.save_model(trained, tmp_path / "out.safetensors", format="safetensors", dtype=torch.float32)
    assert torch.equal(infctx.load_model(tmp_path / "out.safetensors")(TOKENS)[0], learned)


@pytest.mark.parametrize("kind", ["pissa", "lora"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], kind: str, tmp_path: Path
) -> None:
    straight, stopped = (short(recipe, name, kind) for name in ("straight", "stopped"))
    run_recipe(straight, SilentProgress())
    # Before there is a checkpoint, and inside the second step.
    for chunks in (0, 7):
        stop_after(chunks)
        with pytest.raises(StopRequested):
            run_recipe(stopped, SilentProgress())
    stop_after(None)
    run_recipe(stopped, SilentProgress())
    expected, found = outcome(tmp_path / "straight"), outcome(tmp_path / "stopped")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_what_pissa_began_with_is_needed_and_must_be_its_own(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = short(recipe, "run", "pissa")
    run_recipe(run, SilentProgress())
    (tmp_path / "run" / "result.json").unlink()
    path = tmp_path / "run" / START_FILE
    tensors, metadata = load_file(path), {"infctx.base_fingerprint": read_model_file(run.model.path).fingerprint}
    path.unlink()

    def refused(message: str) -> None:
        for use in (lambda: run_recipe(run, SilentProgress()), lambda: open_trained(tmp_path / "run")):
            with pytest.raises(CheckpointError, match=message):
                use()

    refused(r"adapter_start\.safetensors: is missing")
    save_file(tensors, path, metadata={"infctx.base_fingerprint": "0123"})
    refused(r"adapter_start\.safetensors: belongs to the base model with fingerprint 0123; model\.path has")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, path, metadata=metadata)
    refused(r"did not begin with what adapter_start\.safetensors holds")
    save_file(tensors, path, metadata=metadata)
    open_trained(tmp_path / "run")
