"""A memory that is too small costs time and not the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.assemble import run_recipe
from infctx.checkpoint.run_state import load_run_state
from infctx.errors import MachineError, RecipeError
from infctx.recipe.schema import Recipe
from infctx.training.bptt import ChunkObjective
from infctx.training.metrics import read_metrics
from infctx.training.progress import SilentProgress
from infctx.training.signals import StopRequested


@pytest.fixture
def most_tokens(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A memory for chunks of so many tokens: the graph of a longer one does not fit."""
    limit = [2**30]
    forward = ChunkObjective.forward

    def limited(self: ChunkObjective, tokens: torch.Tensor, *arguments: object, **settings: object) -> object:
        if tokens.shape[1] > limit[0] and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return forward(self, tokens, *arguments, **settings)

    monkeypatch.setattr(ChunkObjective, "forward", limited)

    def set_limit(tokens: int) -> None:
        limit[0] = tokens

    return set_limit


def run(recipe: Recipe) -> tuple[list[dict], dict[str, torch.Tensor], list[str]]:
    """Its metrics, its weights, and what it said."""
    progress, messages = SilentProgress(), []
    progress.message = messages.append
    run_recipe(recipe, progress)
    folder = Path(recipe.run.folder)
    loaded = load_run_state(folder)
    assert loaded is not None
    return read_metrics(folder / "metrics.jsonl"), loaded.state.tensors["trainable"], messages


KINDS = {
    "stream": ("bptt.chunk_tokens=70", "bptt.window=2"),
    "documents": ("bptt.chunk_tokens=70", "bptt.window=document"),
    "documents, accumulated": ("bptt.chunk_tokens=70", "bptt.window=2", "data.mode=document", "run.accumulate=2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shorter_chunks_make_the_same_gradient(
    recipe: Callable[..., Recipe], most_tokens: Callable[[int], None], kind: str
) -> None:
    # A rate at which one step's rounding is not blown up by the next; Adam divides by the gradient's size.
    settings = (*KINDS[kind], "bptt.activations=keep", "optimizer.lr=1e-4", "run.steps=3", "optimizer.eps=1e-3")
    plain, weights, messages = run(recipe("plain", *settings))
    assert not any("out of memory" in message for message in messages)
    most_tokens(20)
    short, short_weights, messages = run(recipe("short", *settings))
    said = [message for message in messages if "out of memory" in message]
    assert len(said) == 2
    assert "with chunks of 70 tokens: from here on 35" in said[0]
    assert "with chunks of 35 tokens: from here on 18" in said[1]
    window = plain[-1]["window"]
    if window != "document":
        assert window == 2
        assert f"crosses {2 * 4} of them" in said[1]
    for line in short[1:]:
        assert (line["chunk_tokens"], line["window"]) == (18, window if window == "document" else 8)
        assert line["chunks"] > plain[line["step"]]["chunks"]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in short[1:]] == pytest.approx([line[key] for line in plain[1:]], rel=1e-6)
    for name, expected in weights.items():
        assert float((short_weights[name] - expected).norm() / expected.norm()) < 1e-6, name


def test_what_is_tried_in_vain_leaves_no_trace(
    recipe: Callable[..., Recipe], most_tokens: Callable[[int], None]
) -> None:
    """With dropout too: the same bits as of a run that began with the short chunks."""
    settings = ("bptt.window=document", "bptt.activations=keep", "adapter.kind=lora", "adapter.dropout=0.3")
    settings = (*settings, "data.validation=null", "run.steps=3")
    _, weights, _ = run(recipe("short", *settings, "bptt.chunk_tokens=16"))
    most_tokens(16)
    _, found, messages = run(recipe("long", *settings, "bptt.chunk_tokens=64"))
    assert len([message for message in messages if "out of memory" in message]) == 2
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_run_that_goes_on_keeps_its_shorter_chunks(
    recipe: Callable[..., Recipe], most_tokens: Callable[[int], None], stop_after: Callable[[int | None], None]
) -> None:
    settings = ("bptt.chunk_tokens=70", "bptt.window=document", "bptt.activations=keep", "adapter.kind=lora")
    settings = (*settings, "adapter.dropout=0.3", "data.validation=null", "run.steps=5")
    most_tokens(20)
    straight, weights, _ = run(recipe("straight", *settings))
    stopped = recipe("stopped", *settings)
    for distance in (3, 9, 17):
        stop_after(distance)
        with pytest.raises(StopRequested):
            run_recipe(stopped, SilentProgress())
    stop_after(None)
    lines, found, messages = run(stopped)
    assert not any("out of memory" in message for message in messages)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert [line["loss"] for line in lines] == [line["loss"] for line in straight]


def test_no_room_for_the_shortest_chunk_is_an_error_with_the_numbers(
    recipe: Callable[..., Recipe], most_tokens: Callable[[int], None], stop_after: Callable[[int | None], None]
) -> None:
    built = recipe("run", "bptt.activations=keep", "run.checkpoint_every=1", "bptt.chunk_tokens=64")
    stop_after(30)
    with pytest.raises(StopRequested):
        run_recipe(built, SilentProgress())
    stop_after(None)
    before = load_run_state(Path(built.run.folder))
    most_tokens(3)
    with pytest.raises(MachineError) as raised:
        run_recipe(built, SilentProgress())
    message = str(raised.value)
    assert "Tried to allocate 20.00 GiB" in message
    assert "Chunks of 16 tokens do not fit either" in message
    assert "gradient and optimizer" in message
    assert "GB free" in message
    assert "checkpoint" in message
    after = load_run_state(Path(built.run.folder))
    assert before is not None
    assert after is not None
    assert (before.state.step, before.state.passes) == (after.state.step, after.state.passes)


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_window_without_room_is_refused_with_the_figures(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    for name in ("free_bytes", "free_host_bytes"):
        monkeypatch.setattr(f"infctx.assemble.{name}", lambda *device: 5_000)
    monkeypatch.setattr("infctx.assemble.shutil.disk_usage", lambda path: type("Usage", (), {"free": 6_000}))
    built = recipe("run", f"bptt.boundaries={where}", "bptt.window=40")
    with pytest.raises(RecipeError) as raised:
        run_recipe(built, SilentProgress())
    message = str(raised.value)
    assert message.startswith("bptt.window: 40 does not fit: up to 41 boundary states of 0.0 MB")
    assert f"{where} has 0.00 GB free" in message
    assert "bptt.thin_boundaries: true" in message
    assert not Path(built.run.folder).exists()
