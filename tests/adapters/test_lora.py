"""LoRA and full fine-tuning: identity at the start, merged equals attached, names that match nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import infctx
from infctx.adapters.full import attach_full
from infctx.adapters.peft_adapters import TRAINED_PARAMETERS, attach_lora
from infctx.errors import RecipeError
from infctx.model.finch import Finch

TARGETS = ["receptance", "key", "value", "gate", "output"]
TOKENS = torch.arange(40)[None] % 50


def disturb_(model: Finch) -> None:
    """Give every trainable parameter values that matter, as training would."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


@pytest.mark.parametrize("version", ["6", "5.2"])
def test_attached_is_the_identity_and_merged_equals_attached(make_finch: Callable[..., Finch], version: str) -> None:
    model = make_finch(version)
    before, _ = model(TOKENS)
    names = list(dict(model.named_parameters()))
    adapter = attach_lora(model, rank=4, alpha=8, targets=TARGETS)
    assert torch.equal(model(TOKENS)[0], before)
    disturb_(model)
    attached, _ = model(TOKENS)
    assert bool(((attached - before).abs() > 0.1).any())
    adapter.merge_()
    torch.testing.assert_close(model(TOKENS)[0], attached, rtol=0, atol=1e-5)
    assert list(dict(model.named_parameters())) == names


def test_every_matrix_of_every_layer_is_reached_and_nothing_else(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    attach_lora(model, rank=4, alpha=8, targets=TARGETS)
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    time_mix = {f"blocks.{i}.time_mix.{name}" for i in range(3) for name in TARGETS}
    channel_mix = {f"blocks.{i}.channel_mix.{name}" for i in range(3) for name in ("key", "receptance", "value")}
    assert trained == time_mix | channel_mix
    model = make_finch("6")
    attach_lora(model, rank=4, alpha=8, targets=["channel_mix.key", "head"])
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.channel_mix.key" for i in range(3)} | {"head"}


@pytest.mark.parametrize("targets", [TARGETS, ["head", "value"]])
def test_its_gradient_through_chunks_is_exact(make_finch: Callable[..., Finch], targets: list[str]) -> None:
    model = make_finch("6", dtype=torch.float64)
    attach_lora(model, rank=4, alpha=8, targets=targets, train_also=["*.bonus", "*.lerp_down"])
    disturb_(model)
    model.double()
    logits, _ = model(TOKENS)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    infctx.backward_through_chunks(model, TOKENS, chunk_tokens=7)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert float((parameter.grad - expected[name]).norm() / expected[name].norm()) < 1e-10, name
        else:
            assert parameter.grad is None, name


def test_raw_parameters_are_trained_and_saved_beside(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    model = make_finch("6")
    adapter = attach_lora(model, rank=4, alpha=8, targets=["key"], train_also=["*.bonus", "blocks.0.*lerp_key"])
    raw = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert raw == {f"blocks.{i}.time_mix.bonus" for i in range(3)} | {
        "blocks.0.time_mix.lerp_key",
        "blocks.0.channel_mix.lerp_key",
    }
    adapter.save(tmp_path)
    saved = load_file(tmp_path / TRAINED_PARAMETERS)
    assert saved.keys() == raw
    assert torch.equal(saved["blocks.1.time_mix.bonus"], model.blocks[1].time_mix.bonus)


def test_the_folder_is_peft_s_own_layout(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    model = make_finch("6")
    adapter = attach_lora(model, rank=4, alpha=8, dropout=0.1, targets=TARGETS)
    disturb_(model)
    expected, _ = model.eval()(TOKENS)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    loaded = peft.PeftModel.from_pretrained(make_finch("6"), str(tmp_path))
    torch.testing.assert_close(loaded(TOKENS)[0], expected, rtol=0, atol=1e-6)
    assert not (tmp_path / TRAINED_PARAMETERS).exists()


def test_names_that_match_nothing_are_refused_with_the_nearest(make_finch: Callable[..., Finch]) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.targets: 'recptance' matches no matrix\. Nearest: .*receptance"):
        attach_lora(make_finch("6"), rank=4, alpha=8, targets=["key", "recptance"])
    with pytest.raises(RecipeError, match=r"adapter\.targets: 'bonus' matches no matrix"):
        attach_lora(make_finch("6"), rank=4, alpha=8, targets=["bonus"])
    with pytest.raises(RecipeError, match=r"adapter\.train_also: '\*\.bonuss' matches no parameter\. Nearest: .*bonus"):
        attach_lora(make_finch("6"), rank=4, alpha=8, targets=["key"], train_also=["*.bonuss"])
    with pytest.raises(RecipeError, match=r"adapter\.freeze: 'embeding\.\*' matches no parameter\. Nearest: embedding"):
        attach_full(make_finch("6"), freeze=["embeding.*"])


def test_full_fine_tuning_trains_all_but_what_is_frozen(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    attach_full(model, freeze=["embedding.*", "*norm*"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "embedding.weight" in frozen
    assert all(name == "embedding.weight" or "norm" in name for name in frozen)
    assert len(frozen) == sum("norm" in name for name, _ in model.named_parameters()) + 1
