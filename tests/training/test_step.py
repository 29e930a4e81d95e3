"""One optimizer step: how rows are divided does not matter, and a step that must not be taken changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from infctx.data.document import Document
from infctx.data.stream import DocumentSource, StreamSource
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import ChunkObjective
from infctx.training.engine import WholeWeights
from infctx.training.step import run_step


def make_documents(lengths: list[int], *, masked: float = 0.3) -> list[Document]:
    generator = np.random.default_rng(0)
    documents = []
    for i, length in enumerate(lengths):
        weights = (generator.random(length) > masked).astype(np.float32) * generator.random(length, dtype=np.float32)
        weights[0] = 0
        tokens = generator.integers(1, 50, length).astype(np.uint16)
        documents.append(Document(tokens=tokens, weights=weights, origin=f"test:{i}"))
    return documents


def zeros(model: Finch, rows: int) -> ModelState:
    return ModelState.zeros(model.config, rows, dtype=torch.float64, device="cpu")


def steps_of(model: Finch, source: StreamSource | DocumentSource, rows: int, *, window: int | str) -> list[float]:
    """Train through a source with plain autograd; returns the losses."""
    objective = ChunkObjective(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states: list[ModelState] = []
    losses = []
    while (data := source.next_step()) is not None:
        if not data.carries_state or not states:
            states = [zeros(model, rows) for _ in data.groups]
        report, states = run_step(
            objective,
            data,
            states,
            window=window,
            engine=WholeWeights(model, optimizer),
            clip=0.5,
        )
        losses.append(report.loss)
    return losses


@pytest.mark.parametrize("mode", ["stream", "document"])
def test_rows_and_accumulation_are_the_same_thing(make_finch: Callable[..., Finch], mode: str) -> None:
    results = []
    for rows, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = make_finch("6", dtype=torch.float64, has_initial_state=True)
        settings = {"rows": rows, "accumulate": accumulate, "chunk_tokens": 8, "seed": 3, "epochs": 1}
        documents = make_documents([5, 40, 17, 1, 30, 22, 9, 61])
        if mode == "stream":
            losses = steps_of(model, StreamSource(documents, window=2, **settings), rows, window=2)
        else:
            losses = steps_of(model, DocumentSource(documents, **settings), rows, window="document")
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    for losses, parameters in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-10)
        for found, expected in zip(parameters, results[0][1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_loss_is_one_weighted_mean_over_everything(make_finch: Callable[..., Finch]) -> None:
    """Two documents of very different lengths: a mean of means would weigh them equally."""
    model = make_finch("6", dtype=torch.float64)
    documents = make_documents([60, 4])
    source = DocumentSource(documents, rows=1, accumulate=2, chunk_tokens=16, seed=0, steps=1)
    expected_sum = expected_weight = 0.0
    with torch.no_grad():
        for document in documents:
            tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
            weights = torch.from_numpy(document.weights).double()
            logits, _ = model(tokens)
            losses = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
            expected_sum += float((losses * weights[1:]).sum())
            expected_weight += float(weights[1:].sum())
    (loss,) = steps_of(model, source, 1, window="document")
    assert loss == pytest.approx(expected_sum / expected_weight, rel=1e-10)


@pytest.mark.parametrize("problem", ["nothing to learn", "not finite"])
def test_a_step_that_must_not_be_taken_changes_no_weight(make_finch: Callable[..., Finch], problem: str) -> None:
    model = make_finch("6", dtype=torch.float64)
    documents = make_documents([40], masked=1.0 if problem == "nothing to learn" else 0.0)
    source = StreamSource(documents, rows=1, accumulate=1, chunk_tokens=8, window=2, seed=0, steps=1)
    before = [p.detach().clone() for p in model.parameters()]
    backward = torch.autograd.backward
    if problem == "not finite":

        def backward(scalar: torch.Tensor) -> None:
            torch.autograd.backward(scalar * torch.inf)

    states = [zeros(model, 1)]
    report, after = run_step(
        ChunkObjective(model),
        source.next_step(),
        states,
        window=2,
        engine=WholeWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), backward=backward),
        clip=1.0,
    )
    assert problem in report.not_updated
    assert all(torch.equal(p, copy) for p, copy in zip(model.parameters(), before, strict=True))
    # The row has been read all the same.
    assert not torch.equal(after[0].wkv, states[0].wkv)
    assert (report.loss is None) == (problem == "nothing to learn")


def test_clipping_bounds_the_whole_gradient(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", dtype=torch.float64)
    source = StreamSource(make_documents([40]), rows=1, accumulate=1, chunk_tokens=8, window=2, seed=0, steps=1)
    report, _ = run_step(
        ChunkObjective(model),
        source.next_step(),
        [zeros(model, 1)],
        window=2,
        engine=WholeWeights(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        clip=0.01,
    )
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert report.grad_norm > 0.02
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("is_thinned", [False, True])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_a_step_leaves_no_tensor_to_the_collection_of_cycles(
    make_finch: Callable[..., Finch], is_thinned: bool, is_recomputed: bool
) -> None:
    """Python may not look for cycles for hundreds of steps: the states of all of them would lie on the device."""
    model = make_finch("6")
    model.recompute_layers(is_recomputed)
    source = StreamSource(make_documents([300]), rows=1, accumulate=1, chunk_tokens=8, window=4, seed=0, steps=4)
    objective, engine = ChunkObjective(model), WholeWeights(model, torch.optim.SGD(model.parameters(), lr=0.1))
    states = [ModelState.zeros(model.config, 1, dtype=torch.float32, device="cpu")]

    def step() -> None:
        nonlocal states
        data, plan = source.next_step(), BoundaryPlan(is_thinned=is_thinned)
        _, states = run_step(objective, data, states, window=4, engine=engine, clip=1.0, boundaries=plan)

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
