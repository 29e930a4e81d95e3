"""infctx model convert and the formats of infctx export: round trips, and what is never replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import infctx
from infctx.checkpoint.weights import read_tensors, write_safetensors
from infctx.export import proved

FORMATS = ["pth", "safetensors", "shards", "hf", "fla"]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(infctx.load_model(path).named_parameters())


def convert(cli: Any, source: Path, output: Path, format: str, *more: object) -> dict[str, Any]:
    arguments = ["--format", "safetensors", "--shard-size", 0.00001] if format == "shards" else ["--format", format]
    return dict(cli("model", "convert", source, "--output", output, *arguments, *more, "--json").ok().json)


def test_a_chain_of_all_formats_ends_where_it_began(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    source = models["pth"]
    for number, format in enumerate(["hf", "shards", "fla", "safetensors", "hf", "pth"]):
        suffix = {"pth": ".pth", "safetensors": ".safetensors"}.get(format, "")
        output = tmp_path / f"{number}{suffix}"
        answer = convert(cli, source, output, format)
        assert answer["path"] == str(output)
        assert answer["max_logit_difference"] < 1e-5
        assert answer["bytes"] == sum(file.stat().st_size for file in [output, *output.rglob("*")] if file.is_file())
        source = output
    expected, found = tensors_of(models["pth"]), tensors_of(source)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    shards = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert shards[0] == f"model-00001-of-{len(shards) - 1:05}.safetensors"
    assert shards[-1] == "model.safetensors.index.json"
    assert len(shards) > 3


def test_the_dtype_is_kept_unless_another_is_asked_for(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    convert(cli, models["pth"], tmp_path / "half.safetensors", "safetensors", "--dtype", "fp16")
    convert(cli, tmp_path / "half.safetensors", tmp_path / "kept", "hf")
    tensors, metadata = read_tensors(tmp_path / "kept")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert metadata["infctx.tokenizer"] == "bytes"
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["torch_dtype"] == "float16"
    assert infctx.load_model(tmp_path / "kept").config == infctx.load_model(models["pth"]).config


def test_a_folder_is_replaced_only_if_an_export_wrote_all_of_it(
    cli: Any, models: dict[str, Path], tmp_path: Path, snapshot: Any
) -> None:
    output = tmp_path / "model"
    convert(cli, models["pth"], output, "hf")
    before = snapshot(tmp_path)
    command = ["model", "convert", models["other"], "--output", output, "--format", "hf"]
    cli(*command).refused(str(output), "exists", "--force")
    assert snapshot(tmp_path) == before
    cli(*command, "--force").ok()
    assert torch.equal(tensors_of(output)["head.weight"], tensors_of(models["other"])["head.weight"])
    (output / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    cli(*command, "--force").refused("notes.txt", "no export wrote")
    assert snapshot(tmp_path) == before
    # A folder that is there and empty is as good as none.
    (tmp_path / "empty").mkdir()
    convert(cli, models["pth"], tmp_path / "empty", "fla")
    # A model may be replaced by itself in another dtype.
    convert(cli, tmp_path / "empty", tmp_path / "empty", "fla", "--force", "--dtype", "bf16")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "empty")[0].values()} == {torch.bfloat16}


def test_an_export_that_reads_back_wrong_leaves_nothing(
    cli: Any, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrong(source: Any, path: Path, format: str, options: Any) -> list[str]:
        tensors = {name: tensor.read().clone() for name, tensor in source.tensors.items()}
        tensors["blocks.1.att.time_faaaa"] += 0.1
        write_safetensors(path, tensors)
        return []

    monkeypatch.setattr(proved, "write_prepared", write_wrong)
    output = tmp_path / "wrong.safetensors"
    output.write_text("what was here")
    command = ["model", "convert", models["pth"], "--output", output, "--force"]
    cli(*command).refused("wrong.safetensors", "read back", "Nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]
    assert output.read_text() == "what was here"


def test_the_world_tokenizer_goes_into_a_hub_folder(cli: Any, tmp_path: Path) -> None:
    model = tmp_path / "world.pth"
    cli("model", "new", "--layers", 2, "--channels", 64, "--ffn", 64, "--output", model).ok()
    ended = cli("model", "convert", model, "--output", tmp_path / "hub", "--format", "hf", "--json").ok()
    # The published code takes the feed-forward width from the channels: this one it cannot load.
    assert any("dim_ffn 64 (it expects 224)" in note for note in ended.json["notes"])
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "RWKV/v6-Finch-1B6-HF--configuration_rwkv6.Rwkv6Config"
    vocabulary = (tmp_path / "hub" / "rwkv_vocab_v20230424.txt").read_text(encoding="utf-8").splitlines()
    assert vocabulary[0].startswith("1 ")
    assert vocabulary[-1].startswith("65529 ")
    code = tmp_path / "code"
    code.mkdir()
    for name in ("configuration_rwkv6.py", "modeling_rwkv6.py", "hf_rwkv_tokenizer.py", "other.py"):
        (code / name).write_text(f"# {name}\n")
    command = ["model", "convert", model, "--output", tmp_path / "hub", "--format", "hf", "--code", code, "--force"]
    cli(*command).ok()
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_rwkv6.Rwkv6ForCausalLM"
    assert (tmp_path / "hub" / "hf_rwkv_tokenizer.py").read_text() == "# hf_rwkv_tokenizer.py\n"
    assert not (tmp_path / "hub" / "other.py").exists()
    tokenizer = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())
    assert tokenizer["auto_map"]["AutoTokenizer"] == ["hf_rwkv_tokenizer.Rwkv6Tokenizer", None]


def test_a_tuned_state_goes_into_formats_that_have_a_place_for_it(cli: Any, make_finch: Any, tmp_path: Path) -> None:
    model = make_finch("6", has_initial_state=True)
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.initial_state.normal_()
    infctx.save_model(model, tmp_path / "tuned.pth", dtype=torch.float32)
    for format in ("hf", "fla"):
        ended = cli("model", "convert", tmp_path / "tuned.pth", "--output", tmp_path / "x", "--format", format)
        ended.refused("tuned initial state", format, "safetensors")
    convert(cli, tmp_path / "tuned.pth", tmp_path / "x.safetensors", "safetensors")
    assert torch.equal(
        tensors_of(tmp_path / "x.safetensors")["blocks.1.time_mix.initial_state"],
        model.blocks[1].time_mix.initial_state,
    )


@pytest.mark.parametrize("format", ["fla", "gguf"])
def test_an_eagle_becomes_a_finch_where_only_finches_are_known(
    cli: Any, make_finch: Any, tmp_path: Path, format: str
) -> None:
    eagle = make_finch("5.2", vocab_size=257)
    infctx.save_model(eagle, tmp_path / "eagle.pth", dtype=torch.float32)
    output = tmp_path / ("finch.gguf" if format == "gguf" else "finch")
    answer = convert(cli, tmp_path / "eagle.pth", output, format)
    assert answer["max_logit_difference"] < 1e-4
    assert any("this Eagle is written as the Finch" in note for note in answer["notes"])
    finch = infctx.load_model(output)
    assert finch.config.version == "6"
    tokens = torch.arange(60)[None]
    torch.testing.assert_close(finch(tokens)[0], eagle(tokens)[0], rtol=0, atol=1e-4)
    layout = cli("model", "info", output, "--json").ok().json["layout"]
    assert layout == {"fla": "flash-linear-attention", "gguf": "GGUF"}[format]
