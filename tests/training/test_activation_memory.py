"""Recomputing a chunk's layers changes the memory and nothing else, and is chosen where the memory is short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import infctx
from infctx.adapters.peft_adapters import attach_lora
from infctx.assemble import run_recipe
from infctx.checkpoint.run_state import load_run_state
from infctx.model.finch import Finch
from infctx.recipe.schema import Recipe
from infctx.training.activation_memory import activation_bytes, should_recompute
from infctx.training.bptt import ChunkObjective
from infctx.training.progress import SilentProgress


def saved_bytes(model: Finch, tokens: torch.Tensor) -> int:
    """What autograd holds of one forward pass, every storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, *_ = ChunkObjective(model)(
            tokens, tokens, torch.ones(tokens.shape), None, *model.fresh_state(tokens.shape[0]), with_loss=True
        )
    assert loss.requires_grad
    return sum(size for place, size in saved.items() if place not in own)


@pytest.mark.parametrize("version", ["6", "5.2"])
@pytest.mark.parametrize("dropout", [None, 0.3])
def test_recomputed_layers_give_the_same_bits(
    make_finch: Callable[..., Finch], version: str, dropout: float | None
) -> None:
    tokens = torch.randint(1, 50, (2, 45), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 45, dtype=torch.bool)
    starts[0, 20] = starts[1, 31] = True
    results = []
    for wanted in (False, True):
        model = make_finch(version, has_initial_state=True)
        if dropout is not None:
            torch.manual_seed(1)
            targets = ["receptance", "key", "value", "gate", "output"]
            attach_lora(model, rank=2, alpha=4.0, dropout=dropout, targets=targets, train_also=["*.bonus"])
        model.train()
        model.recompute_layers(wanted)
        torch.manual_seed(2)
        loss = infctx.backward_through_chunks(model, tokens, starts=starts, chunk_tokens=8)
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([loss, torch.get_rng_state(), *(g for g in gradients if g is not None)])
    assert len(results[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recomputed_layers_keep_little(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", n_layer=4)
    tokens = torch.randint(1, 50, (1, 512))
    kept = saved_bytes(model, tokens)
    model.recompute_layers()
    assert saved_bytes(model, tokens) < kept / 5


@pytest.mark.parametrize("rows", [1, 3])
def test_the_estimate_is_what_autograd_keeps(make_finch: Callable[..., Finch], rows: int) -> None:
    model = make_finch("6", n_layer=3)
    tokens = torch.randint(1, 50, (rows, 384))
    before = torch.get_rng_state()
    estimate = activation_bytes(ChunkObjective(model), model) * tokens.numel()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert estimate == pytest.approx(saved_bytes(model, tokens), rel=0.1)


def test_layers_are_recomputed_where_the_memory_is_short(
    make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_finch("6")
    objective = ChunkObjective(model)
    a_token = activation_bytes(objective, model)
    training = sum(12 * parameter.numel() for parameter in model.parameters())
    # 60 % of what training leaves may be used.
    enough = training + 10 * a_token / 0.6
    for free, expected in ((int(0.98 * enough), True), (int(1.02 * enough), False), (0, True)):
        monkeypatch.setattr("infctx.training.activation_memory.free_bytes", lambda device, free=free: free)
        found = should_recompute(objective, model, tokens_at_once=10, device=torch.device("cpu"))
        assert found is expected


def test_a_run_says_and_does_what_was_chosen(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for folder, wanted, free, said in (
        ("keep", "keep", 0, "kept"),
        ("recompute", "recompute", 2**40, "recomputed layer by layer"),
        ("short", "auto", 0, "recomputed layer by layer"),
        ("plenty", "auto", 2**40, "kept"),
    ):
        monkeypatch.setattr("infctx.training.activation_memory.free_bytes", lambda device, free=free: free)
        progress, headline = SilentProgress(), []
        progress.start = lambda total_steps, lines, plan, headline=headline: headline.extend(lines)
        built = recipe(folder, f"bptt.activations={wanted}", "run.steps=2")
        run_recipe(built, progress)
        assert f"memory     activations of a chunk {said}; boundary states on the device" in headline
        loaded = load_run_state(Path(built.run.folder))
        assert loaded is not None
        weights.append(loaded.state.tensors["trainable"])
    for other in weights[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in weights[0].items())
