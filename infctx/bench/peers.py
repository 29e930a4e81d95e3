"""Other people's operators: found on this machine, given what their own models give them, never part of this project.

A peer is a line in PEERS. Without one the benchmark compares with our own torch backend, and says what is not there.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from infctx.bench.machine import git_revision
from infctx.bench.wkv6_sides import Case, Side
from infctx.errors import InfctxError

INFCTX_TRAINER_FILE = Path("RWKV-v6/src/module/rwkv_inner.py")
INFCTX_TRAINER_PACKAGE = "_infctx_trainer_peer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """What was found of a peer. sides: none if it is not here, and absence tells why. version: of its source."""

    sides: tuple[Side, ...] = ()
    version: str | None = None
    absence: str | None = None


def find_peers(wanted: list[str]) -> dict[str, Peer]:
    """Look for every peer.

    Args:
        wanted: NAME=PATH or NAME, as given by the user.
    Raises:
        InfctxError: a name that is none of PEERS, or a path that does not hold the peer.
    """
    paths: dict[str, str | None] = {}
    for text in wanted:
        name, _, path = text.partition("=")
        if name not in PEERS:
            raise InfctxError(f"--peer {text}: there is no peer {name!r}; expected one of {', '.join(PEERS)}.")
        if name in paths:
            raise InfctxError(f"--peer {text}: {name} is given twice; expected once.")
        paths[name] = path or None
    return {name: find(paths.get(name), name in paths) for name, find in PEERS.items()}


def find_infctx_trainer(path: str | None, is_wanted: bool) -> Peer:
    """The torch operator of RWKV-infctx-trainer's RWKV-6: its default setting, and the fastest one that it allows."""
    how = "--peer infctx-trainer=PATH, the folder of a checkout of RWKV-infctx-trainer"
    if path is None:
        if is_wanted:
            raise InfctxError(f"--peer infctx-trainer: it is found by path; expected {how}.")
        return Peer(absence=f"no checkout given ({how})")
    file = Path(path).expanduser() / INFCTX_TRAINER_FILE
    if not file.is_file():
        raise InfctxError(f"--peer infctx-trainer={path}: {file} is not there; expected {how}.")
    operator = _load_rwkv_inner(file)
    revision = git_revision(Path(path).expanduser())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    version = f"git {revision['revision']}" if revision and not revision["is_dirty"] else f"sha256 {digest}"
    best = _infctx_trainer_side("infctx-trainer", operator, chunk_tokens=16, precision=32)
    default = _infctx_trainer_side("infctx-trainer-default", operator, chunk_tokens=128, precision=64)
    return Peer(sides=(best, default), version=version)


def _load_rwkv_inner(file: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    """Its function, uncompiled, as its own default is. Of the module that it imports it needs one decorator only."""
    package, imported = ModuleType(INFCTX_TRAINER_PACKAGE), ModuleType(f"{INFCTX_TRAINER_PACKAGE}.CoreDependencies")
    package.__path__ = []
    imported.TCompileBaseline = lambda function: function  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(f"{INFCTX_TRAINER_PACKAGE}.rwkv_inner", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update({package.__name__: package, imported.__name__: imported})
    try:
        spec.loader.exec_module(module)
        function: Callable[..., tuple[Tensor, Tensor]] = module.rwkv_inner
    except Exception as error:
        raise InfctxError(
            f"--peer infctx-trainer: {file} cannot be loaded: {type(error).__name__}: {error}. "
            "Expected the file of RWKV-infctx-trainer, unchanged."
        ) from error
    finally:
        for name in (package.__name__, imported.__name__):
            del sys.modules[name]
    return function


def _infctx_trainer_side(
    name: str, operator: Callable[..., tuple[Tensor, Tensor]], *, chunk_tokens: int, precision: int
) -> Side:
    def run(
        receptance: Tensor, key: Tensor, value: Tensor, raw_decay: Tensor, bonus: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        # As its time mix does: views of [B, T, H, N], the decay in float32, bonus and state in the dtype of the rest.
        dtype = receptance.dtype
        decay = torch.exp(-torch.exp(raw_decay.transpose(1, 2)))
        r, k, v = (tensor.transpose(1, 2) for tensor in (receptance, key, value))
        output, new_state = operator(
            r, k, v, decay, bonus[None, :, None, :].to(dtype), state.to(dtype), chunk_tokens, precision
        )
        return output.transpose(1, 2), new_state

    def refusal(case: Case) -> str | None:
        if case.tokens != 1 and case.tokens % chunk_tokens:
            return f"it takes multiples of {chunk_tokens} tokens, not {case.tokens}"
        return None

    return Side(name=name, run=run, refusal=refusal, rounds_inside=True)


def find_fla(path: str | None, is_wanted: bool) -> Peer:
    """chunk_rwkv6 of flash-linear-attention, which runs on CUDA only."""
    if path is not None:
        raise InfctxError(f"--peer fla={path}: it is found by import; expected --peer fla, and the package installed.")
    if not torch.cuda.is_available():
        return Peer(absence="it runs on CUDA only")
    # By the name of the distribution: a folder called fla would answer an import as well.
    try:
        version = importlib.metadata.version("flash-linear-attention")
    except importlib.metadata.PackageNotFoundError:
        return Peer(absence="not installed (pip install flash-linear-attention)")
    try:
        operator = importlib.import_module("fla.ops.rwkv6").chunk_rwkv6
    except Exception as error:
        return Peer(version=version, absence=f"cannot be imported: {type(error).__name__}: {error}")

    def run(
        receptance: Tensor, key: Tensor, value: Tensor, raw_decay: Tensor, bonus: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        output, new_state = operator(
            receptance,
            key,
            value,
            -torch.exp(raw_decay),
            bonus.to(receptance.dtype),
            # Its own default is that of attention, 1 / sqrt(head size).
            scale=1.0,
            initial_state=state,
            output_final_state=True,
        )
        return output, new_state

    def refusal(case: Case) -> str | None:
        return None if case.device.type == "cuda" else "it runs on CUDA only"

    return Peer(sides=(Side(name="fla", run=run, refusal=refusal, rounds_inside=True),), version=version)


# How each is found, from the path given (or None) and whether the user asked for it.
PEERS: dict[str, Callable[[str | None, bool], Peer]] = {
    "infctx-trainer": find_infctx_trainer,
    "fla": find_fla,
}
