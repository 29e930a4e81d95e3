"""The self-test of the gradient: it passes on what is right, measures what a window costs, and sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infctx.adapters.peft_adapters import attach_lora
from infctx.data.document import Document
from infctx.errors import DataError
from infctx.model.finch import Finch
from infctx.training.bptt import ChunkObjective
from infctx.training.gradient_check import GradientCheck, check_gradient


def make_document(length: int, *, weight: float = 1.0) -> Document:
    weights = np.full(length, weight, dtype=np.float32)
    weights[0] = 0
    tokens = np.random.default_rng(0).integers(1, 50, length).astype(np.uint16)
    return Document(tokens=tokens, weights=weights, origin="test:1")


def check(model: Finch, *, objective: Callable[..., Any] | None = None, **settings: Any) -> GradientCheck:
    defaults = {"chunk_tokens": 16, "window": 2, "precision": "fp32", "backward": torch.autograd.backward}
    documents = settings.pop("documents", [make_document(30), make_document(200)])
    return check_gradient(objective or ChunkObjective(model), model, documents, **(defaults | settings))


@pytest.mark.parametrize("version", ["6", "5.2"])
def test_the_chunked_gradient_is_within_its_bound(make_finch: Callable[..., Finch], version: str) -> None:
    model = make_finch(version)
    measured = check(model)
    assert measured.num_tokens == 64
    assert measured.is_within_bound
    assert 0 < max(measured.relative_error.values()) < 2e-5
    assert "time_mix.key" in measured.relative_error
    assert "time_mix.decay_base" in measured.relative_error
    # The window of two chunks cuts the prefix once: what lies before the recurrences feels it, the head does not.
    assert measured.window_bias["embedding"] > 1e-3
    assert measured.window_bias["head"] < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_exact_window_has_no_bias_to_measure(make_finch: Callable[..., Finch]) -> None:
    assert check(make_finch("6"), window="document").window_bias is None


def test_a_short_document_is_cut_all_the_same(make_finch: Callable[..., Finch]) -> None:
    measured = check(make_finch("6"), documents=[make_document(21)], window=1)
    assert measured.num_tokens == 20
    assert max(measured.relative_error.values()) > 0
    assert measured.window_bias["embedding"] > 1e-3


def test_a_gradient_lost_between_chunks_is_seen(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    objective = ChunkObjective(model)

    def forgetful(*arguments: Any, **settings: Any) -> tuple[Tensor, ...]:
        loss, wkv, *shifts = objective(*arguments, **settings)
        return loss, wkv.detach() + 0 * wkv, *shifts

    measured = check(model, objective=forgetful)
    assert not measured.is_within_bound
    assert measured.relative_error["time_mix.key"] > 1e-3


def test_a_gradient_that_is_not_a_number_is_not_within_the_bound(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    assert not check(model).is_within_bound


def test_dropout_does_not_disturb_it_and_training_mode_comes_back(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    attach_lora(model, rank=4, alpha=8, dropout=0.5, targets=["key"])
    model.train()
    measured = check(model)
    assert measured.is_within_bound
    assert model.training
    assert measured.without_gradient == {"time_mix.key.lora_A", "channel_mix.key.lora_A"}


def test_it_takes_a_shorter_prefix_where_the_memory_ends(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    objective = ChunkObjective(model)

    def limited(tokens: Tensor, *arguments: Any, **settings: Any) -> tuple[Tensor, ...]:
        if tokens.shape[1] > 40:
            raise torch.OutOfMemoryError("no more")
        return objective(tokens, *arguments, **settings)

    measured = check(model, objective=limited, num_tokens=128)
    assert measured.num_tokens == 32
    assert measured.is_within_bound


def test_it_looks_behind_a_long_prompt(make_finch: Callable[..., Finch]) -> None:
    document = make_document(500)
    document.weights[:450] = 0
    measured = check(make_finch("6"), documents=[document])
    assert measured.is_within_bound
    assert not measured.without_gradient


def test_what_cannot_be_measured_is_refused(make_finch: Callable[..., Finch]) -> None:
    with pytest.raises(DataError, match="a prefix of 9 tokens is too short"):
        check(make_finch("6"), documents=[make_document(10)])
    with pytest.raises(DataError, match="nothing to learn in it"):
        check(make_finch("6"), documents=[make_document(200, weight=0.0)])
