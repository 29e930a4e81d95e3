"""A walk through the chunks that is left at any pause, written down, and gone on with elsewhere finds the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infctx.adapters.peft_adapters import attach_lora
from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import ChunkedResult, ChunkObjective, Window, backward_through_windows
from infctx.training.step_place import StepPlace, WalkPlace, WindowsPlace, random_state, set_random_state

NUM_CHUNKS = 7
PLANS = {"device": {}, "thinned": {"is_thinned": True}, "disk": {"where": "disk"}}


class LeftHere(Exception):
    """Carries a place."""


def make_chunks() -> list[Chunk]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (2, 5 * NUM_CHUNKS + 1), generator=generator)
    starts = torch.rand(2, 5 * NUM_CHUNKS, generator=generator) < 0.05
    sets = torch.randint(3, (2, 5 * NUM_CHUNKS), generator=generator, dtype=torch.uint8)
    chunks = []
    for index in range(NUM_CHUNKS):
        begin, end = 5 * index, 5 * index + (5 if index < NUM_CHUNKS - 1 else 3)
        has_loss = index not in (2, 5)
        chunk = Chunk(
            tokens=tokens[:, begin:end],
            targets=tokens[:, begin + 1 : end + 1],
            loss_weight=torch.full((2, end - begin), float(has_loss)),
            starts=starts[:, begin:end],
            index=index,
            has_loss=has_loss,
            sets=sets[:, begin:end],
            num_sets=3,
        )
        chunks.append(chunk)
    return chunks


def written_and_read(place: WindowsPlace) -> WindowsPlace:
    """Through everything a checkpoint would put it through, but the files."""
    step = StepPlace(
        group=0,
        states_after=[],
        loss_sums=[],
        windows=place,
        random_state=random_state(torch.device("cpu")),
        passes=3,
        seconds=0.5,
        set_losses=torch.tensor([1.5, -0.0, 2.0**-60], dtype=torch.float64),
    )
    tensors = {name: tensor.clone() for name, tensor in step.to_tensors().items()}
    facts = json.loads(json.dumps(step.to_facts()))
    read = StepPlace.from_parts(facts, tensors, torch.device("cpu"))
    assert (read.passes, read.seconds) == (3, 0.5)
    assert torch.equal(read.set_losses, step.set_losses)
    return read.windows


def everything(model: Finch, result: ChunkedResult) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return [
        result.loss_sum,
        result.set_losses,
        *result.state,
        *result.initial_state_gradient,
        torch.get_rng_state(),
        *gradients,
    ]


@pytest.mark.parametrize(
    ("version", "plan", "dropout"),
    [*(("6", plan, dropout) for plan in PLANS for dropout in (None, 0.3)), ("goldfinch", "thinned", None)],
)
@pytest.mark.parametrize("window", [1, 4, "document"])
def test_left_at_any_pause(
    make_finch: Callable[..., Finch], tmp_path: Path, version: str, window: Window, plan: str, dropout: float | None
) -> None:
    model = make_finch(version, n_layer=2, n_embd=16, dim_ffn=24)
    if dropout is not None:
        targets = ["receptance", "key", "value"]
        torch.manual_seed(3)
        attach_lora(model, rank=2, alpha=4.0, dropout=dropout, targets=targets, train_also=["*.bonus"])
    model.train()
    chunks = make_chunks()

    def walk(start: object, before_chunk: Callable[..., None] | None = None) -> ChunkedResult:
        return backward_through_windows(
            ChunkObjective(model),
            chunks,
            start,
            window=window,
            weight_total=60.0,
            keeps_random_state=dropout is not None,
            boundaries=BoundaryPlan(folder=tmp_path, **PLANS[plan]),
            before_chunk=before_chunk,
        )

    pauses = 0

    def count(tell: Callable[[], WindowsPlace], here: WalkPlace) -> None:
        nonlocal pauses
        assert here == (tell().first, tell().first + tell().next, tell().in_sweep_2)
        pauses += 1

    torch.manual_seed(9)
    expected = everything(model, walk(model.fresh_state(2), count))
    expected = [tensor.clone() for tensor in expected]
    assert pauses >= NUM_CHUNKS * (1 if window == 1 else 2) - 3

    for leave_at in range(0, pauses, 1 if dropout is None and plan == "thinned" else 3):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(9)
        left = leave_at

        def leave(tell: Callable[[], WindowsPlace], here: WalkPlace) -> None:
            nonlocal left
            if left == 0:
                raise LeftHere(written_and_read(tell()), random_state(torch.device("cpu")))
            left -= 1

        with pytest.raises(LeftHere) as raised:
            walk(model.fresh_state(2), leave)
        place, random = raised.value.args
        assert len(place.boundaries) <= 5 + 1
        # Whatever else the process did in between.
        torch.manual_seed(1234)
        set_random_state(random, torch.device("cpu"))
        result = walk(place)
        found = everything(model, result)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), leave_at
        # GOLD's shifts at a border are those of the whole chunk up to rounding.
        assert float(result.largest_difference) <= (1e-5 if model.config.n_attention else 0)
