"""Peers are found by path or import, and their absence is told."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from infctx.bench.gates import GateKeeper
from infctx.bench.machine import git_revision
from infctx.bench.peers import INFCTX_TRAINER_FILE, PEERS, find_peers
from infctx.bench.wkv6_sides import Case
from infctx.errors import InfctxError
from infctx_kernels import wkv6

CASE = Case(device=torch.device("cpu"), dtype="fp32", rows=1, tokens=32, heads=1, head_size=8)
# The signature and the imports of the peer's file; the recurrence in the plainest form, with a clamp.
STAND_IN = """
import torch
from .CoreDependencies import *

@TCompileBaseline
def rwkv_inner(r, k, v, w, u, kv_state, chunk_len: int = 128, precision: int = 64):
    assert (chunk_len, precision) in ((16, 32), (128, 64)), (chunk_len, precision)
    decay, outputs = w.clamp(0.005).to(r.dtype), []
    for t in range(r.size(2)):
        key_value = k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((r[:, :, t, None, :] @ (kv_state + u.mT * key_value)).squeeze(2))
        kv_state = decay[:, :, t, :, None] * kv_state + key_value
    return torch.stack(outputs, dim=2), kv_state
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    file = tmp_path / "checkout" / INFCTX_TRAINER_FILE
    file.parent.mkdir(parents=True)
    file.write_text(STAND_IN)
    return tmp_path / "checkout"


def test_found_by_path(checkout: Path) -> None:
    modules = set(sys.modules)
    peer = find_peers([f"infctx-trainer={checkout}"])["infctx-trainer"]
    assert [side.name for side in peer.sides] == ["infctx-trainer", "infctx-trainer-default"]
    assert peer.absence is None
    assert str(peer.version).startswith("sha256 ")
    assert not [name for name in set(sys.modules) - modules if "peer" in name]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_is_given_what_it_needs(checkout: Path, dtype: str) -> None:
    best, default = find_peers([f"infctx-trainer={checkout}"])["infctx-trainer"].sides
    keeper = GateKeeper()
    gate = keeper.gate(best, CASE.replaced(dtype=dtype, rows=2))
    assert gate.is_passed, gate.reason
    assert gate.extreme_reason is not None
    assert "multiples of 128 tokens, not 32" in str(keeper.gate(default, CASE).reason)
    assert keeper.gate(default, CASE.replaced(tokens=1024)).is_passed


def test_absent_peers_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = find_peers([])
    assert found.keys() == PEERS.keys()
    assert not any(peer.sides for peer in found.values())
    assert "--peer infctx-trainer=PATH" in str(found["infctx-trainer"].absence)
    assert "pip install flash-linear-attention" in str(found["fla"].absence)


def test_fla_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    peer = find_peers(["fla"])["fla"]
    assert peer.sides == ()
    assert peer.absence == "it runs on CUDA only"


def test_fla_is_given_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its operator only runs on a GPU; a stand-in with its signature, its layout and its defaults does not.
    def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
        assert r.dtype == k.dtype == v.dtype == u.dtype
        scale = r.shape[-1] ** -0.5 if scale is None else scale
        output, state = wkv6(r * scale, k, v, w, u, initial_state, backend="torch")
        return output, state if output_final_state else None

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    stand_in = ModuleType("fla.ops.rwkv6")
    stand_in.chunk_rwkv6 = chunk_rwkv6
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv6", stand_in)
    peer = find_peers([])["fla"]
    (side,) = peer.sides
    assert peer.version == "0.5"
    assert side.refusal(CASE) == "it runs on CUDA only"
    for dtype in ("fp32", "bf16"):
        gate = GateKeeper().gate(replace(side, refusal=lambda case: None), CASE.replaced(dtype=dtype))
        assert gate.is_passed, gate.reason


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["flaa"], ["'flaa'", "infctx-trainer, fla"]),
        (["infctx-trainer"], ["--peer infctx-trainer=PATH"]),
        (["infctx-trainer=/none/such"], ["/none/such", "rwkv_inner.py", "not there"]),
        (["fla=/some/where"], ["found by import"]),
        (["fla", "fla"], ["twice"]),
    ],
)
def test_what_is_asked_for_and_not_there(wanted: list[str], words: list[str]) -> None:
    with pytest.raises(InfctxError) as refused:
        find_peers(wanted)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "text", ["def rwkv_inner(:", "import none_such_module", "something_else = 1", "TCompileMax(1)"]
)
def test_a_file_that_is_another(checkout: Path, text: str) -> None:
    (checkout / INFCTX_TRAINER_FILE).write_text(text)
    with pytest.raises(InfctxError, match="cannot be loaded"):
        find_peers([f"infctx-trainer={checkout}"])


def test_revision_is_that_of_the_folder_itself(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "--quiet")
    assert git_revision(tmp_path) is None
    git("commit", "--quiet", "--allow-empty", "--message", "first")
    revision = git("rev-parse", "HEAD")
    assert git_revision(tmp_path) == {"revision": revision, "is_dirty": False}
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_text("new")
    assert git_revision(tmp_path) == {"revision": revision, "is_dirty": True}
    assert git_revision(tmp_path / "below") is None
