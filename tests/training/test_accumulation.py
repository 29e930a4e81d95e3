"""The gradient of 256 chunks in bf16 training is the sum of theirs in float32, and is clipped once, as a whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from infctx.data.document import Document
from infctx.data.stream import DocumentSource, StepData
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective, Window
from infctx.training.engine import WholeWeights
from infctx.training.fabric_run import open_engine
from infctx.training.precision import apply_precision_
from infctx.training.step import StepReport, run_step

NUM_CHUNKS = 256
ROWS, ACCUMULATE, CHUNK_TOKENS = 2, 2, 4
Gradients = dict[str, Tensor]


def make_step() -> StepData:
    """Two groups of 128 chunks; the documents weigh very differently, and so do their chunks."""
    generator = np.random.default_rng(0)
    documents = []
    for index in range(ROWS * ACCUMULATE):
        length = NUM_CHUNKS // ACCUMULATE * CHUNK_TOKENS
        weights = generator.random(length, dtype=np.float32) * np.float32(10.0**-index)
        weights[0] = 0
        tokens = generator.integers(1, 50, length).astype(np.uint16)
        documents.append(Document(tokens=tokens, weights=weights, origin=f"test:{index}"))
    source = DocumentSource(documents, rows=ROWS, accumulate=ACCUMULATE, chunk_tokens=CHUNK_TOKENS, seed=0, steps=1)
    data = source.next_step()
    assert data is not None
    assert sum(len(group.chunks) for group in data.groups) == NUM_CHUNKS
    return data


class Bf16Run:
    """One step of a small model in bf16, as a run sets it up.

    Attributes:
        pieces: what every backward pass added, read out on its own; empty unless `reads_out`.
        used: the gradient with which the optimizer updated the weights, for each update.
    """

    def __init__(self, make_finch: Callable[..., Finch], *, frozen: str | None = None, reads_out: bool = False) -> None:
        self.model = make_finch("6", n_layer=1, n_embd=16, dim_ffn=29, has_initial_state=True)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(frozen is None or frozen not in name)
        self._engine = open_engine(devices=1, strategy="single", precision="bf16")
        apply_precision_(self.model, self._engine.precision)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        self.used: list[Gradients] = []
        optimizer.register_step_pre_hook(lambda *_: self.used.append(self.gradients()))
        self._wrapped = self._engine.setup(ChunkObjective(self.model), lambda: optimizer)
        self._reads_out = reads_out
        self.pieces: list[Gradients] = []

    def gradients(self) -> Gradients:
        """A copy of every .grad there is, in its own dtype."""
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self, data: StepData, *, window: Window, clip: float | None = None) -> StepReport:
        states = [
            ModelState.zeros(self.model.config, ROWS, dtype=self.model.state_dtype, device=self._engine.device)
            for _ in data.groups
        ]
        report, _ = run_step(
            self._wrapped,
            data,
            states,
            window=window,
            engine=WholeWeights(self.model, self._engine.optimizer, backward=self._backward),
            clip=clip,
        )
        return report

    def _backward(self, scalar: Tensor) -> None:
        self._engine.backward(scalar)
        if self._reads_out:
            self.pieces.append(self.gradients())
            self.model.zero_grad(set_to_none=True)


def summed(pieces: list[Gradients], dtype: torch.dtype = torch.float64) -> Gradients:
    """The pieces one after another in this dtype; a piece need not have every parameter."""
    total: Gradients = {}
    for piece in pieces:
        for name, gradient in piece.items():
            added = gradient.to(dtype)
            total[name] = total[name] + added if name in total else added
    return total


def relative_errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - reference.double()).norm() / reference.double().norm())
        for name, reference in expected.items()
    }


def scaled_to(norm: float, gradients: Gradients) -> Gradients:
    factor = norm / norm_of(gradients)
    return {name: gradient * factor for name, gradient in gradients.items()}


def norm_of(gradients: Gradients) -> float:
    return float(torch.cat([gradient.double().flatten() for gradient in gradients.values()]).norm())


@pytest.fixture(scope="module")
def exact(make_finch: Callable[..., Finch]) -> list[Gradients]:
    """The gradient of every chunk alone, back through the whole document."""
    apart = Bf16Run(make_finch, reads_out=True)
    apart.step(make_step(), window="document")
    return apart.pieces


def assert_adds_up(run: Bf16Run, pieces: list[Gradients]) -> None:
    """In float32: as near to the sum of the pieces as that allows, and nearer than bf16 would bring any parameter."""
    assert len(pieces) == NUM_CHUNKS
    found, expected = run.gradients(), summed(pieces)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    errors = relative_errors(found, expected)
    # 255 roundings of 6e-8; the sums do not cancel.
    assert max(errors.values()) <= 1e-5, errors
    rounded = relative_errors(summed(pieces, torch.bfloat16), expected)
    assert min(rounded.values()) > 1e-4, rounded


def test_256_chunks_in_bf16_add_up_in_float32(make_finch: Callable[..., Finch], exact: list[Gradients]) -> None:
    run = Bf16Run(make_finch)
    run.step(make_step(), window="document")
    assert_adds_up(run, exact)


def test_beside_frozen_bf16_weights_they_add_up_too(make_finch: Callable[..., Finch]) -> None:
    """With a window of one chunk, where nothing but .grad ties the chunks together."""
    apart, run = (Bf16Run(make_finch, frozen="channel_mix", reads_out=reads_out) for reads_out in (True, False))
    for one in (apart, run):
        one.step(make_step(), window=1)
    assert {p.dtype for p in run.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert_adds_up(run, apart.pieces)


def test_clipping_waits_for_the_last_chunk(make_finch: Callable[..., Finch], exact: list[Gradients]) -> None:
    """The one update has the whole gradient's direction and the clip's length; clipped chunks add up to another."""
    clip, whole = 1e-4, summed(exact)
    assert norm_of(whole) > 100 * clip
    run = Bf16Run(make_finch)
    report = run.step(make_step(), window="document", clip=clip)
    assert report.grad_norm == pytest.approx(norm_of(whole), rel=1e-5)
    assert len(run.used) == 1
    expected = scaled_to(clip, whole)
    errors = relative_errors(run.used[0], expected)
    # Clipping divides by the norm + 1e-6.
    assert max(errors.values()) <= 2e-5, errors
    clipped_apart = scaled_to(clip, summed([scaled_to(clip, piece) for piece in exact]))
    assert max(relative_errors(clipped_apart, expected).values()) > 0.1
