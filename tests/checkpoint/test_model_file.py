"""Model files: what is read from the tensors, what is accepted, what is refused and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import infctx
from infctx.checkpoint.model_file import load_model, official_tensors, read_model_file
from infctx.errors import CheckpointError
from infctx.export.catalog import save_model
from infctx.model.finch import Finch

TOKENS = torch.arange(30)[None] % 50


def save(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture
def official(make_finch: Callable[..., Finch]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in official_tensors(make_finch("6")).items()}


@pytest.mark.parametrize("version", ["6", "5.2"])
@pytest.mark.parametrize("has_initial_state", [False, True])
@pytest.mark.parametrize("format", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_equal(
    make_finch: Callable[..., Finch],
    tmp_path: Path,
    version: str,
    has_initial_state: bool,
    format: str,
    dtype: torch.dtype,
) -> None:
    model = make_finch(version, has_initial_state=has_initial_state).to(dtype).float()
    path = tmp_path / f"model.{format}"
    infctx.save_model(model, path, format=format, dtype=dtype)
    loaded = infctx.load_model(path)
    assert loaded.config == model.config
    found, expected = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_model_file(path, dtype=None).model.embedding.weight.dtype == dtype


def test_keys_and_shapes_are_the_official_ones(official: dict[str, Tensor]) -> None:
    names = list(official)
    assert names[:8] == [
        "emb.weight",
        "blocks.0.ln1.weight",
        "blocks.0.ln1.bias",
        "blocks.0.ln2.weight",
        "blocks.0.ln2.bias",
        "blocks.0.ln0.weight",
        "blocks.0.ln0.bias",
        "blocks.0.att.time_maa_x",
    ]
    assert names[-3:] == ["ln_out.weight", "ln_out.bias", "head.weight"]
    shapes = {name.removeprefix("blocks.1."): list(tensor.shape) for name, tensor in official.items()}
    assert shapes["att.time_maa_x"] == shapes["att.time_decay"] == shapes["ffn.time_maa_k"] == [1, 1, 32]
    assert shapes["att.time_maa_w1"] == [32, 20]
    assert shapes["att.time_maa_w2"] == [5, 4, 32]
    assert shapes["att.time_decay_w1"] == [32, 6]
    assert shapes["att.time_decay_w2"] == [6, 32]
    assert shapes["att.time_faaaa"] == [4, 8]
    assert shapes["ffn.key.weight"] == [101, 32]
    assert "blocks.1.ln0.weight" not in official


def test_a_tuned_state_is_stored_value_axis_first(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", has_initial_state=True)
    stored = official_tensors(model)["blocks.1.att.time_state"]
    assert torch.equal(stored, model.blocks[1].time_mix.initial_state.transpose(1, 2))


@pytest.mark.parametrize("prefix", ["_forward_module.", "model."])
def test_prefixed_and_squeezed_keys_are_accepted(
    official: dict[str, Tensor], tmp_path: Path, make_finch: Callable[..., Finch], prefix: str
) -> None:
    squeezed = {prefix + name: tensor.squeeze() for name, tensor in official.items()}
    logits, _ = load_model(save(squeezed, tmp_path))(TOKENS)
    assert torch.equal(logits, make_finch("6")(TOKENS)[0])


@pytest.mark.parametrize("version", ["6", "5.2"])
def test_squeezed_tensors_of_one_head_are_what_they_were(
    make_finch: Callable[..., Finch], tmp_path: Path, version: str
) -> None:
    model = make_finch(version, n_embd=16, head_size=16, has_initial_state=True)
    squeezed = {name: tensor.squeeze().contiguous() for name, tensor in official_tensors(model).items()}
    assert squeezed["blocks.0.att.time_state"].dim() == 2
    logits, _ = load_model(save(squeezed, tmp_path))(TOKENS)
    assert torch.equal(logits, model(TOKENS)[0])


def test_hugging_face_layouts_of_others_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("layers.0.attention.wq.weight", "model.layers.0.self_attn.q_proj.weight"):
        with pytest.raises(CheckpointError, match="Hugging Face layout"):
            load_model(save({name: torch.zeros(2, 2)}, tmp_path))


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("blocks.0.att.k_k", "an RWKV-7 model"),
        ("blocks.0.att.time_maa_rkvw_w1", "an x060b or x060c experiment"),
        ("blocks.0.att.gate_w1", "an x060a experiment"),
        ("blocks.0.att.query.weight", "a model with attention of another kind"),
    ],
)
def test_other_architectures_are_refused_by_name(
    official: dict[str, Tensor], tmp_path: Path, extra: str, what: str
) -> None:
    with pytest.raises(CheckpointError, match=f"model.pth: this is {what}"):
        load_model(save(official | {extra: torch.zeros(2, 2)}, tmp_path))


def test_older_versions_are_refused_by_name(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    eagle = {name: tensor.contiguous() for name, tensor in official_tensors(make_finch("5.2")).items()}
    without_norm = {name: tensor for name, tensor in eagle.items() if "ln_x" not in name}
    without_gate = {name: tensor for name, tensor in eagle.items() if "gate" not in name}
    one_decay_a_head = eagle | {"blocks.0.att.time_decay": torch.zeros(4)}
    logarithmic = eagle | {"blocks.0.att.time_first": torch.zeros(4, 8)}
    for tensors, what in [
        (without_norm, "RWKV-4"),
        (without_gate, r"RWKV-5\.0"),
        (one_decay_a_head, r"RWKV-5\.1"),
        (logarithmic, "early RWKV-5"),
    ]:
        with pytest.raises(CheckpointError, match=what):
            load_model(save(tensors, tmp_path))


def test_a_converted_file_is_refused(official: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="converted by the rwkv package"):
        load_model(save(official | {"_strategy": "cpu fp32", "_version": 6}, tmp_path))


def test_damage_names_the_tensor(official: dict[str, Tensor], tmp_path: Path) -> None:
    def without(name: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in official.items() if key != name}

    cases = [
        (without("blocks.1.att.key.weight"), r"1 tensors are missing, first blocks\.1\.att\.key\.weight"),
        (without("emb.weight"), r"tensor emb\.weight is missing"),
        (official | {"blocks.2.ffn.key.weight": torch.zeros(7, 32)}, r"blocks\.2\.ffn\.key\.weight: expected shape"),
        (official | {"head.weight": torch.zeros(49, 32)}, r"head\.weight: expected shape \[50, 32\], found \[49, 32\]"),
        (official | {"ln_out.bias": torch.zeros(32, dtype=torch.int32)}, r"ln_out\.bias: expected a float dtype"),
        (official | {"blocks.0.att.key.lora_A": torch.zeros(2, 32)}, r"do not belong .*lora_A"),
        ({k: v for k, v in official.items() if not k.startswith("blocks.1.")}, r"blocks \[1\] are missing"),
        ({"weight": torch.zeros(2)}, "not an RWKV checkpoint"),
    ]
    for tensors, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load_model(save(tensors, tmp_path))


def test_missing_and_truncated_files_are_named(official: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        load_model(tmp_path / "nowhere.pth")
    path = save(official, tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.pth.*truncated"):
        load_model(path)


def test_the_tokenizer_is_recorded_in_safetensors(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    save_model(make_finch("6"), tmp_path / "m.safetensors", format="safetensors", tokenizer="bytes")
    assert read_model_file(tmp_path / "m.safetensors").tokenizer == "bytes"


def test_saving_refuses_what_it_cannot_do(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="format 'onnx': expected one of pth, safetensors"):
        save_model(make_finch("6"), tmp_path / "m.onnx", format="onnx")
    with pytest.raises(CheckpointError, match="does not exist"):
        save_model(make_finch("6"), tmp_path / "no" / "m.pth")
