"""infctx model: new, info, upgrade, grow, vocabulary, merge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import infctx
from infctx.checkpoint.model_file import open_model
from infctx.model.finch import Finch

SIZES = {"n_layer": 2, "n_embd": 16, "vocab_size": 257, "head_size": 8, "dim_ffn": 32, "decay_rank": 4}


@pytest.fixture(scope="module")
def eagle(tmp_path_factory: pytest.TempPathFactory, make_finch: Callable[..., Finch]) -> Path:
    """Stored in bf16."""
    path = tmp_path_factory.mktemp("eagle") / "eagle.pth"
    infctx.save_model(make_finch("5.2", **SIZES), path, dtype=torch.bfloat16)
    return path


@pytest.fixture(autouse=True)
def _in_the_tests_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def logits_of(path: Path) -> Tensor:
    tokens = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return infctx.load_model(path)(tokens)[0]


def test_info(cli: Any, models: dict[str, Path]) -> None:
    path = models["safetensors"]
    facts = cli("model", "info", path, "--hash", "--check", "--tensors", "*.time_faaaa", "--json").ok().json
    assert facts["kind"] == "safetensors"
    assert facts["layout"] == "official"
    assert facts["num_bytes"] == path.stat().st_size
    assert facts["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert facts["bad_tensors"] == []
    assert facts["released"] is None
    assert sum(facts["parts"].values()) == facts["parameters"]
    assert facts["bytes"] == {"float32": 4 * facts["parameters"]}
    assert [row["name"] for row in facts["tensors"]] == [f"blocks.{i}.att.time_faaaa" for i in (0, 1)]
    assert facts["fingerprint"] == cli("model", "info", models["pth"], "--json").ok().json["fingerprint"]
    assert facts["fingerprint"] != cli("model", "info", models["other"], "--json").ok().json["fingerprint"]
    shown = cli("model", "info", models["pth"], "--check", "--tensors", "head.*").ok()
    assert "every value is a finite number" in shown.out
    assert "head.weight" in shown.out
    assert "kind            pth" in shown.out
    cli("model", "info", path, "--tensors", "nothing").refused("no tensor matches 'nothing'")


def test_info_of_a_folder(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(models["safetensors"].read_bytes())
    (folder / "config.json").write_text("{}")
    facts = cli("model", "info", folder, "--hash", "--json").ok().json
    assert facts["kind"] == "folder"
    assert facts["sha256"].keys() == {"config.json", "model.safetensors"}
    assert facts["num_bytes"] == models["safetensors"].stat().st_size + 2


def test_info_names_bad_tensors(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    tensors = torch.load(models["pth"], weights_only=True)
    tensors["emb.weight"][5, 3] = float("nan")
    tensors["blocks.1.ln2.bias"][:2] = float("inf")
    torch.save(tensors, tmp_path / "bad.pth")
    cli("model", "info", "bad.pth").ok()
    ended = cli("model", "info", "bad.pth", "--check", "--json")
    assert ended.code == 2
    assert ended.json["bad_tensors"] == [
        {"name": "emb.weight", "num_nan": 1, "num_infinite": 0},
        {"name": "blocks.1.ln2.bias", "num_nan": 0, "num_infinite": 2},
    ]
    assert "2 tensors" in ended.err
    assert "blocks.1.ln2.bias: 0 NaN, 2 infinite" in ended.err


NEW = ["model", "new", "--channels", 32, "--head-size", 8, "--vocab", 257]


@pytest.mark.parametrize(
    ("version", "arguments", "layers", "rope"),
    [
        ("6", [], "1 to 6: Finch", False),
        ("5.2", [], "1 to 6: Eagle", False),
        ("6c2", [], "1 to 6: Finch-C2", False),
        ("goldfinch", [], "1 to 4: Finch-C2; 5 to 6: GOLD (attention)", False),
        ("goldfinch", ["--ratio", 6, "--front", "6", "--rope"], "1 to 5: Finch; 6: GOLD (attention)", True),
        ("gptalpha", [], "1 to 6: GPTAlpha (attention)", True),
        ("gptalpha", ["--no-rope"], "1 to 6: GPTAlpha (attention)", False),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_new(cli: Any, version: str, arguments: list[object], layers: str, rope: bool, suffix: str) -> None:
    path = f"new.{suffix}"
    made = cli(*NEW, "--layers", 6, "--version", version, *arguments, "--output", path, "--json").ok().json
    info = cli("model", "info", path, "--json").ok().json
    assert (info["version"], info["layers"], info["uses_rope"]) == (version, layers, rope)
    assert info["parameters"] == made["parameters"]
    assert (info["head_size"], info["n_head"], info["vocab_size"]) == (8, 4, 257)
    assert logits_of(Path(path)).shape == (2, 40, 257)


def test_info_of_a_goldfinch(cli: Any) -> None:
    cli(*NEW, "--layers", 6, "--version", "goldfinch", "--dtype", "bf16", "--output", "gold.safetensors").ok()
    info = cli("model", "info", "gold.safetensors", "--json").ok().json
    assert info["cache_bytes_per_token"] == 4 + 32 // 16 * 2
    assert info["transformer_cache_bytes_per_token"] == 2 * 6 * 32 * 2
    shown = cli("model", "info", "gold.safetensors").ok().out
    assert "1 to 4: Finch-C2; 5 to 6: GOLD (attention)" in shown
    assert "cache_bytes_per_token 8" in shown


@pytest.mark.parametrize("name", ["finch.pth", "finch.safetensors"])
def test_upgrade(cli: Any, eagle: Path, name: str) -> None:
    result = cli("model", "upgrade", eagle, "--output", name, "--decay-rank", 5, "--json").ok()
    assert result.json["version"] == "6"
    assert result.json["max_logit_difference"] == 0.0
    assert "against the source" in result.err
    info = cli("model", "info", name, "--json").ok().json
    assert (info["lerp_rank"], info["decay_rank"]) == (32, 5)
    assert info["dtypes"] == ["bfloat16", "float32"]
    assert info["parameters"] == result.json["parameters"]
    torch.testing.assert_close(logits_of(Path(name)), logits_of(eagle), rtol=0, atol=1e-6)
    rounded = cli("model", "upgrade", eagle, "--output", f"16{name}", "--dtype", "bf16", "--json").ok().json
    assert rounded["max_logit_difference"] > 1e-4
    assert cli("model", "info", f"16{name}", "--json").ok().json["dtypes"] == ["bfloat16"]


def test_upgrade_to_goldfinch(cli: Any, models: dict[str, Path], eagle: Path) -> None:
    command = ["model", "upgrade", models["pth"], "--to", "goldfinch"]
    kept = cli(*command, "--ratio", 2, "--output", "kept.safetensors", "--json").ok()
    assert kept.json["version"] == "goldfinch"
    assert kept.json["max_logit_difference"] > 0.1
    assert -1 <= kept.json["logit_cosine"] < 1
    assert "train it on" in kept.err
    assert cli("model", "info", "kept.safetensors", "--json").ok().json["layers"] == "1: Finch; 2: GOLD (attention)"
    parts = [kept.json[f"{origin}_parameters"] for origin in ("kept", "changed", "fresh")]
    assert sum(parts) == kept.json["parameters"]
    assert parts[1] == 0
    assert all(f"{part:,}" in kept.err for part in parts)
    added = cli(*command, "--layers", "add", "--output", "added.pth", "--json").ok()
    assert added.json["max_logit_difference"] == 0.0
    assert "train it on" not in added.err
    assert added.json["kept_parameters"] == cli("model", "info", models["pth"], "--json").ok().json["parameters"]
    assert torch.equal(logits_of(Path("added.pth")), logits_of(models["pth"]))
    both = cli("model", "upgrade", eagle, "--to", "goldfinch", "--layers", "add", "--output", "b.pth", "--json").ok()
    assert both.json["max_logit_difference"] < 1e-5
    assert cli("model", "info", "b.pth", "--json").ok().json["front"] == "6"


def test_upgrade_to_finch_c2(cli: Any, models: dict[str, Path]) -> None:
    command = ["model", "upgrade", models["pth"], "--to", "finch-c2", "--output"]
    made = cli(*command, "c2.safetensors", "--json").ok()
    assert made.json["version"] == "6c2"
    assert made.json["max_logit_difference"] > 0.1
    assert "train it on" in made.err
    # And that may become a GoldFinch.
    gold = ["model", "upgrade", "c2.safetensors", "--to", "goldfinch", "--layers", "add", "--output"]
    assert cli(*gold, "gold.safetensors", "--json").ok().json["max_logit_difference"] == 0.0
    assert cli("model", "info", "gold.safetensors", "--json").ok().json["front"] == "6c2"


def test_grow(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    grow = ["model", "grow", models["pth"]]
    deeper = cli(*grow, "--layers", 3, "--lerp-rank", 33, "--output", "a.pth", "--json").ok().json
    assert deeper["max_logit_difference"] < 1e-5
    info = cli("model", "info", "a.pth", "--json").ok().json
    assert (info["n_layer"], info["lerp_rank"], info["decay_rank"]) == (3, 33, 4)
    torch.testing.assert_close(logits_of(tmp_path / "a.pth"), logits_of(models["pth"]), rtol=0, atol=1e-5)
    stacked = cli(*grow, "--layers", 4, "--how", "stack", "--output", "b.pth", "--json").ok()
    assert "max_logit_difference" not in stacked.json
    assert "train it on" in stacked.err
    scaled = cli(*grow, "--source-layers", "0,0,1", "--how", "scaled", "--scale", 0.5, "--output", "c.pth").ok()
    assert "train it on" in scaled.err
    source, result = open_model(models["pth"]), open_model(tmp_path / "c.pth")
    half = result.tensors["blocks.1.att.output.weight"].read()
    assert torch.equal(half, 0.5 * source.tensors["blocks.0.att.output.weight"].read())


def test_vocabulary(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    command = ["model", "vocabulary", models["pth"]]
    resized = cli(*command, "--size", 300, "--output", "a.safetensors", "--json").ok().json
    assert resized["max_logit_difference"] == 0.0
    info = cli("model", "info", "a.safetensors", "--json").ok().json
    assert (info["vocab_size"], info["tokenizer"]) == (300, "bytes")
    assert torch.equal(logits_of(tmp_path / "a.safetensors")[..., :257], logits_of(models["pth"]))
    smaller = cli(*command, "--size", 200, "--drop", "--output", "b.pth", "--json").ok().json
    assert smaller["max_logit_difference"] == 0.0
    (tmp_path / "tokens.txt").write_text(" call\nreturn \n\n", encoding="utf-8")
    added = cli(*command, "--token", "<x>", "--tokens", "tokens.txt", "--output", "c.safetensors", "--json").ok()
    assert added.json["ids"] == {"<x>": 257, " call": 258, "return ": 259}
    assert added.json["replaced_rows"] == 0
    assert added.json["max_logit_difference"] == 0.0
    assert "does not make them" in added.err


def test_a_vocabulary_file(cli: Any, make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    sizes = {**SIZES, "vocab_size": 65536, "n_embd": 8}
    with torch.device("meta"):
        model = make_finch("6", **sizes)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    infctx.save_model(model, tmp_path / "world.pth", dtype=torch.float32)
    command = ["model", "vocabulary", "world.pth", "--token", "<|call|>", "--first-id", 65530]
    added = cli(*command, "--vocabulary-file", "v.txt", "--output", "a.pth", "--json").ok().json
    assert (added["ids"], added["replaced_rows"]) == ({"<|call|>": 65530}, 1)
    lines = (tmp_path / "v.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(lines) == 65530
    assert lines[-1] == "65530 '<|call|>' 8"
    cli(*command, "--vocabulary-file", "v.txt", "--output", "b.pth").refused("v.txt", "exists", "--force")
    cli(*command, "--vocabulary-file", "world.pth", "--output", "b.pth", "--force").refused("world.pth", "read")
    assert not (tmp_path / "b.pth").exists()


def test_merge(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    pair = [models["pth"], models["other"]]
    cli("model", "merge", *pair, "--weight", 3, "--weight", 1, "--output", "a.pth", "--json").ok()
    name = "blocks.0.ffn.key.weight"
    x, y = (open_model(path).tensors[name].read() for path in pair)
    torch.testing.assert_close(open_model(tmp_path / "a.pth").tensors[name].read(), 0.75 * x + 0.25 * y)
    cli("model", "merge", *pair, "--weight", 3, "--weight", 1, "--no-normalize", "--output", "b.pth").ok()
    torch.testing.assert_close(open_model(tmp_path / "b.pth").tensors[name].read(), 3 * x + y)
    cli("model", "merge", *pair, "--method", "slerp", "--output", "c.safetensors", "--dtype", "fp16").ok()
    assert cli("model", "info", "c.safetensors", "--json").ok().json["dtypes"] == ["float16"]
    task = ["--method", "task", "--base", models["other"], "--weight", 1]
    cli("model", "merge", models["pth"], *task, "--output", "d.pth").ok()
    torch.testing.assert_close(logits_of(tmp_path / "d.pth"), logits_of(models["pth"]), rtol=0, atol=1e-4)


UPGRADE, GROW, VOCABULARY, MERGE = (["model", name] for name in ("upgrade", "grow", "vocabulary", "merge"))
OUT = ["--output", "out.pth"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*UPGRADE, "FINCH", *OUT], ["FINCH", "Eagle", "version 6"]),
        ([*UPGRADE, "FINCH", *OUT, "--to", "goose"], ["--to goose", "finch-c2"]),
        ([*UPGRADE, "FINCH", *OUT, "--to", "finch-c2", "--ratio", 3], ["--ratio", "--to goldfinch"]),
        ([*UPGRADE, "FINCH", *OUT, "--to", "goldfinch", "--ratio", 1], ["--ratio"]),
        ([*UPGRADE, "FINCH", *OUT, "--to", "goldfinch", "--layers", "all"], ["'all'", "keep, add"]),
        ([*UPGRADE, "FINCH", *OUT, "--to", "goldfinch", "--lerp-rank", 3], ["FINCH", "Eagle", "model grow"]),
        ([*NEW, *OUT, "--layers", 6, "--ratio", 3], ["ratio", "goldfinch only", "version 6"]),
        ([*NEW, *OUT, "--layers", 6, "--version", "6c2", "--front", "6"], ["front", "goldfinch only", "version 6c2"]),
        ([*NEW, *OUT, "--layers", 6, "--no-rope"], ["rope", "goldfinch or gptalpha", "version 6"]),
        ([*NEW, *OUT, "--layers", 6, "--version", "goldfinch", "--front", "5.2"], ["front '5.2'", "6c2 or 6"]),
        ([*NEW, *OUT, "--layers", 6, "--version", "7"], ["'7'", "goldfinch"]),
        ([*NEW, *OUT, "--layers", 6, "--version", "goldfinch", "--ratio", 1], ["--ratio"]),
        ([*UPGRADE, "EAGLE", "--output", "there.pth"], ["there.pth", "exists", "--force"]),
        ([*UPGRADE, "EAGLE", "--output", "none/x.pth"], ["none"]),
        ([*UPGRADE, "EAGLE", "--output", "x.bin"], ["x.bin", ".pth"]),
        ([*UPGRADE, "EAGLE", "--output", "EAGLE", "--force"], ["EAGLE", "is what is read"]),
        ([*UPGRADE, "EAGLE", *OUT, "--dtype", "int4"], ["int4", "keep"]),
        ([*UPGRADE, "EAGLE", *OUT, "--lerp-rank", 0], ["--lerp-rank"]),
        ([*UPGRADE, "none.pth", *OUT], ["none.pth"]),
        ([*UPGRADE, "there.pth", *OUT], ["there.pth"]),
        ([*GROW, "FINCH", *OUT], ["nothing to grow", "--layers"]),
        ([*GROW, "FINCH", *OUT, "--layers", 2], ["2 layers", "more than the 2"]),
        ([*GROW, "FINCH", *OUT, "--layers", 3, "--how", "mirror"], ["mirror", "interleave"]),
        ([*GROW, "FINCH", *OUT, "--layers", 3, "--how", "scaled"], ["scale"]),
        ([*GROW, "FINCH", *OUT, "--layers", 3, "--source-layers", "0,1"], ["source layers", "3"]),
        ([*GROW, "FINCH", *OUT, "--source-layers", "0;1"], ["--source-layers", "0;1"]),
        ([*GROW, "FINCH", *OUT, "--lerp-rank", 40, "--scale", 0.5], ["--scale"]),
        ([*GROW, "FINCH", *OUT, "--decay-rank", 3], ["cannot shrink"]),
        ([*GROW, "EAGLE", *OUT, "--decay-rank", 3], ["EAGLE", "Upgrade it first"]),
        ([*GROW, "FINCH", "--output", "FINCH", "--layers", 3, "--force"], ["is what is read"]),
        ([*VOCABULARY, "FINCH", *OUT], ["--size", "--token"]),
        ([*VOCABULARY, "FINCH", *OUT, "--size", 300, "--token", "ab"], ["--size", "--token"]),
        ([*VOCABULARY, "FINCH", *OUT, "--size", 200], ["200 ids", "last 57"]),
        ([*VOCABULARY, "FINCH", *OUT, "--token", "a"], ["'a'", "98 already"]),
        ([*VOCABULARY, "FINCH", *OUT, "--token", "ab", "--drop"], ["--drop"]),
        ([*VOCABULARY, "FINCH", *OUT, "--token", "ab", "--first-id", 5], ["first new id 5", "257"]),
        ([*VOCABULARY, "FINCH", *OUT, "--size", 300, "--first-id", 257], ["--first-id", "--size"]),
        ([*VOCABULARY, "FINCH", *OUT, "--tokens", "none.txt"], ["none.txt"]),
        ([*VOCABULARY, "FINCH", *OUT, "--token", "ab", "--vocabulary-file", "v.txt"], ["world", "bytes"]),
        ([*VOCABULARY, "FINCH", *OUT, "--token", "the Eiffel tower", "--tokenizer", "world"], ["257 rows"]),
        ([*MERGE, "FINCH", *OUT], ["two or more models, got 1"]),
        ([*MERGE, "FINCH", "EAGLE", *OUT], ["EAGLE", "version 6", "5.2"]),
        ([*MERGE, "FINCH", "OTHER", *OUT, "--method", "mean"], ["mean", "slerp"]),
        ([*MERGE, "FINCH", "OTHER", *OUT, "--weight", 1], ["weights", "2"]),
        ([*MERGE, "FINCH", "OTHER", *OUT, "--method", "task"], ["base"]),
        ([*MERGE, "FINCH", "OTHER", *OUT, "--base", "FINCH"], ["takes no base"]),
        ([*MERGE, "FINCH", "OTHER", *OUT, "--method", "slerp", "--no-normalize"], ["always normalised"]),
        ([*MERGE, "FINCH", "OTHER", "--output", "OTHER", "--force"], ["is what is read"]),
        ([*MERGE, "FINCH", "none.pth", *OUT], ["none.pth"]),
    ],
)
def test_refused(
    cli: Any,
    eagle: Path,
    models: dict[str, Path],
    tmp_path: Path,
    snapshot: Any,
    arguments: list[object],
    words: list[str],
) -> None:
    (tmp_path / "there.pth").write_text("something")
    paths = {"EAGLE": eagle, "FINCH": models["pth"], "OTHER": models["other"]}
    before = [snapshot(folder) for folder in (tmp_path, eagle.parent, models["pth"].parent)]
    ended = cli(*(paths.get(str(argument), argument) for argument in arguments))
    ended.refused(*(str(paths.get(word, word)) for word in words))
    assert [snapshot(folder) for folder in (tmp_path, eagle.parent, models["pth"].parent)] == before


def test_what_would_not_be_finite_is_not_written(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    pair = [models["pth"], models["other"]]
    (tmp_path / "out.pth").write_text("the old file")
    command = ["model", "merge", *pair, "--weight", 1e30, "--weight", 1, "--no-normalize", "--dtype", "fp16"]
    cli(*command, "--output", "out.pth", "--force").refused("finite")
    assert (tmp_path / "out.pth").read_text() == "the old file"
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


def test_a_link_to_the_source_is_the_source(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link.pth").symlink_to(models["pth"])
    cli("model", "grow", "link.pth", "--layers", 3, "--output", models["pth"], "--force").refused("is what is read")
