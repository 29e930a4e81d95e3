"""What layers with attention have cached: where a run keeps it, that it is there once, and what has no room."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infctx.assemble import check_recipe
from infctx.data.chunking import Chunk
from infctx.data.document import Document
from infctx.data.stream import DocumentSource
from infctx.errors import RecipeError
from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.recipe.schema import Recipe
from infctx.training import cache_place
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx.training.cache_place import bytes_with_gradient, cache_bytes, cache_goes_to_host
from infctx.training.engine import WholeWeights
from infctx.training.step import step_gradient
from infctx.training.window_cache import WindowCache

GPU = torch.device("cuda")


def of_memory(monkeypatch: pytest.MonkeyPatch, *, device: int, host: int) -> None:
    monkeypatch.setattr(cache_place, "free_bytes", lambda _: device)
    monkeypatch.setattr(cache_place, "free_host_bytes", lambda: host)


def test_bytes_by_hand(make_finch: Callable[..., Finch]) -> None:
    # An id, and 32 / 16 numbers in float32; once more for the gradient, and twice while a chunk goes backward.
    gold = make_finch("goldfinch").config
    assert cache_bytes(gold, rows=2, num_tokens=10) == 20 * (4 + 4 * 2)
    assert bytes_with_gradient(gold, rows=2, num_tokens=10) == 20 * (4 + 16 * 2)
    # Key and value of three layers.
    assert cache_bytes(make_finch("gptalpha").config, rows=1, num_tokens=1) == 4 + 4 * 2 * 32 * 3
    assert bytes_with_gradient(make_finch("6c2").config, rows=1, num_tokens=10**6) == 0


def test_a_quarter_of_the_gpu_and_then_the_host(
    make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sizes = make_finch("goldfinch").config, {"rows": 2, "num_tokens": 1000}
    needed = bytes_with_gradient(config, **sizes)
    of_memory(monkeypatch, device=4 * needed, host=needed)
    assert not cache_goes_to_host(config, GPU, **sizes)
    assert not cache_goes_to_host(config, torch.device("cpu"), **sizes)
    of_memory(monkeypatch, device=4 * needed - 4, host=needed)
    assert cache_goes_to_host(config, GPU, **sizes)
    # Two ranks of the machine want as much.
    with pytest.raises(RecipeError):
        cache_goes_to_host(config, GPU, **sizes, sharers=2)
    of_memory(monkeypatch, device=0, host=needed - 1)
    with pytest.raises(RecipeError, match=r"1,000 tokens .* GoldFinch .* 36 bytes .* room for 999 tokens.*run\.rows"):
        cache_goes_to_host(config, torch.device("cpu"), **sizes)


@pytest.fixture
def goldfinch_recipe(recipe: Callable[..., Recipe], make_finch: Callable[..., Finch], tmp_path: Path) -> Recipe:
    model = make_finch("goldfinch", n_layer=3, n_embd=16, vocab_size=257, dim_ffn=24)
    save_model(model, tmp_path / "base.safetensors", format="safetensors", dtype=torch.float32, tokenizer="bytes")
    return recipe("run", "bptt.window=document")


def test_a_run_without_room_is_refused_before_it_begins(
    goldfinch_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, _ = check_recipe(goldfinch_recipe)
    assert "attention  the last layer attends; 8 bytes of every token are cached, and as much for the gradient" in lines
    monkeypatch.setattr(cache_place, "free_host_bytes", lambda: 1000)
    with pytest.raises(RecipeError, match=r"226 tokens do not fit .* 20 bytes .*data\.max_tokens"):
        check_recipe(goldfinch_recipe)


def test_a_cache_is_made_in_one_piece(make_finch: Callable[..., Finch]) -> None:
    start = make_finch("goldfinch").fresh_state(1)
    cache = WindowCache(start, on_host=False, num_tokens=12)
    place = cache._vectors.data_ptr()
    for index in range(4):
        own = ModelState(*start.recurrent, torch.zeros(1, 1, 3, dtype=torch.int32), torch.ones(1, 1, 3, 2))
        cache.put(index, own)
    assert cache._vectors.data_ptr() == place
    assert cache.before(4, start.recurrent).num_cached == 12


@pytest.mark.parametrize("on_host", [False, True])
def test_a_window_leaves_one_cache(
    make_finch: Callable[..., Finch], on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the window before is gone when the next one runs, and so are gradients of the chunk before."""
    model = make_finch("gptalpha", n_layer=1).train()
    tokens = torch.randint(0, 50, (1, 8))
    chunk = Chunk(tokens=tokens, targets=tokens, loss_weight=torch.ones(1, 8), starts=None, index=0, has_loss=True)
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []
    begin = WindowCache.__init__

    def noted(self: WindowCache, *arguments: object, **settings: object) -> None:
        begin(self, *arguments, **settings)
        made.append(weakref.ref(self._vectors))

    monkeypatch.setattr(WindowCache, "__init__", noted)

    def pause(*_: object) -> None:
        alive.append(sum(ref() is not None for ref in made))

    backward_through_windows(
        ChunkObjective(model),
        [replace(chunk, index=index) for index in range(6)],
        model.fresh_state(1),
        window=2,
        weight_total=8.0,
        boundaries=BoundaryPlan(cache_on_host=on_host),
        before_chunk=pause,
    )
    assert len(made) == 3
    assert set(alive) == {1}


def test_documents_that_have_ended_leave_no_cache(make_finch: Callable[..., Finch]) -> None:
    """With accumulation those of all groups of rows would wait for the end of the step."""
    model = make_finch("goldfinch").train()
    ids, weights = np.arange(24, dtype=np.int32), (np.arange(24) > 0).astype(np.float32)
    documents = [Document(tokens=ids, weights=weights, origin=str(n)) for n in range(4)]
    sizes, one_rank = {"rows": 1, "accumulate": 2, "chunk_tokens": 8}, {"rank": 0, "world": 1}
    data = DocumentSource(documents, **sizes, **one_rank, seed=0, epochs=None, steps=2).next_step()
    assert data is not None
    engine = WholeWeights(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gradient = step_gradient(ChunkObjective(model), data, 2 * [model.fresh_state(1)], window="document", engine=engine)
    assert [state.num_cached for state in gradient.states] == [0, 0]
    assert all(state.has_cache for state in gradient.states)
