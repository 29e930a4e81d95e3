"""RWKV-PEFT's files: kinds by their names, alpha that must be told, and files that are not what they should be."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infctx.adapters.model_changes import ModelChanges
from infctx.adapters.rwkv_peft.read import read_rwkv_peft, with_alpha, with_start
from infctx.checkpoint.model_file import official_tensors
from infctx.errors import CheckpointError
from infctx.export.adapter_files import read_adapter
from infctx.model.finch import Finch

Adapter = Callable[..., dict[str, Tensor]]
FILE = "rwkv-0.pth"
DOWN, UP = "blocks.0.att.key.lora_A", "blocks.0.att.key.lora_B"


@pytest.fixture(scope="module")
def base(make_finch: Callable[..., Finch]) -> dict[str, Tensor]:
    return official_tensors(make_finch("6", n_layer=2))


def read(tensors: dict[str, Tensor]) -> ModelChanges:
    return read_rwkv_peft(tensors, file=FILE)


def refused(tensors: dict[str, Tensor], *words: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(tensors)
    for word in (FILE, *words):
        assert word in str(refusal.value), refusal.value


def a_pair(rank: int = 2) -> dict[str, Tensor]:
    return {DOWN: torch.ones(rank, 32), UP: torch.ones(32, rank)}


@pytest.mark.parametrize(
    ("made", "kind", "ranks"),
    [("lora", "lora", [3]), ("disha", "disha", [3]), ("bat", "disha_bat", [4]), ("state", "state", [])],
)
@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.", "base_model.model.", "_forward_module.model."])
def test_kinds_are_told_from_the_names(
    base: dict[str, Tensor], make_adapter: Adapter, made: str, kind: str, ranks: list[int], prefix: str
) -> None:
    tensors = make_adapter(base, made, rank=ranks[0] if ranks else 1)
    renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    for suffix in ("", ".weight", ".default.weight"):
        if suffix and kind == "state":
            continue
        changes = read({name + suffix: tensor for name, tensor in renamed.items()})
        assert (changes.kind, changes.ranks) == (kind, ranks)
        assert len(changes.updates) == (0 if kind == "state" else 16)
        assert set(changes.replaced) == (set(tensors) if kind == "state" else set())
    if kind.startswith("disha"):
        old = {name.replace("disha", "bone"): tensor for name, tensor in renamed.items()}
        assert read(old).kind == kind


def test_each_matrix_has_its_own_rank(base: dict[str, Tensor], make_adapter: Adapter) -> None:
    tensors = make_adapter(base, "lora", rank=3)
    tensors[DOWN], tensors[UP] = torch.ones(6, 32), torch.ones(32, 6)
    changes = with_alpha(read(tensors), 12.0, file=FILE)
    assert changes.ranks == [3, 6]
    assert changes.updates["blocks.0.att.key"].scale == 2.0
    assert changes.updates["blocks.1.att.key"].scale == 4.0


def test_alpha_is_asked_for_where_it_means_something(base: dict[str, Tensor], make_adapter: Adapter) -> None:
    lora, start = make_adapter(base, "lora"), make_adapter(base, "start")
    with pytest.raises(
        CheckpointError, match=r"rwkv-0\.pth: expected --alpha\..*lora_alpha.*B A · alpha / rank.*--init"
    ):
        with_alpha(read(lora), None, file=FILE)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="expected a number above 0"):
            with_alpha(read(lora), alpha, file=FILE)
    for kind in ("disha", "bat", "state"):
        with pytest.raises(CheckpointError, match="--alpha 32 means nothing"):
            with_alpha(read(make_adapter(base, kind)), 32.0, file=FILE)
        with pytest.raises(CheckpointError, match="--init means nothing"):
            with_start(read(make_adapter(base, kind)), start, file=FILE, start_file="init.pth")
    pissa = with_start(read(lora), start, file=FILE, start_file="init.pth")
    assert pissa.kind == "pissa"
    with pytest.raises(CheckpointError, match="--alpha 32 means nothing"):
        with_alpha(pissa, 32.0, file=FILE)


def test_the_second_file_of_a_pissa_must_be_of_the_same_training(
    base: dict[str, Tensor], make_adapter: Adapter
) -> None:
    lora, start = make_adapter(base, "lora"), make_adapter(base, "start")

    def refused_start(tensors: dict[str, Tensor], *words: str) -> None:
        with pytest.raises(CheckpointError) as refusal:
            with_start(read(lora), tensors, file=FILE, start_file="init.pth")
        assert all(word in str(refusal.value) for word in ("init.pth", *words)), refusal.value

    refused_start(lora, "expected init_lora_A")
    refused_start({name: tensor for name, tensor in start.items() if ".0.ffn.key." not in name}, "blocks.0.ffn.key")
    refused_start(make_adapter(base, "start", rank=5), "[4, 32]", "[5, 32]")
    refused_start(
        {name: tensor for name, tensor in start.items() if not name.endswith("ffn.key.init_lora_B")}, "missing"
    )
    # Given as the adapter itself.
    refused(start, "init_lora_A", "--init")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.0.att.key.lora_C", "blocks.*.att.key.lora_"),
        ("blocks.0.att.keys.lora_A", "blocks.*.att.key.lora_A"),
        ("blocks.12.att.time_maa_y", "blocks.*.att.time_maa_"),
        ("blocks.0.att.time_faaaa.lora_A", "Nearest"),
        ("blocks.00.att.key.lora_A", "Nearest"),
        ("blocks.-1.att.key.lora_A", "Nearest"),
        ("blocks.99999.att.key.lora_A", "Nearest"),
        ("head.lora_A", "head"),
        ("", "There are"),
        ("x" * 10_000, "x" * 50),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, near: str) -> None:
    refused({**a_pair(), name: torch.ones(2, 32)}, "1 names", repr(name[:100])[:90], near)


def test_files_of_several_kinds_or_halves(base: dict[str, Tensor], make_adapter: Adapter) -> None:
    disha, bat = make_adapter(base, "disha"), make_adapter(base, "bat")
    refused({**a_pair(), **disha}, "one kind")
    refused({**disha, "blocks.0.att.key.disha": bat["blocks.0.att.key.disha"]}, "2 axes", "3")
    refused({DOWN: torch.ones(2, 32)}, UP, "missing")
    refused({UP: torch.ones(32, 2)}, DOWN, "missing")
    refused({DOWN: torch.ones(2, 32), UP: torch.ones(32, 3)}, UP, "[out, 2]", "[32, 3]")
    refused({DOWN: torch.ones(2, 32, 1), UP: torch.ones(32, 2)}, DOWN, "2 axes")
    refused({"blocks.0.att.key.disha": torch.ones(4)}, "blocks.0.att.key.disha", "[4]")
    refused({"blocks.0.att.key.disha": torch.ones(2, 3, 4)}, "[2, 3, 4]")
    refused({}, "no tensors")
    refused(base, "A whole model is no adapter")
    state = make_adapter(base, "state")
    refused({**state, "ln_out.weight": torch.ones(32)}, "ln_out.weight")


def test_names_that_are_there_twice_without_their_prefixes() -> None:
    refused({**a_pair(), f"model.{DOWN}": torch.ones(2, 32)}, "twice", f"model.{DOWN}")
    refused({**a_pair(), f"{DOWN}.weight": torch.ones(2, 32)}, "twice")
    bone = {"blocks.0.att.key.bone": torch.ones(2, 32), "blocks.0.att.key.disha": torch.ones(2, 32)}
    refused(bone, "twice")
    refused({**a_pair(), "ln_out.bias": torch.ones(32), "model.ln_out.bias": torch.ones(32)}, "twice")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 32, dtype=torch.int8), "found int8"),
        (torch.ones(2, 32).to(torch.float8_e4m3fn), "found float8_e4m3fn"),
        (torch.ones(2, 32, dtype=torch.complex64), "found complex64"),
        (torch.full((2, 32), float("nan")), "NaN"),
        (torch.full((2, 32), float("-inf")), "NaN or infinity"),
        (torch.empty(0, 32), "rank of at least 1"),
    ],
)
def test_values_nothing_can_be_computed_with(tensor: Tensor, words: str) -> None:
    refused({DOWN: tensor, UP: torch.ones(32, len(tensor))}, DOWN, words)
    refused({**a_pair(), "ln_out.bias": tensor}, "ln_out.bias", words)


def test_the_second_file_s_values_are_looked_at_too() -> None:
    start = {
        "blocks.0.att.key.init_lora_A": torch.full((2, 32), float("nan")),
        "blocks.0.att.key.init_lora_B": torch.ones(32, 2),
    }
    with pytest.raises(CheckpointError, match=r"init\.pth: tensor blocks\.0\.att\.key\.init_lora_A: holds NaN"):
        with_start(read(a_pair()), start, file=FILE, start_file="init.pth")


def test_files_that_are_cut_off_or_something_else(tmp_path: Path) -> None:
    torch.save(a_pair(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 3, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pth").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "cut.pth"))):
            read_adapter(tmp_path / "cut.pth", alpha=1.0)
    torch.save({"state_dict": a_pair()}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="expected a tensor under every key"):
        read_adapter(tmp_path / "nested.pth", alpha=1.0)
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_adapter(path, alpha=1.0)
