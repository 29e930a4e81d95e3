"""Merged matrices equal each kind's formula, written out; merged files compute in the official runtime what ours do."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infctx.adapters.model_changes import apply_to
from infctx.adapters.rwkv_peft.read import read_rwkv_peft, with_alpha, with_start
from infctx.checkpoint.model_file import build_model, load_model, official_tensors, tensors_of
from infctx.checkpoint.weights import read_tensors, write_pth
from infctx.errors import CheckpointError
from infctx.export.adapter_files import merge_adapter, read_adapter
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors

Adapter = Callable[..., dict[str, Tensor]]
FILE = "rwkv-0.pth"


@pytest.fixture(scope="module", params=["6", "5.2"])
def base(request: pytest.FixtureRequest, make_finch: Callable[..., Finch]) -> ModelTensors:
    return tensors_of(make_finch(request.param, n_layer=2, n_embd=24, dim_ffn=56, dtype=torch.float64))


def values_of(model: ModelTensors) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in model.tensors.items()}


def lora_by_hand(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    rows, columns = weight.shape
    merged = weight.clone()
    for o in range(rows):
        for c in range(columns):
            merged[o, c] += scale * sum(float(up[o, j]) * float(down[j, c]) for j in range(len(down)))
    return merged


def disha_by_hand(weight: Tensor, disha: Tensor) -> Tensor:
    rank = len(disha)
    merged = weight.clone()
    for o in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            merged[o, c] += disha[c - rank * (c // rank), o]
    return merged


def bat_by_hand(weight: Tensor, disha: Tensor) -> Tensor:
    rank = disha.shape[1]
    merged = weight.clone()
    for a in range(weight.shape[0] // rank):
        for b in range(weight.shape[1] // rank):
            rows, columns = slice(a * rank, (a + 1) * rank), slice(b * rank, (b + 1) * rank)
            merged[rows, columns] += weight[rows, columns] @ disha[b] + disha[b]
    return merged


@pytest.mark.parametrize("kind", ["lora", "pissa", "disha", "bat"])
def test_merged_matrices_are_the_formula(base: ModelTensors, make_adapter: Adapter, kind: str) -> None:
    before = values_of(base)
    # 24 and 56 channels: blocks of 5 leave a partial one, tiles of 4 fit.
    rank = {"disha": 5, "bat": 4}.get(kind, 3)
    tensors = make_adapter(before, {"pissa": "lora"}.get(kind, kind), rank=rank, dtype=torch.float64)
    start = make_adapter(before, "start", rank=rank, dtype=torch.float64, seed=1)
    changes = read_rwkv_peft(tensors, file=FILE)
    if kind == "pissa":
        changes = with_start(changes, start, file=FILE, start_file="init_pissa.pth")
    else:
        changes = with_alpha(changes, 32.0 if kind == "lora" else None, file=FILE)
    after = values_of(apply_to(base, changes, file=FILE))
    assert list(after) == list(before)
    matrices = {name.rpartition(".")[0] for name in tensors}
    assert len(matrices) == 16
    for name, weight in before.items():
        matrix = name.removesuffix(".weight")
        if matrix not in matrices:
            assert torch.equal(after[name], weight), name
            continue
        if kind in ("disha", "bat"):
            by_hand = (disha_by_hand if kind == "disha" else bat_by_hand)(weight, tensors[f"{matrix}.disha"])
        else:
            scale = 32.0 / rank if kind == "lora" else 1.0
            by_hand = lora_by_hand(weight, tensors[f"{matrix}.lora_A"], tensors[f"{matrix}.lora_B"], scale)
        if kind == "pissa":
            first = [start[f"model.{matrix}.init_lora_{part}"] for part in "AB"]
            by_hand = lora_by_hand(by_hand, first[0], first[1], -1.0)
        assert float((by_hand - weight).abs().max()) > 0.1
        torch.testing.assert_close(after[name], by_hand, rtol=0, atol=1e-12)


def test_a_bf16_base_is_merged_in_float32(make_finch: Callable[..., Finch], make_adapter: Adapter) -> None:
    base = tensors_of(make_finch("6", n_layer=2, dtype=torch.bfloat16))
    tensors = make_adapter(values_of(base), "lora", dtype=torch.bfloat16)
    changes = with_alpha(read_rwkv_peft(tensors, file=FILE), 8.0, file=FILE)
    merged = apply_to(base, changes, file=FILE).tensors
    name = "blocks.1.ffn.value"
    found, weight = merged[f"{name}.weight"].read(), base.tensors[f"{name}.weight"].read()
    assert found.dtype == merged[f"{name}.weight"].dtype == torch.float32
    expected = weight.double() + 2.0 * tensors[f"{name}.lora_B"].double() @ tensors[f"{name}.lora_A"].double()
    assert float((found - expected).abs().max()) < 1e-6
    assert merged["emb.weight"].dtype == torch.bfloat16


def test_whole_tensors_beside_the_adapter_replace_the_base_s(base: ModelTensors, make_adapter: Adapter) -> None:
    before = values_of(base)
    tensors = make_adapter(before, "lora", dtype=torch.float64)
    vector = next(name for name, tensor in before.items() if tensor.dim() == 3 and tensor.shape[:2] == (1, 1))
    tensors["ln_out.weight"] = before["ln_out.weight"] + 1
    tensors[vector] = before[vector].flatten() + 2  # squeezed, as some trainers write it
    tensors["blocks.1.att.key.weight"] = before["blocks.1.att.key.weight"] * 3
    after = values_of(apply_to(base, with_alpha(read_rwkv_peft(tensors, file=FILE), 4.0, file=FILE), file=FILE))
    assert torch.equal(after["ln_out.weight"], before["ln_out.weight"] + 1)
    assert torch.equal(after[vector], before[vector] + 2)
    by_hand = lora_by_hand(
        before["blocks.1.att.key.weight"] * 3,
        tensors["blocks.1.att.key.lora_A"],
        tensors["blocks.1.att.key.lora_B"],
        1.0,
    )
    torch.testing.assert_close(after["blocks.1.att.key.weight"], by_hand, rtol=0, atol=1e-12)


def test_a_state_becomes_the_initial_state_value_axis_first(base: ModelTensors, make_adapter: Adapter) -> None:
    state = make_adapter(values_of(base), "state", dtype=torch.float64)
    merged = build_model(apply_to(base, read_rwkv_peft(state, file=FILE), file=FILE), dtype=None)
    for i, block in enumerate(merged.blocks):
        for h in range(merged.config.n_head):
            for key in range(merged.config.head_size):
                for value in range(merged.config.head_size):
                    stored = state[f"blocks.{i}.att.time_state"][h, value, key]
                    assert block.time_mix.initial_state[h, key, value] == stored
    # Given again to a model that has one: it replaces it.
    again = apply_to(
        tensors_of(merged), read_rwkv_peft(make_adapter(values_of(base), "state", seed=5), file=FILE), file=FILE
    )
    assert not torch.equal(again.tensors["blocks.0.att.time_state"].read(), state["blocks.0.att.time_state"])


def wrong_layer(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.7.att.key.lora_A"] = tensors["blocks.0.att.key.lora_A"]
    tensors["blocks.7.att.key.lora_B"] = tensors["blocks.0.att.key.lora_B"]


def missing_layer(tensors: dict[str, Tensor]) -> None:
    del tensors["blocks.1.ffn.key.lora_A"], tensors["blocks.1.ffn.key.lora_B"]


def wrong_width(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.att.value.lora_A"] = torch.ones(4, 23)


def wrong_whole(tensors: dict[str, Tensor]) -> None:
    tensors["ln_out.bias"] = torch.ones(25)


def half_a_state(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.att.time_state"] = torch.ones(3, 8, 8)


def other_version(tensors: dict[str, Tensor]) -> None:
    for name in ("time_maa_x", "time_mix_k"):
        tensors[f"blocks.0.att.{name}"] = torch.ones(24)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (wrong_layer, ["blocks.7.att.key", "layers 0 to 1"]),
        (missing_layer, ["blocks.1.ffn.key", "no adapter"]),
        (wrong_width, ["blocks.1.att.value.lora_A", "[r, 24]", "[4, 23]"]),
        (wrong_whole, ["ln_out.bias", "[24]", "[25]"]),
        (half_a_state, ["blocks.1.att.time_state", "missing"]),
        (other_version, ["blocks.0.att.time_m", "no such tensor"]),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    base: ModelTensors, make_adapter: Adapter, damage: Callable[[dict[str, Tensor]], None], words: list[str]
) -> None:
    tensors = make_adapter(values_of(base), "lora")
    damage(tensors)
    changes = with_alpha(read_rwkv_peft(tensors, file=FILE), 4.0, file=FILE)
    with pytest.raises(CheckpointError) as refusal:
        apply_to(base, changes, file=FILE)
    assert all(word in str(refusal.value) for word in [FILE, *words]), refusal.value


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("disha", (4, 23), ["[r, 24]", "[4, 23]"]),
        ("disha", (25, 24), ["at most 24", "[25, 24]"]),
        ("disha", (5, 4, 4), ["[6, 4, 4]", "[5, 4, 4]"]),
        ("disha", (4, 5, 5), ["divides 24 and 24", "[4, 5, 5]"]),
        ("time_state", (3, 8, 7), ["[3, 8, 8]", "[3, 8, 7]"]),
    ],
)
def test_other_kinds_that_do_not_fit(base: ModelTensors, name: str, shape: tuple[int, ...], words: list[str]) -> None:
    matrix = "blocks.{}.att." + ("key.disha" if name == "disha" else name)
    changes = read_rwkv_peft({matrix.format(i): torch.ones(shape) for i in range(2)}, file=FILE)
    with pytest.raises(CheckpointError) as refusal:
        apply_to(base, changes, file=FILE)
    assert all(word in str(refusal.value) for word in [FILE, name, *words]), refusal.value


# The official runtime


def official_logits(path: Path, tokens: list[int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV

        official: Any = RWKV(model=os.fspath(path.with_suffix("")), strategy="cpu fp32", verbose=False)
    return official.forward(tokens, None, full_output=True)[0]


@pytest.mark.parametrize(
    ("kind", "version"),
    [*((kind, "6") for kind in ("lora", "pissa", "disha", "bat", "state")), ("lora", "5.2"), ("state", "5.2")],
)
@torch.no_grad()
def test_merged_files_in_the_official_runtime(
    make_finch: Callable[..., Finch], make_adapter: Adapter, tmp_path: Path, kind: str, version: str
) -> None:
    model = make_finch(version, n_layer=2, n_embd=64, head_size=32, dim_ffn=96, vocab_size=300)
    base = official_tensors(model)
    start = None
    write_pth(tmp_path / FILE, make_adapter(base, {"pissa": "lora"}.get(kind, kind), rank=8))
    if kind == "pissa":
        start = tmp_path / "init_pissa.pth"
        write_pth(start, make_adapter(base, "start", rank=8, seed=3))
    changes = read_adapter(tmp_path / FILE, alpha=8.0 if kind == "lora" else None, start=start)
    assert changes.kind == {"bat": "disha_bat"}.get(kind, kind)
    merged = merge_adapter(tensors_of(model), changes, file=FILE)
    write_pth(tmp_path / "merged.pth", merged.tensors)
    tokens = torch.randint(0, 300, (1, 33))
    ours = load_model(tmp_path / "merged.pth")(tokens)[0][0]
    # Logits of standard deviation about 1.
    torch.testing.assert_close(ours, official_logits(tmp_path / "merged.pth", tokens[0].tolist()), rtol=0, atol=1e-4)
    assert float((ours - model(tokens)[0][0]).abs().max()) > 0.1
    assert torch.equal(ours, build_model(merged)(tokens)[0][0])


def test_nothing_is_merged_before_it_is_read(
    make_finch: Callable[..., Finch], make_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infctx.adapters.weight_updates import LowRank

    applied = []
    apply = LowRank.apply
    monkeypatch.setattr(LowRank, "apply", lambda self, weight: applied.append(1) or apply(self, weight))
    base = tensors_of(make_finch("6"))
    changes = with_alpha(read_rwkv_peft(make_adapter(values_of(base), "lora"), file=FILE), 4.0, file=FILE)
    merged = apply_to(base, changes, file=FILE)
    assert applied == []
    merged.tensors["blocks.0.att.key.weight"].read()
    assert applied == [1]


def test_files_of_every_float_dtype_are_read_back(
    tmp_path: Path, make_finch: Callable[..., Finch], make_adapter: Adapter
) -> None:
    base = official_tensors(make_finch("6", n_layer=2))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        torch.save(make_adapter(base, "lora", dtype=dtype), tmp_path / "x.pth")
        changes = read_adapter(tmp_path / "x.pth", alpha=4.0)
        stored = read_tensors(tmp_path / "x.pth")[0]
        assert torch.equal(changes.updates["blocks.0.att.key"].down, stored["blocks.0.att.key.lora_A"])
