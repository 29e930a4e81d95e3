"""The moving average of the trained weights: by its formula, in a run, and in what is made of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from infctx.assemble import run_recipe
from infctx.model.finch import Finch
from infctx.recipe.schema import Recipe
from infctx.trained import open_trained
from infctx.training.averaged_weights import AveragedWeights
from infctx.training.metrics import read_metrics
from infctx.training.progress import SilentProgress

DECAY = 0.8


def average_of(history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By the formula, in float64."""
    shares = [DECAY ** (len(history) - 1 - place) for place in range(len(history))]
    return {
        name: sum(share * weights[name].double() for share, weights in zip(shares, history, strict=True)) / sum(shares)
        for name in history[0]
    }


def test_average_by_its_formula(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", n_layer=2)
    model.embedding.weight.requires_grad_(False)
    model.head.to(torch.bfloat16)
    averaged = AveragedWeights(model, decay=DECAY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert averaged.averages.keys() == before.keys() - {"embedding.weight"}
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in averaged.averages.items())
    history = []
    for _ in range(7):
        with torch.no_grad():
            for parameter in filter(lambda one: one.requires_grad, model.parameters()):
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype))
        averaged.update_()
        history.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        for name, expected in average_of(history).items():
            found = averaged.averages[name]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert averaged.num_updates == 7
    # In place and out again, to the bit.
    with averaged.in_place():
        for name, parameter in model.named_parameters():
            expected = averaged.averages.get(name, before[name])
            assert torch.equal(parameter, expected.to(parameter.dtype))
    assert all(torch.equal(p, history[-1].get(name, before[name])) for name, p in model.named_parameters())
    # And on from there.
    again = AveragedWeights(model, decay=DECAY)
    again.restore_(averaged.averages, num_updates=averaged.num_updates)
    for one in (averaged, again):
        one.update_()
    expected = averaged.averages
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.averages.items())


def test_what_a_run_averages_and_who_takes_it(recipe: Callable[..., Recipe]) -> None:
    settings = ("run.checkpoint_every=1", "run.keep_checkpoints=9", "adapter.kind=lora", "adapter.rank=4")
    built = recipe("run", *settings, "optimizer.ema_decay=0.8")
    run_recipe(built, SilentProgress())
    folder = Path(built.run.folder)
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 5
    history = [load_file(path / "trainable.safetensors") for path in checkpoints]
    average = load_file(checkpoints[-1] / "averaged.safetensors")
    assert all(bool((average[name] - last).abs().max() > 1e-5) for name, last in history[-1].items())
    for name, expected in average_of(history).items():
        torch.testing.assert_close(average[name].double(), expected, rtol=1e-5, atol=1e-7)

    # The adapter folder has it, and says so.
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == len(average)
    for name, tensor in adapter.items():
        ours = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(tensor, average[ours]), name
    assert "moving average" in (folder / "adapter" / "README.md").read_text()

    # A model opened from the run has it too, unless the last weights are asked for.
    base = open_trained(built.model.path).model.blocks[0].time_mix.key.weight.detach()
    for last_weights, trained in ((False, average), (True, history[-1])):
        opened = open_trained(folder, last_weights=last_weights)
        assert opened.is_averaged is not last_weights
        sides = [trained[f"blocks.0.time_mix.key.lora_{side}.default.weight"] for side in "BA"]
        expected = base + sides[0] @ sides[1] * 2.0
        torch.testing.assert_close(opened.model.blocks[0].time_mix.key.weight.detach(), expected)

    # It has no part in the training, nor in what validation measures.
    plain = recipe("plain", *settings)
    run_recipe(plain, SilentProgress())
    latest = Path(plain.run.folder) / "checkpoints" / "step-000005"
    assert not (latest / "averaged.safetensors").exists()
    assert (latest / "trainable.safetensors").read_bytes() == (checkpoints[-1] / "trainable.safetensors").read_bytes()
    measured = [
        [line.get("val_loss") for line in read_metrics(Path(one.run.folder) / "metrics.jsonl")]
        for one in (built, plain)
    ]
    assert measured[0] == measured[1]
    assert "moving average" not in (Path(plain.run.folder) / "adapter" / "README.md").read_text()
    assert open_trained(plain.run.folder).is_averaged is False


def test_a_step_without_an_update_is_not_averaged(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[None] = []
    monkeypatch.setattr(AveragedWeights, "update_", lambda self: updates.append(None))
    built = recipe("run", "optimizer.ema_decay=0.8", "optimizer.lr=1e30", "optimizer.clip=null", "data.validation=null")
    run_recipe(built, SilentProgress())
    lines = read_metrics(Path(built.run.folder) / "metrics.jsonl")
    left_out = sum("not_updated" in line for line in lines)
    assert 0 < left_out < 5
    assert len(updates) == 5 - left_out
