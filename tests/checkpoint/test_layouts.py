"""Other layouts: names and numbers written out here by hand, round trips, tensors too few and too many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import infctx
from infctx.checkpoint.model_file import official_tensors, open_model
from infctx.checkpoint.weights import read_tensors, write_pth, write_safetensors
from infctx.errors import CheckpointError
from infctx.model.finch import Finch

TOKENS = torch.arange(40)[None] % 50
HF_LAYER = """ln1.weight ln1.bias ln2.weight ln2.bias attention.time_maa_x attention.time_maa_w attention.time_maa_k
attention.time_maa_v attention.time_maa_r attention.time_maa_g attention.time_maa_w1 attention.time_maa_w2
attention.time_decay attention.time_decay_w1 attention.time_decay_w2 attention.time_faaaa attention.receptance.weight
attention.key.weight attention.value.weight attention.gate.weight attention.output.weight attention.ln_x.weight
attention.ln_x.bias feed_forward.time_maa_k feed_forward.time_maa_r feed_forward.key.weight
feed_forward.receptance.weight feed_forward.value.weight"""
EAGLE_LAYER = """ln1.weight ln1.bias ln2.weight ln2.bias attention.time_mix_key attention.time_mix_value
attention.time_mix_receptance attention.time_mix_gate attention.time_decay attention.time_faaaa
attention.receptance.weight attention.key.weight attention.value.weight attention.gate.weight attention.output.weight
attention.ln_x.weight attention.ln_x.bias feed_forward.time_mix_key feed_forward.time_mix_receptance
feed_forward.key.weight feed_forward.receptance.weight feed_forward.value.weight"""
TOP = "rwkv.embeddings.weight rwkv.blocks.0.pre_ln.weight rwkv.blocks.0.pre_ln.bias rwkv.ln_out.weight rwkv.ln_out.bias"


def save(model: Finch, path: Path, format: str) -> dict[str, Tensor]:
    infctx.save_model(model, path, format=format, dtype=torch.float32)
    return read_tensors(path)[0]


@pytest.mark.parametrize(("version", "layer"), [("6", HF_LAYER), ("5.2", EAGLE_LAYER)])
def test_the_hub_layout_has_its_names_and_the_official_numbers(
    make_finch: Callable[..., Finch], tmp_path: Path, version: str, layer: str
) -> None:
    model = make_finch(version)
    found = save(model, tmp_path / "m", "hf")
    expected = {f"rwkv.blocks.{i}.{name}" for i in range(3) for name in layer.split()} | {*TOP.split(), "head.weight"}
    assert set(found) == expected
    official = official_tensors(model)
    assert found["rwkv.blocks.1.attention.key.weight"].equal(official["blocks.1.att.key.weight"])
    assert found["rwkv.blocks.0.pre_ln.bias"].equal(official["blocks.0.ln0.bias"])
    mix = "time_maa_r" if version == "6" else "time_mix_r"
    theirs = "time_maa_r" if version == "6" else "time_mix_receptance"
    assert found[f"rwkv.blocks.2.attention.{theirs}"].equal(official[f"blocks.2.att.{mix}"])
    assert found[f"rwkv.blocks.2.feed_forward.{theirs}"].equal(official[f"blocks.2.ffn.{mix}"])


def test_the_fla_layout_has_its_names_and_numbers(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    """Element by element, from the description of that layout."""
    model = make_finch("6")  # C 32, D 4, E 6
    found, official = save(model, tmp_path / "m", "fla"), official_tensors(model)
    theirs, ours = "model.layers.1.attn", "blocks.1.att"
    order = ["r", "w", "k", "v", "g"]
    official_order = ["w", "k", "v", "r", "g"]
    for group, mix in enumerate(order):
        there = official_order.index(mix)
        for rank in range(4):
            column = official[f"{ours}.time_maa_w1"][:, there * 4 + rank]
            assert found[f"{theirs}.x_proj.0.linear.weight"][group * 4 + rank].equal(column)
            row = official[f"{ours}.time_maa_w2"][there, rank]
            assert found[f"{theirs}.x_proj.2.weight"][:, group * 4 + rank].equal(row)
        assert found[f"{theirs}.x_bias"][group].equal(official[f"{ours}.time_maa_{mix}"].flatten())
    assert found[f"{theirs}.x_proj.0.mu"].equal(official[f"{ours}.time_maa_x"].flatten())
    assert found[f"{theirs}.w_proj.linear.lora.0.weight"].equal(official[f"{ours}.time_decay_w1"].t())
    assert found[f"{theirs}.w_proj.linear.lora.2.weight"].equal(official[f"{ours}.time_decay_w2"].t())
    assert found[f"{theirs}.w_proj.linear.lora.2.bias"].equal(official[f"{ours}.time_decay"].flatten())
    assert found[f"{theirs}.bonus"].equal(official[f"{ours}.time_faaaa"])
    for short, long in {"r": "receptance", "k": "key", "g": "gate"}.items():
        assert found[f"{theirs}.{short}_proj.linear.weight"].equal(official[f"{ours}.{long}.weight"])
    # Norms of values / 8 with epsilon 1e-5 are norms of the values with epsilon 64e-5.
    assert found[f"{theirs}.v_proj.linear.weight"].equal(official[f"{ours}.value.weight"] / 8)
    assert found[f"{theirs}.o_proj.weight"].equal(official[f"{ours}.output.weight"])
    assert found[f"{theirs}.g_norm.bias"].equal(official[f"{ours}.ln_x.bias"])
    ffn = "model.layers.2.ffn"
    assert found[f"{ffn}.key.mu"].equal(official["blocks.2.ffn.time_maa_k"].flatten())
    assert found[f"{ffn}.receptance.mu"].equal(official["blocks.2.ffn.time_maa_r"].flatten())
    assert found[f"{ffn}.value.weight"].equal(official["blocks.2.ffn.value.weight"])
    assert found["model.layers.0.pre_norm.weight"].equal(official["blocks.0.ln0.weight"])
    assert found["model.layers.2.ffn_norm.bias"].equal(official["blocks.2.ln2.bias"])
    assert found["lm_head.weight"].equal(official["head.weight"])
    assert len(found) == 6 + 3 * 24


@pytest.mark.parametrize(("version", "format"), [("6", "hf"), ("6", "fla"), ("5.2", "hf"), ("6", "safetensors")])
def test_what_is_written_reads_back_bit_for_bit(
    make_finch: Callable[..., Finch], tmp_path: Path, version: str, format: str
) -> None:
    model = make_finch(version)
    save(model, tmp_path / "m", format)
    expected, opened = official_tensors(model), open_model(tmp_path / "m")
    assert list(opened.tensors) == list(expected)
    for name, stored in opened.tensors.items():
        assert stored.read().equal(expected[name]), name
    assert opened.config == model.config
    assert torch.equal(infctx.load_model(tmp_path / "m")(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("is_sharded", [False, True])
def test_older_folders_of_bin_files(make_finch: Callable[..., Finch], tmp_path: Path, is_sharded: bool) -> None:
    model = make_finch("5.2")
    tensors = save(model, tmp_path / "m", "hf")
    folder = tmp_path / "old"
    folder.mkdir()
    if is_sharded:
        names = sorted(tensors)
        shard_of = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for shard in set(shard_of.values()):
            write_pth(folder / shard, {name: tensors[name] for name in names if shard_of[name] == shard})
        (folder / "pytorch_model.bin.index.json").write_text(
            str({"metadata": {}, "weight_map": shard_of}).replace("'", '"')
        )
    else:
        write_pth(folder / "pytorch_model.bin", tensors)
    assert torch.equal(infctx.load_model(folder)(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("format", ["hf", "fla"])
def test_missing_and_foreign_tensors_are_named_with_the_nearest(
    make_finch: Callable[..., Finch], tmp_path: Path, format: str
) -> None:
    tensors = save(make_finch("6"), tmp_path / "m", format)
    name = next(name for name in tensors if name.endswith("value.weight"))
    misspelt = name.replace("value", "valve")
    renamed = {misspelt if key == name else key: tensor for key, tensor in tensors.items()}
    write_safetensors(tmp_path / "renamed.safetensors", renamed)
    with pytest.raises(CheckpointError, match=rf"{name}.*Nearest in the file: {misspelt}"):
        infctx.load_model(tmp_path / "renamed.safetensors")
    write_safetensors(tmp_path / "more.safetensors", {**tensors, misspelt: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=rf"{misspelt}.*Nearest that does: {name}"):
        infctx.load_model(tmp_path / "more.safetensors")
    bonus = next(name for name in tensors if name.endswith(("bonus", "time_faaaa")))
    write_safetensors(tmp_path / "shape.safetensors", {**tensors, bonus: torch.zeros(2, 3, 4)})
    with pytest.raises(CheckpointError, match=r"time_faaaa: expected .*found \[2, 3, 4\]"):
        infctx.load_model(tmp_path / "shape.safetensors")


def test_fla_folders_of_others_hold_the_values_as_they_are(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    model = make_finch("6")
    tensors = save(model, tmp_path / "m", "fla")
    undone = {name: tensor * 8 if "v_proj" in name else tensor for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", undone, {"format": "pt"})
    assert torch.equal(infctx.load_model(tmp_path / "model.safetensors")(TOKENS)[0], model(TOKENS)[0])


def test_a_damaged_low_rank_pair_of_fla_is_an_error(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    tensors = save(make_finch("6"), tmp_path / "m", "fla")
    for name, shape in (
        ("x_proj.2.weight", (32, 7)),
        ("x_bias", (4, 32)),
        ("x_bias", (6, 32)),
        ("x_proj.0.linear.weight", (20,)),
    ):
        full = f"model.layers.1.attn.{name}"
        write_safetensors(tmp_path / "bad.safetensors", {**tensors, full: torch.zeros(shape)})
        with pytest.raises(CheckpointError, match=r"bad.safetensors: tensor .*found"):
            infctx.load_model(tmp_path / "bad.safetensors")
