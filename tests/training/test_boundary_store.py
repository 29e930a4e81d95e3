"""Boundary states come back bit for bit from wherever they waited, and thinning changes nothing but the work."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.assemble import run_recipe
from infctx.checkpoint.run_state import load_run_state
from infctx.data.chunking import Chunk
from infctx.errors import MachineError
from infctx.free_memory import free_host_bytes
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.recipe.schema import Recipe
from infctx.training.boundary_store import Bank, BoundaryPlan, choose_store
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx.training.metrics import read_metrics
from infctx.training.progress import SilentProgress

PLANS = {
    "device": {},
    "host": {"where": "host"},
    "disk": {"where": "disk"},
    "device, thinned": {"is_thinned": True},
    "disk, thinned": {"where": "disk", "is_thinned": True},
}


def make_state(seed: int, dtype: torch.dtype = torch.float32) -> ModelState:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 1, 2, 4, 4), (2, 1, 8), (2, 1, 8)]
    return ModelState(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["device", "host", "disk"])
@pytest.mark.parametrize("block_bytes", [0, 2000, 2**24])
def test_states_come_back_last_first_and_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, dtype: torch.dtype, block_bytes: int
) -> None:
    monkeypatch.setattr("infctx.training.boundary_store.BLOCK_BYTES", block_bytes)
    store = BoundaryPlan(where=where, folder=tmp_path / "boundaries").open_store()
    states = [make_state(seed, dtype) for seed in range(9)]
    for state in states:
        store.put(state)
    for place in reversed(range(9)):
        for look in range(place + 1):
            found = store.read(look)
            assert all(torch.equal(a, b) for a, b in zip(found, states[look], strict=True))
        store.drop()
        # What is dropped in the middle may be put anew.
        if place == 5:
            store.put(states[place])
            store.drop()
    assert not list(tmp_path.glob("boundaries/*"))


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 9, 10, 17])
@pytest.mark.parametrize("is_thinned", [False, True])
def test_the_bank_gives_every_boundary_once(num_chunks: int, is_thinned: bool) -> None:
    states = [make_state(seed) for seed in range(num_chunks)]
    runs = []

    def advance(index: int, state: ModelState) -> ModelState:
        assert torch.equal(state.wkv, states[index].wkv)
        runs.append(index)
        return states[index + 1]

    bank = Bank(BoundaryPlan(is_thinned=is_thinned), num_chunks)
    for index, state in enumerate(states):
        bank.put(index, state)
    most_kept = 0
    for index in reversed(range(num_chunks)):
        most_kept = max(most_kept, len(bank._at_hand) + len(bank._stored))
        assert all(torch.equal(a, b) for a, b in zip(bank.take(index, advance), states[index], strict=True))
    if is_thinned:
        assert most_kept <= 2 * math.isqrt(num_chunks) + 2
        assert len(runs) <= num_chunks
    else:
        assert not runs


@pytest.mark.parametrize("num_chunks", [1, 2, 9, 17, 40])
@pytest.mark.parametrize("is_thinned", [False, True])
def test_what_a_bank_holds_is_small_and_enough_for_another(num_chunks: int, is_thinned: bool) -> None:
    states = [make_state(seed) for seed in range(num_chunks)]
    plan = BoundaryPlan(is_thinned=is_thinned)

    def advance(index: int, state: ModelState) -> ModelState:
        assert torch.equal(state.wkv, states[index].wkv)
        return states[index + 1]

    for num_put in range(1, num_chunks + 1):
        for num_taken in range(num_put if num_put == num_chunks else 1):
            bank = Bank(plan, num_chunks)
            for index in range(num_put):
                bank.put(index, states[index])
            for index in reversed(range(num_put - num_taken, num_put)):
                bank.take(index, advance)
            held = list(bank.held())
            assert len(held) <= 2 * math.isqrt(num_put) + 3
            assert held[0][0] == 0
            if not is_thinned:
                # What comes next is not to be computed again.
                assert held[-1][0] == num_put - num_taken - 1
            assert all(torch.equal(state.wkv, states[index].wkv) for index, state in held)
            other = Bank(plan, num_chunks)
            other.put_back(held)
            for index in reversed(range(held[-1][0] + 1)):
                assert torch.equal(other.take(index, advance).wkv, states[index].wkv)


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("window", [4, "document"])
def test_gradients_do_not_depend_on_the_plan(
    make_finch: Callable[..., Finch], tmp_path: Path, plan: str, window: int | str
) -> None:
    model = make_finch("6")
    tokens = torch.randint(0, 50, (2, 91))
    chunks = []
    for index, first in enumerate(range(0, 90, 9)):
        place, ahead = slice(first, first + 9), slice(first + 1, first + 10)
        chunks.append(
            Chunk(
                tokens=tokens[:, place],
                targets=tokens[:, ahead],
                loss_weight=torch.ones(2, 9),
                starts=None,
                index=index,
                has_loss=True,
            )
        )
    results = []
    for boundaries in (BoundaryPlan(), BoundaryPlan(folder=tmp_path / "boundaries", **PLANS[plan])):
        model.zero_grad(set_to_none=True)
        result = backward_through_windows(
            ChunkObjective(model),
            chunks,
            model.fresh_state(2),
            window=window,
            weight_total=180.0,
            boundaries=boundaries,
        )
        results.append([*result.state, *result.initial_state_gradient, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BoundaryPlan(where="disk", folder=tmp_path).open_store()
    store.put(make_state(0))
    real_open = Path.open

    def full(self: Path, *arguments: object) -> object:
        file = real_open(self, *arguments)

        class Full:
            def __enter__(self) -> Full:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def write(self, data: object) -> None:
                raise OSError(28, "No space left on device")

        return Full()

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError, match="No space left") as raised:
        store.put(make_state(1))
    monkeypatch.undo()
    assert "boundary-000001.bin" in str(raised.value)
    assert "bptt.thin_boundaries" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["boundary-000000.bin"]
    assert torch.equal(store.read(0).wkv, make_state(0).wkv)


def test_the_fastest_place_with_room_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("infctx.training.boundary_store.free_host_bytes", lambda: 1000)
    assert choose_store(500, cpu) == "device"
    assert choose_store(501, cpu) == "disk"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 800))
    cuda = torch.device("cuda:0")
    assert [choose_store(size, cuda) for size in (100, 101, 501)] == ["device", "host", "disk"]
    monkeypatch.undo()
    assert 2**20 < free_host_bytes() < 2**50


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_store_that_cannot_be_written_costs_the_step_and_not_the_run(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    settings = ("bptt.window=document", "bptt.boundaries=disk", "run.steps=3", "run.checkpoint_every=1")
    straight, broken = recipe("straight", *settings), recipe("broken", *settings)
    run_recipe(straight, SilentProgress())
    real_open = Path.open

    def failing(self: Path, *arguments: object, **settings: object) -> object:
        if self.name.startswith("boundary-") and Path(broken.run.folder, "checkpoints", "latest").exists():
            raise OSError(number, "it is so")
        return real_open(self, *arguments, **settings)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(MachineError, match="it is so") as raised:
        run_recipe(broken, SilentProgress())
    monkeypatch.undo()
    folder = Path(broken.run.folder)
    assert f"{folder / 'boundaries'}" in str(raised.value)
    assert f"{folder / 'checkpoints'}" in str(raised.value)
    assert not (folder / "boundaries").exists()
    loaded = load_run_state(folder)
    assert loaded is not None
    assert loaded.skipped == []
    assert 1 <= loaded.state.step < 3
    run_recipe(broken, SilentProgress())
    losses = [
        [line["loss"] for line in read_metrics(Path(run.run.folder) / "metrics.jsonl")] for run in (straight, broken)
    ]
    assert losses[0] == losses[1]
