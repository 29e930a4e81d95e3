"""RWKV-PEFT's adapters as peft's and back: the peft library computes with the folder what the file's formula gives."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infctx.adapters.adapter_folder import read_facts
from infctx.adapters.load import load_adapter
from infctx.adapters.model_changes import apply_to
from infctx.adapters.peft_adapters import TRAINED_PARAMETERS, attach_lora
from infctx.adapters.rwkv_peft.read import read_rwkv_peft
from infctx.adapters.state_tuning import attach_state
from infctx.adapters.weight_updates import TileProduct
from infctx.checkpoint.model_file import build_model, fingerprint, official_tensors, tensors_of
from infctx.checkpoint.weights import read_tensors, write_pth
from infctx.errors import CheckpointError
from infctx.export.adapter_files import (
    describe_adapter,
    merge_adapter,
    note_path,
    read_adapter,
    write_adapter_folder,
    write_rwkv_peft,
)
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors

Adapter = Callable[..., dict[str, Tensor]]
TOKENS = torch.arange(40)[None] % 50
TARGETS = ["receptance", "key", "value", "gate", "output"]


def small(make_finch: Callable[..., Finch], **sizes: Any) -> Finch:
    return make_finch("6", **{"n_layer": 2, "n_embd": 24, "dim_ffn": 56, **sizes})


def disturb_(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def merged_logits(base: ModelTensors, path: Path, **told: Any) -> Tensor:
    return build_model(merge_adapter(base, read_adapter(path, **told), file=str(path)))(TOKENS)[0]


def save_with_peft(model: torch.nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)


@pytest.mark.parametrize("kind", ["lora", "pissa", "disha"])
@torch.no_grad()
def test_peft_computes_with_the_folder_what_the_file_means(
    make_finch: Callable[..., Finch], make_adapter: Adapter, tmp_path: Path, kind: str
) -> None:
    base = tensors_of(small(make_finch))
    official = {name: tensor.read() for name, tensor in base.tensors.items()}
    file, folder = tmp_path / "rwkv-0.pth", tmp_path / "folder"
    # 24 and 56 channels: blocks of 5 leave a partial one.
    tensors = make_adapter(official, {"pissa": "lora"}.get(kind, kind), rank=5)
    start = make_adapter(official, "start", rank=5, seed=1)
    if kind != "disha":  # One matrix of another rank; MiSS has one rank for all.
        wider = make_adapter(official, "lora", rank=7, seed=2)
        tensors.update({name: wider[name] for name in wider if name.startswith("blocks.1.att.value.")})
        wider = make_adapter(official, "start", rank=7, seed=3)
        start.update({name: wider[name] for name in wider if ".1.att.value." in name})
    weight = official["blocks.1.att.key.weight"] * 0.5
    write_pth(
        file,
        {
            **tensors,
            "blocks.1.att.time_faaaa": torch.ones(3, 8),
            "ln_out.bias": torch.ones(24),
            "blocks.1.att.key.weight": weight,
        },
    )
    told: dict[str, Any] = {"alpha": 20.0} if kind == "lora" else {}
    if kind == "pissa":
        told = {"start": tmp_path / "init_pissa.pth"}
        write_pth(told["start"], start)
    expected = merged_logits(base, file, **told)
    write_adapter_folder(read_adapter(file, **told), folder, base=base, file=str(file))
    model = small(make_finch)
    trained = load_file(folder / TRAINED_PARAMETERS)
    assert trained.keys() == {"blocks.1.time_mix.bonus", "output_norm.bias", "blocks.1.time_mix.key.weight"}
    model.load_state_dict(trained, strict=False)
    attached = peft.PeftModel.from_pretrained(model, str(folder))
    torch.testing.assert_close(attached(TOKENS)[0], expected, rtol=0, atol=2e-5)
    assert float((expected - small(make_finch)(TOKENS)[0]).abs().max()) > 0.1
    # Every tensor of the folder was wanted, and everything attached had one.
    assert {name for name, _ in attached.named_parameters() if "lora_" in name or "miss_" in name} == {
        name.replace(".weight", ".default.weight") if "lora_" in name else f"{name}.default"
        for name in load_file(folder / "adapter_model.safetensors")
    }
    torch.testing.assert_close(merged_logits(base, folder), expected, rtol=0, atol=2e-5)
    ours = small(make_finch)
    load_adapter(ours, folder, base_fingerprint=fingerprint(base))
    torch.testing.assert_close(ours(TOKENS)[0], expected, rtol=0, atol=2e-5)
    facts = read_facts(folder)
    ranks = {"lora": (7, 5, 20), "pissa": (14, 10, 10), "disha": (5, 5, None)}[kind]
    assert facts is not None
    assert (facts.kind, facts.base_fingerprint) == ("miss" if kind == "disha" else "lora", fingerprint(base))
    assert (facts.rank, facts.ranks.get("blocks.0.time_mix.key", 5), facts.alpha) == ranks
    # And back to a file.
    written = write_rwkv_peft(read_adapter(folder), tmp_path / "again.pth", dtype=None, file="folder")
    back = read_tensors(tmp_path / "again.pth")[0]
    if kind == "pissa":
        assert written["alpha"] == 14.0
        torch.testing.assert_close(merged_logits(base, tmp_path / "again.pth"), expected, rtol=0, atol=2e-5)
    else:
        original = read_tensors(file)[0]
        assert back.keys() == original.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def attached_by_peft(model: Finch, kind: str) -> torch.nn.Module:
    if kind.startswith("miss"):
        init = {"miss": True, "miss_bat": "bat", "miss_mini": "mini"}[kind]
        config: peft.PeftConfig = peft.MissConfig(r=4, mini_r=8, init_weights=init, target_modules=TARGETS)
    else:
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=[*TARGETS, "head", *(["embedding"] if "embedding" in kind else [])],
            use_rslora=kind == "rslora",
            use_dora="dora" in kind,
            rank_pattern={"blocks.1.time_mix.key": 7} if kind == "patterns" else {},
            alpha_pattern={"channel_mix.value": 3} if kind == "patterns" else {},
        )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    "kind", ["lora", "rslora", "patterns", "dora", "embedding", "embedding_dora", "miss", "miss_bat", "miss_mini"]
)
@torch.no_grad()
def test_folders_of_peft_are_merged_as_peft_merges_them(
    make_finch: Callable[..., Finch], tmp_path: Path, kind: str
) -> None:
    model = small(make_finch)
    base = tensors_of(small(make_finch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached = attached_by_peft(model, kind)
    disturb_(attached)
    expected = attached(TOKENS)[0]
    save_with_peft(attached, tmp_path)
    found = read_adapter(tmp_path)
    kind = kind.removeprefix("embedding_")
    assert found.kind == (kind if kind in ("dora", "miss_bat", "miss_mini") else "disha" if kind == "miss" else "lora")
    merged = build_model(apply_to(base, found, file="folder"))
    torch.testing.assert_close(merged(TOKENS)[0], expected, rtol=0, atol=2e-5)
    peft_merged = official_tensors(attached.merge_and_unload())
    for name, tensor in official_tensors(merged).items():
        torch.testing.assert_close(tensor, peft_merged[name], rtol=0, atol=1e-6, msg=name)
    assert float((expected - small(make_finch)(TOKENS)[0]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("kind", "alpha", "is_exact"), [("lora", 6.0, True), ("rslora", 5.0, False), ("patterns", 7.0, False)]
)
@torch.no_grad()
def test_scales_are_folded_where_one_alpha_cannot_say_them(
    make_finch: Callable[..., Finch], tmp_path: Path, kind: str, alpha: float, is_exact: bool
) -> None:
    model = small(make_finch)
    rank = 5 if kind == "rslora" else 4
    config = {"target_modules": TARGETS, "r": rank, "lora_alpha": 6, "use_rslora": kind == "rslora"}
    if kind == "patterns":
        config.update(rank_pattern={"blocks.1.time_mix.key": 7}, alpha_pattern={"channel_mix.value": 3})
    attached = peft.get_peft_model(model, peft.LoraConfig(**config))
    disturb_(attached)
    expected = attached(TOKENS)[0]
    save_with_peft(attached, tmp_path)
    file = tmp_path / "out.pth"
    note = write_rwkv_peft(read_adapter(tmp_path), file, dtype=None, file="folder")
    assert (note["kind"], note["alpha"]) == ("lora", alpha)
    assert note["ranks"] == ([4, 7] if kind == "patterns" else [rank])
    assert note == json.loads(note_path(file).read_text())
    base = tensors_of(small(make_finch))
    torch.testing.assert_close(merged_logits(base, file), expected, rtol=0, atol=2e-5)
    # What RWKV-PEFT's merge does with this file, told this alpha.
    tensors, before = read_tensors(file)[0], official_tensors(small(make_finch))
    merged = {}
    for name, weight in before.items():
        down = tensors.get(f"{name.removesuffix('.weight')}.lora_A")
        merged[name] = (
            weight
            if down is None
            else (weight + tensors[f"{name.removesuffix('.weight')}.lora_B"] @ down * (note["alpha"] / len(down)))
        )
    found = official_tensors(build_model(merge_adapter(base, read_adapter(file), file="out")))
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    up = saved["base_model.model.blocks.0.time_mix.key.lora_B.weight"]
    assert torch.equal(up, tensors["blocks.0.att.key.lora_B"]) == is_exact


def test_folders_whose_matrices_have_official_names(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    """As a trainer saves them whose model has them."""
    attached = attached_by_peft(small(make_finch), "patterns")
    disturb_(attached)
    save_with_peft(attached, tmp_path)
    base = tensors_of(small(make_finch))
    expected = merged_logits(base, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = (tmp_path / name).read_bytes()
        if name.endswith("json"):
            content = content.replace(b"time_mix", b"att").replace(b"channel_mix", b"ffn")
            (tmp_path / name).write_bytes(content)
            continue
        tensors = load_file(tmp_path / name)
        renamed = {key.replace("time_mix", "att").replace("channel_mix", "ffn"): x for key, x in tensors.items()}
        save_file(renamed, tmp_path / name)
    assert torch.equal(merged_logits(base, tmp_path), expected)


def test_our_own_adapter_folder(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    model = small(make_finch)
    adapter = attach_lora(model, rank=4, alpha=8, targets=[*TARGETS, "head"], train_also=["*.bonus", "*.key.weight"])
    disturb_(model)
    expected, _ = model(TOKENS)
    adapter.save(tmp_path)
    base = tensors_of(small(make_finch))
    torch.testing.assert_close(merged_logits(base, tmp_path), expected, rtol=0, atol=2e-5)
    with pytest.raises(
        CheckpointError, match=r"the adapter on head cannot be written: RWKV-PEFT has them in the blocks"
    ):
        write_rwkv_peft(read_adapter(tmp_path), tmp_path / "x.pth", dtype=None, file="folder")


def test_tiles_by_row_and_by_column_are_two_functions() -> None:
    """No arrangement of one's tiles gives the other's change, unless all tiles are equal."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    tiles = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    by_column, by_row = TileProduct(tiles=tiles).apply(weight), TileProduct(tiles=tiles, is_by_row=True).apply(weight)
    # The tiles on the diagonal have one index for both.
    assert torch.equal(by_column[:4, :4], by_row[:4, :4])
    assert float((by_column[:4, 4:] - by_row[:4, 4:]).abs().min()) > 1e-3
    # The tile that would give by_column's change in the first row of tiles is another in each column.
    wanted = [
        torch.linalg.solve(weight[:4, b] + torch.eye(4).double(), by_column[:4, b] - weight[:4, b])
        for b in (slice(0, 4), slice(4, 8))
    ]
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.1
    alike = tiles[:1].expand(2, 4, 4)
    torch.testing.assert_close(
        TileProduct(tiles=alike).apply(weight), TileProduct(tiles=alike, is_by_row=True).apply(weight)
    )


def test_what_has_no_counterpart_is_refused_with_the_reason(
    make_finch: Callable[..., Finch], make_adapter: Adapter, tmp_path: Path
) -> None:
    base = tensors_of(small(make_finch))
    official = {name: tensor.read() for name, tensor in base.tensors.items()}
    write_pth(tmp_path / "bat.pth", make_adapter(official, "bat"))
    with pytest.raises(
        CheckpointError, match=r"bat\.pth: cannot become a peft adapter: .*each row of tiles.*infctx export"
    ):
        write_adapter_folder(read_adapter(tmp_path / "bat.pth"), tmp_path / "folder", base=base, file="bat.pth")
    mixed = make_adapter(official, "disha", rank=4)
    mixed["blocks.0.att.key.disha"] = torch.ones(3, 24)
    write_pth(tmp_path / "mixed.pth", mixed)
    with pytest.raises(CheckpointError, match=r"ranks \[3, 4\]; peft's MiSS has one"):
        write_adapter_folder(read_adapter(tmp_path / "mixed.pth"), tmp_path / "folder", base=base, file="mixed.pth")
    assert not (tmp_path / "folder").exists()
    for kind, reason in (
        ("dora", "no place for DoRA's magnitudes"),
        ("miss_bat", "each row of tiles"),
        ("miss_mini", "full width"),
        ("embedding", "RWKV-PEFT has them in the blocks only"),
    ):
        folder = tmp_path / kind
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_with_peft(attached_by_peft(small(make_finch), kind), folder)
        with pytest.raises(CheckpointError, match=reason):
            write_rwkv_peft(read_adapter(folder), tmp_path / "x.pth", dtype=None, file=kind)
        with pytest.raises(CheckpointError, match="in its layout already"):
            write_adapter_folder(read_adapter(folder), tmp_path / "folder", base=base, file=kind)
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_folders_whose_base_was_changed_are_refused(
    make_finch: Callable[..., Finch], tmp_path: Path, kind: str
) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=kind)
    save_with_peft(peft.get_peft_model(small(make_finch), config), tmp_path)
    with pytest.raises(CheckpointError, match=f"init_lora_weights '{kind}' changes the base"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_save", ["head"]),
        ("lora_bias", True),
        ("bias", "all"),
        ("layer_replication", [[0, 2]]),
        ("unheard_of", 1),
    ],
)
def test_settings_that_change_the_function_are_refused(
    make_finch: Callable[..., Finch], tmp_path: Path, name: str, value: object
) -> None:
    save_with_peft(attached_by_peft(small(make_finch), "lora"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {name}: .*is not understood"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "expected LORA or MISS"),
        ({"peft_type": ["LORA"]}, "expected LORA or MISS"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number"),
        ({"lora_alpha": True}, "lora_alpha: expected a number"),
        ({"alpha_pattern": {"keys": 3}}, "'keys' names no matrix"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora and the tensors disagree"),
    ],
)
def test_damaged_settings(
    make_finch: Callable[..., Finch], tmp_path: Path, change: dict[str, object], words: str
) -> None:
    save_with_peft(attached_by_peft(small(make_finch), "lora"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=words):
        read_adapter(tmp_path)


def test_damaged_folders(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    save_with_peft(attached_by_peft(small(make_finch), "lora"), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole, tensors = config.read_bytes(), load_file(weights)
    for content in (b"", b"[]", b"{", b"[" * 100_000, b'{"a": ' + b" " * (5 << 20) + b"1}"):
        config.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: damaged"):
            read_adapter(tmp_path)
    config.write_bytes(whole)
    first = "base_model.model.blocks.0.channel_mix.key.lora_A.weight"
    for change, words in (
        ({"base_model.model.blocks.0.time_mix.keys.lora_A.weight": torch.ones(4, 24)}, "no adapter of a matrix"),
        ({first: torch.full_like(tensors[first], float("nan"))}, "NaN"),
        ({first: torch.ones(3, 24)}, r"lora_B: expected shape"),
        ({first: torch.ones(4)}, "expected 2 axes"),
        ({first.replace("channel_mix", "ffn"): tensors[first].clone()}, "twice"),
    ):
        save_file({**tensors, **change}, weights)
        with pytest.raises(CheckpointError, match=words):
            read_adapter(tmp_path)
    del tensors[first]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"lora_A: expected 2 axes, found none"):
        read_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(tmp_path)


# States


def test_states_there_and_back(make_finch: Callable[..., Finch], make_adapter: Adapter, tmp_path: Path) -> None:
    base = tensors_of(small(make_finch))
    official = {name: tensor.read() for name, tensor in base.tensors.items()}
    state = make_adapter(official, "state", dtype=torch.bfloat16)
    write_pth(tmp_path / "state.pth", state)
    write_adapter_folder(read_adapter(tmp_path / "state.pth"), tmp_path / "folder", base=base, file="state.pth")
    ours = load_file(tmp_path / "folder" / TRAINED_PARAMETERS)
    assert ours.keys() == {f"blocks.{i}.time_mix.initial_state" for i in range(2)}
    assert torch.equal(ours["blocks.1.time_mix.initial_state"], state["blocks.1.att.time_state"].transpose(1, 2))
    # In our model, put there by hand.
    model = small(make_finch, has_initial_state=True)
    model.load_state_dict(small(make_finch).state_dict(), strict=False)
    model.load_state_dict(ours, strict=False)
    with torch.no_grad():
        expected, _ = model(TOKENS)
    for path in (tmp_path / "state.pth", tmp_path / "folder"):
        assert torch.equal(merged_logits(base, path), expected)
    note = write_rwkv_peft(read_adapter(tmp_path / "folder"), tmp_path / "again.pth", dtype=None, file="folder")
    back = read_tensors(tmp_path / "again.pth")[0]
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert back.keys() == state.keys()
    assert (note["kind"], note["alpha"], note["ranks"]) == ("state", None, [])
    ours_again = small(make_finch)
    load_adapter(ours_again, tmp_path / "folder", base_fingerprint=fingerprint(base))
    assert torch.equal(ours_again(TOKENS)[0], expected)
    float_state = {name: tensor.float() + 1e-4 for name, tensor in ours.items()}
    save_file(float_state, tmp_path / "folder" / TRAINED_PARAMETERS)
    for dtype, found in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        write_rwkv_peft(read_adapter(tmp_path / "folder"), tmp_path / "again.pth", dtype=dtype, file="x", force=True)
        assert {tensor.dtype for tensor in read_tensors(tmp_path / "again.pth")[0].values()} == {found}


def test_starts_of_the_token_shift_are_merged_and_not_written(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    model = small(make_finch)
    adapter = attach_state(model, initial_shifts=True)
    adapter.save(tmp_path)
    # Zeros are what every program begins with.
    write_rwkv_peft(read_adapter(tmp_path), tmp_path / "zeros.pth", dtype=None, file="folder")
    assert set(read_tensors(tmp_path / "zeros.pth")[0]) == {f"blocks.{i}.att.time_state" for i in range(2)}
    disturb_(model)
    adapter.save(tmp_path)
    with torch.no_grad():
        expected, _ = model(TOKENS)
    base = tensors_of(small(make_finch))
    assert torch.equal(merged_logits(base, tmp_path), expected)
    with pytest.raises(CheckpointError, match=r"shift_state, a tuned start of the token shift, cannot be written"):
        write_rwkv_peft(read_adapter(tmp_path), tmp_path / "x.pth", dtype=None, file="folder")
    with pytest.raises(CheckpointError, match="1 names"):
        read_rwkv_peft({"blocks.0.att.shift_state": torch.ones(24)}, file="x.pth")


# Notes


def test_an_adapter_of_another_base_is_refused(
    make_finch: Callable[..., Finch], make_adapter: Adapter, tmp_path: Path
) -> None:
    base, other = tensors_of(small(make_finch)), tensors_of(small(make_finch, seed=1))
    official = {name: tensor.read() for name, tensor in base.tensors.items()}
    write_pth(tmp_path / "x.pth", make_adapter(official, "lora"))
    changes = read_adapter(tmp_path / "x.pth", alpha=4.0)
    merge_adapter(other, changes, file="x.pth")  # Nothing in the file tells.
    write_adapter_folder(changes, tmp_path / "folder", base=base, file="x.pth")
    write_rwkv_peft(read_adapter(tmp_path / "folder"), tmp_path / "again.pth", dtype=None, file="folder")
    for path in (tmp_path / "folder", tmp_path / "again.pth"):
        merged_logits(base, path)
        with pytest.raises(
            CheckpointError, match=f"belongs to the base of fingerprint {fingerprint(base)}; found {fingerprint(other)}"
        ):
            merge_adapter(other, read_adapter(path), file=str(path))


def test_a_note_that_is_not_the_file_s(make_finch: Callable[..., Finch], make_adapter: Adapter, tmp_path: Path) -> None:
    official = official_tensors(small(make_finch))
    file = tmp_path / "x.pth"
    write_pth(file, make_adapter(official, "lora"))
    write_rwkv_peft(read_adapter(file, alpha=4.0), file, dtype=None, file="x", force=True)
    assert read_adapter(file).alpha == 4.0
    assert read_adapter(file, alpha=4.0).alpha == 4.0
    with pytest.raises(CheckpointError, match="--alpha 5: what is saved with the file says 4"):
        read_adapter(file, alpha=5.0)
    write_pth(file, make_adapter(official, "lora", seed=9))
    with pytest.raises(CheckpointError, match=r"x\.json: tells of another content of x\.pth"):
        read_adapter(file)
    note_path(file).write_text('{"alpha": 7}')  # Somebody else's.
    assert describe_adapter(file)["alpha"] is None
    note_path(file).write_text("{")
    with pytest.raises(CheckpointError, match=r"x\.json: damaged"):
        read_adapter(file)
    write_pth(tmp_path / "y.pth", make_adapter(official, "lora"))
    changes = read_adapter(tmp_path / "y.pth", alpha=1.0)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"x\.json: exists"):
        write_rwkv_peft(changes, file, dtype=None, file="y")


def test_layers_without_an_adapter_are_told_from_missing_ones(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    """A file of ours may leave layers out, and its note vouches for it; without the note it looks incomplete."""
    model = small(make_finch)
    adapter = attach_lora(model, rank=2, alpha=4, targets=["blocks.1.time_mix.key"])
    disturb_(model)
    expected, _ = model(TOKENS)
    adapter.save(tmp_path)
    base = tensors_of(small(make_finch))
    write_rwkv_peft(read_adapter(tmp_path), tmp_path / "x.pth", dtype=None, file="folder")
    torch.testing.assert_close(merged_logits(base, tmp_path / "x.pth"), expected, rtol=0, atol=2e-5)
    write_adapter_folder(read_adapter(tmp_path / "x.pth"), tmp_path / "folder", base=base, file="x.pth")
    attached = peft.PeftModel.from_pretrained(small(make_finch), str(tmp_path / "folder"))
    torch.testing.assert_close(attached(TOKENS)[0], expected, rtol=0, atol=2e-5)
    assert sum("lora_A" in name for name, _ in attached.named_parameters()) == 1
    note_path(tmp_path / "x.pth").unlink()
    with pytest.raises(CheckpointError, match=r"blocks\.0\.att\.key has no adapter"):
        merged_logits(base, tmp_path / "x.pth", alpha=4.0)


def test_values_beyond_fp16_are_not_written(
    make_finch: Callable[..., Finch], make_adapter: Adapter, tmp_path: Path
) -> None:
    state = make_adapter(official_tensors(small(make_finch)), "state")
    state["blocks.0.att.time_state"][0, 0, 0] = 1e6
    write_pth(tmp_path / "x.pth", state)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.att\.time_state: has values beyond torch\.float16"):
        write_rwkv_peft(read_adapter(tmp_path / "x.pth"), tmp_path / "y.pth", dtype=torch.float16, file="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth"]
