"""Adapter folders: of another base, of other programs, and damaged ones."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import infctx
from infctx.adapters.load import load_adapter
from infctx.adapters.peft_adapters import attach_lora
from infctx.adapters.state_tuning import attach_state
from infctx.errors import CheckpointError
from infctx.model.finch import Finch

TOKENS = torch.arange(30)[None] % 50


@pytest.fixture
def finch(make_finch: Callable[..., Finch]) -> Callable[..., Finch]:
    return lambda **sizes: make_finch("6", n_layer=2, **sizes)


@pytest.fixture
def folder(finch: Callable[..., Finch], tmp_path: Path) -> Path:
    """A saved LoRA with a raw parameter, of the base 0123."""
    model = finch()
    adapter = attach_lora(model, rank=4, alpha=8, targets=["key", "gate"], train_also=["*.bonus"])
    path = tmp_path / "adapter"
    path.mkdir()
    adapter.save(path, base_fingerprint="0123")
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other people's warnings are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def change(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_another_base_is_refused_naming_both(finch: Callable[..., Finch], folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"belongs to the base model with fingerprint 0123; this one has 4567"):
        load_adapter(finch(), folder, base_fingerprint="4567")
    load_adapter(finch(), folder, base_fingerprint="0123")
    load_adapter(finch(), folder, base_fingerprint=None)


def test_what_peft_wrote_elsewhere_is_read(finch: Callable[..., Finch], tmp_path: Path) -> None:
    theirs = finch()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["key"], rank_pattern={"channel_mix.key": 2})
    wrapped = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    expected, _ = theirs(TOKENS)
    with _quiet():
        wrapped.save_pretrained(str(tmp_path))
    change(tmp_path / "adapter_config.json", task_type="CAUSAL_LM")
    model = finch()
    adapter = load_adapter(model, tmp_path, base_fingerprint="4567")
    torch.testing.assert_close(model(TOKENS)[0], expected, rtol=0, atol=1e-6)
    assert {p.requires_grad for name, p in model.named_parameters() if "lora_" in name} == {True}
    adapter.save(tmp_path, base_fingerprint="4567")
    assert json.loads((tmp_path / "infctx.json").read_text())["base_fingerprint"] == "4567"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim_ffn": 90}, r"channel_mix\.key\.lora_B\.weight: expected \[90, 4\], found \[101, 4\]"),
        ({"head_size": 16}, r"tensor blocks\.0\.time_mix\.bonus: expected \[2, 16\], found \[4, 8\]"),
    ],
)
def test_a_model_of_other_sizes_is_refused(
    finch: Callable[..., Finch], folder: Path, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_adapter(finch(**sizes), folder, base_fingerprint=None)


@pytest.mark.parametrize("is_missing", [True, False])
def test_tensors_that_are_missing_or_too_many_are_named_with_the_nearest(
    finch: Callable[..., Finch], folder: Path, is_missing: bool
) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.blocks.0.time_mix.key.lora_A.weight"
    tensor = tensors.pop(name)
    tensors |= {} if is_missing else {name: tensor, name.replace("key", "kee"): tensor.clone()}
    save_file(tensors, path)
    what = f"{name} is missing" if is_missing else ".*kee.* belongs to nothing in the model"
    with pytest.raises(CheckpointError, match=rf"tensor {what}\. Nearest: .*lora_A"):
        load_adapter(finch(), folder, base_fingerprint=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type IA3: expected one of LORA, MISS"),
        ({"modules_to_save": ["head"]}, r"modules_to_save \['head'\]: infctx does not read"),
        ({"bias": "all"}, r"bias all: .* expected none"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights pissa_niter_4: .* plain LoRA"),
        ({"init_lora_weights": "lora_ga"}, r"init_lora_weights lora_ga: .* plain LoRA"),
        ({"target_modules": ["attention.key"]}, r"adapter_config\.json: does not fit the model: .*attention\.key"),
    ],
)
def test_what_cannot_be_loaded_rightly_is_refused(
    finch: Callable[..., Finch], folder: Path, changes: dict[str, object], message: str
) -> None:
    change(folder / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(finch(), folder, base_fingerprint=None)


def test_folders_that_are_none_or_damaged(finch: Callable[..., Finch], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not an adapter folder: it has neither"):
        load_adapter(finch(), tmp_path, base_fingerprint=None)
    (folder / "infctx.json").write_text('{"schema": 2}')
    with pytest.raises(CheckpointError, match=r"infctx\.json: expected schema 1"):
        load_adapter(finch(), folder, base_fingerprint=None)
    (folder / "infctx.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"infctx\.json: cannot be read as JSON"):
        load_adapter(finch(), folder, base_fingerprint=None)
    (folder / "infctx.json").unlink()
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: damaged"):
        load_adapter(finch(), folder, base_fingerprint=None)
    tensors.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(finch(), folder, base_fingerprint=None)


def test_state_tuning_goes_on_from_the_file_s_state_and_the_official_runtime_reads_it(
    make_finch: Callable[..., Finch], tmp_path: Path
) -> None:
    base = make_finch("6", n_embd=64, head_size=32, has_initial_state=True)
    begun = [block.time_mix.initial_state.clone() for block in base.blocks]
    attach_state(base)
    assert all(torch.equal(b.time_mix.initial_state, state) for b, state in zip(base.blocks, begun, strict=True))
    assert {n.rsplit(".", 1)[-1] for n, p in base.named_parameters() if p.requires_grad} == {"initial_state"}
    model = make_finch("6", n_embd=64, head_size=32)
    without = model(TOKENS)[0].detach()
    attach_state(model)
    assert torch.equal(model(TOKENS)[0], without)
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.initial_state.normal_()
    infctx.save_model(model, tmp_path / "tuned.pth", dtype=torch.float32)
    with _quiet():
        from rwkv.model import RWKV

        official = RWKV(model=str(tmp_path / "tuned"), strategy="cpu fp32", verbose=False)
    logits, _ = official.forward(TOKENS[0].tolist(), None, full_output=True)
    torch.testing.assert_close(model(TOKENS)[0][0].detach(), logits, rtol=0, atol=1e-4)
    assert float((logits - without[0]).abs().max()) > 0.1
