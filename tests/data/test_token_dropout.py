"""Targets left out at random: which ones follows from the seed, the step and the place, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from infctx.data.chunking import RowSlice
from infctx.data.document import Document
from infctx.data.step_source import StepData, StepSource
from infctx.data.stream import DocumentSource, StreamSource
from infctx.data.token_dropout import drop_targets
from infctx.model.finch import Finch
from infctx.training.bptt import ChunkObjective
from infctx.training.engine import WholeWeights
from infctx.training.step import step_gradient

Weights = npt.NDArray[np.float64]
P = 0.3


def make_documents(count: int = 12) -> list[Document]:
    numbers = np.random.default_rng(2)
    documents = []
    for index in range(count):
        length = int(numbers.integers(20, 90))
        weights = (numbers.random(length) + 0.5).astype(np.float32)
        weights[0] = 0
        tokens = numbers.integers(0, 50, length).astype(np.uint16)
        documents.append(Document(tokens=tokens, weights=weights, origin=f"d:{index}"))
    return documents


def make_source(kind: str = "stream", **settings: Any) -> StepSource:
    defaults = {"rows": 2, "accumulate": 2, "chunk_tokens": 8, "seed": 3, "steps": 6, "token_dropout": P}
    if kind == "stream":
        return StreamSource(make_documents(), **({"window": 4} | defaults | settings))
    return DocumentSource(make_documents(), **(defaults | settings))


def weights_of(data: StepData) -> list[Weights]:
    """Of every row of this rank, without padding, as the chunks have them."""
    rows: list[Weights] = []
    for group in data.groups:
        whole = torch.cat([chunk.loss_weight for chunk in group.chunks], 1).double().numpy()
        rows += [row[: len(tokens)] for row, tokens in zip(whole, group.chunks.rows, strict=True)]
    return rows


def steps_of(*sources: StepSource) -> list[list[Weights]]:
    """The rows of all ranks at every step; checks what every rank says of the whole step."""
    steps = []
    while (data := [source.next_step() for source in sources])[0] is not None:
        steps.append([row for of_rank in data if of_rank is not None for row in weights_of(of_rank)])
        total = sum(row.sum() for row in steps[-1])
        for of_rank in data:
            assert of_rank is not None
            assert of_rank.weight_total == pytest.approx(total, rel=1e-12)
            assert sum(of_rank.set_weights) == pytest.approx(total, rel=1e-12)
    return steps


def assert_equal(found: list[list[Weights]], expected: list[list[Weights]]) -> None:
    assert len(found) == len(expected) > 0
    for of_step, wanted in zip(found, expected, strict=True):
        assert len(of_step) == len(wanted)
        assert all(np.array_equal(*pair) for pair in zip(of_step, wanted, strict=True))


@pytest.mark.parametrize("kind", ["stream", "document"])
def test_the_share_that_is_left_out(kind: str) -> None:
    everything, kept = steps_of(make_source(kind, token_dropout=0.0)), steps_of(make_source(kind))
    left_out: list[bool] = []
    for of_step, wanted in zip(kept, everything, strict=True):
        for row, whole in zip(of_step, wanted, strict=True):
            assert bool(((row == whole) | (row == 0)).all())
            left_out += (row[whole > 0] == 0).tolist()
    # Three standard deviations.
    assert np.mean(left_out) == pytest.approx(P, abs=3 * (P * (1 - P) / len(left_out)) ** 0.5)
    assert len(left_out) > 500


def test_places_rows_steps_and_seeds_have_draws_of_their_own() -> None:
    row = RowSlice(
        tokens=np.zeros(4000, np.uint16),
        targets=np.zeros(4000, np.uint16),
        weights=np.ones(4000, np.float32),
        starts=np.zeros(4000, np.bool_),
    )
    draws = {}
    for seed, step in ((0, 1), (0, 2), (1, 1)):
        for number, found in enumerate(drop_targets([row, row], probability=0.5, seed=seed, step=step)):
            draws[seed, step, number] = found.weights > 0
    for key, one in draws.items():
        for other_key, other in draws.items():
            assert key == other_key or abs(float(np.mean(one == other)) - 0.5) < 0.05, (key, other_key)
    assert bool((row.weights == 1).all()), "the rows that came are left alone"


@pytest.mark.parametrize(
    "settings",
    [{"chunk_tokens": 16, "window": 2}, {"chunk_tokens": 32, "window": 1}, {"rows": 4, "accumulate": 1}],
    ids=["16", "32", "side by side"],
)
def test_chunks_and_groups_change_nothing(settings: dict[str, Any]) -> None:
    assert_equal(steps_of(make_source(**settings)), steps_of(make_source()))


@pytest.mark.parametrize("kind", ["stream", "document"])
def test_ranks_change_nothing(kind: str) -> None:
    ranks = [make_source(kind, rows=1, rank=rank, world=2) for rank in range(2)]
    assert_equal(steps_of(*ranks), steps_of(make_source(kind)))


@pytest.mark.parametrize("kind", ["stream", "document"])
def test_shorter_pieces_change_nothing(kind: str) -> None:
    for whole in iter(make_source(kind).next_step, None):
        assert_equal([weights_of(whole.in_pieces(3))], [weights_of(whole)])


@pytest.mark.parametrize("kind", ["stream", "document"])
def test_going_on_changes_nothing(kind: str) -> None:
    source, expected = make_source(kind), steps_of(make_source(kind))
    for _ in range(3):
        source.next_step()
    again = make_source(kind)
    again.restore(source.cursor())
    assert_equal(steps_of(again), expected[3:])


def test_the_loss_is_over_the_weights_that_are_kept(make_finch: Callable[..., Finch]) -> None:
    """Gradient of Σ kept weight · loss / Σ kept weight by autograd over whole documents."""
    model = make_finch("6", dtype=torch.float64)
    data = make_source("document", rows=2, accumulate=2).next_step()
    assert data is not None
    states = [model.fresh_state(2).detach() for _ in data.groups]
    model.train()
    engine = WholeWeights(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gradient = step_gradient(ChunkObjective(model), data, states, window="document", engine=engine)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rows = [row for group in data.groups for row in group.chunks.rows]
    kept = sum(float(row.weights.astype(np.float64).sum()) for row in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits, _ = model(torch.from_numpy(row.tokens.astype(np.int64))[None])
        losses = F.cross_entropy(logits[0], torch.from_numpy(row.targets.astype(np.int64)), reduction="none")
        loss = loss + (losses * torch.from_numpy(row.weights)).sum() / kept
    loss.backward()
    assert float(gradient.loss_sums.sum()) / data.weight_total == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-13)
