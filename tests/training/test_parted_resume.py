"""A run goes on from, and is exported from, a checkpoint that several ranks wrote, in the same bits."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infctx.assemble import run_recipe
from infctx.checkpoint.run_state import load_run_state, save_run_state
from infctx.checkpoint.writers import owners
from infctx.recipe.schema import Recipe
from infctx.trained import open_for_export, open_trained
from infctx.training.progress import SilentProgress
from infctx.training.signals import StopRequested

RANKS = 3


class Threads:
    """Ranks that are threads of this process."""

    size = RANKS

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._said, self._barrier = rank, said, barrier

    def gather(self, value: object) -> list[Any]:
        self._said[self.rank] = value
        self._barrier.wait()
        values = list(self._said)
        self._barrier.wait()
        return values


def write_in_parts(folder: Path) -> None:
    """Replace a run's checkpoints by its newest one, written by several ranks."""
    loaded = load_run_state(folder)
    assert loaded is not None
    # Mapped from files that are about to go.
    groups = {group: {n: t.clone() for n, t in ts.items()} for group, ts in loaded.state.tensors.items()}
    shutil.rmtree(folder / "checkpoints")
    said, barrier = [None] * RANKS, threading.Barrier(RANKS, timeout=20)

    def save(rank: int) -> Path:
        own = {}
        for group, tensors in groups.items():
            rank_of = dict(zip(tensors, owners([t.nbytes for t in tensors.values()], RANKS), strict=True))
            own[group] = {name: tensor for name, tensor in tensors.items() if rank_of[name] == rank}
        return save_run_state(folder, replace(loaded.state, tensors=own), writers=Threads(rank, said, barrier))

    with ThreadPoolExecutor(RANKS) as pool:
        (path,) = set(pool.map(save, range(RANKS)))
    assert len(list(path.glob(f"trainable-*-of-{RANKS:05}.safetensors"))) == RANKS


def assert_same_state(one: Path, other: Path) -> None:
    left, right = load_run_state(one), load_run_state(other)
    assert left is not None
    assert right is not None
    assert (left.state.step, left.state.passes) == (right.state.step, right.state.passes)
    assert left.state.tensors.keys() == right.state.tensors.keys()
    for group, tensors in left.state.tensors.items():
        assert tensors.keys() == right.state.tensors[group].keys()
        assert all(torch.equal(tensor, right.state.tensors[group][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "settings",
    [("run.accumulate=2", "run.steps=3"), ("bptt.window=document", "optimizer.ema_decay=0.7", "run.steps=2")],
)
def test_a_run_goes_on_from_what_ranks_wrote(
    recipe: Callable[..., Recipe], stop_after: Callable[[int | None], None], settings: tuple[str, ...]
) -> None:
    folders = []
    for name in ("straight", "parted"):
        built = recipe(name, *settings, "data.validation=null")
        folder = Path(built.run.folder)
        folders.append(folder)
        if name == "parted":
            stop_after(9)
            with pytest.raises(StopRequested):
                run_recipe(built, SilentProgress())
            stop_after(None)
            stopped = load_run_state(folder)
            assert stopped is not None
            assert stopped.state.tensors["rows"] or stopped.state.tensors["under_way"]
            write_in_parts(folder)
        run_recipe(built, SilentProgress())
    assert_same_state(*folders)
    exported = {name: t.read() for name, t in open_for_export(folders[0]).source.tensors.items()}
    tokens = torch.arange(12)[None] + 60
    logits = open_trained(folders[0]).model(tokens)[0]
    write_in_parts(folders[1])
    assert torch.equal(open_trained(folders[1]).model(tokens)[0], logits)
    parted = {name: t.read() for name, t in open_for_export(folders[1]).source.tensors.items()}
    assert parted.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in parted.items())
