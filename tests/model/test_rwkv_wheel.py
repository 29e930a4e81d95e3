"""Logits and states equal those of the official runtime, the `rwkv` wheel, on random float32 checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import load_model
from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.model.state import ModelState

# Logits have standard deviation about 1.
TOLERANCE = 1e-4
CASES = {
    "finch": {"version": "6", "n_embd": 128, "head_size": 64, "dim_ffn": 448, "lerp_rank": 32, "decay_rank": 64},
    "finch, ranks of 7B, head 32, odd ffn": {
        "version": "6",
        "n_embd": 256,
        "head_size": 32,
        "dim_ffn": 901,
        "lerp_rank": 64,
        "decay_rank": 128,
    },
    "finch with a tuned state": {"version": "6", "n_embd": 128, "head_size": 64, "has_initial_state": True},
    "eagle": {"version": "5.2", "n_embd": 128, "head_size": 64, "dim_ffn": 448},
    "eagle, head 16, odd ffn": {"version": "5.2", "n_embd": 64, "head_size": 16, "dim_ffn": 225},
    "eagle with a tuned state": {"version": "5.2", "n_embd": 128, "head_size": 32, "has_initial_state": True},
}


def load_official(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV

        return RWKV(model=str(path.with_suffix("")), strategy="cpu fp32", verbose=False)


def official_state(entries: list[Tensor], n_layer: int) -> ModelState:
    return ModelState(
        torch.stack([entries[3 * i + 1] for i in range(n_layer)])[:, None],
        torch.stack([entries[3 * i] for i in range(n_layer)])[:, None],
        torch.stack([entries[3 * i + 2] for i in range(n_layer)])[:, None],
    )


def assert_same(found: tuple[Tensor, ModelState], logits: Tensor, state: ModelState) -> None:
    torch.testing.assert_close(found[0], logits, rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(found[1], state, strict=True):
        # States reach 100 and more: the difference counts beside the largest value.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.fixture(params=list(CASES), scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_finch: Callable[..., Finch]
) -> tuple[Finch, Any]:
    model = make_finch(vocab_size=300, **CASES[request.param])
    path = tmp_path_factory.mktemp("wheel") / "model.pth"
    save_model(model, path, dtype=torch.float32)
    return load_model(path), load_official(path)


@torch.no_grad()
def test_as_a_sequence(pair: tuple[Finch, Any]) -> None:
    model, official = pair
    tokens = torch.randint(0, 300, (1, 77))
    logits, entries = official.forward(tokens[0].tolist(), None, full_output=True)
    assert 0.5 < float(logits.std()) < 2
    assert_same(model(tokens), logits[None], official_state(entries, model.config.n_layer))


@torch.no_grad()
def test_token_by_token(pair: tuple[Finch, Any]) -> None:
    model, official = pair
    tokens = torch.randint(0, 300, (1, 20))
    state, entries = None, None
    for t in range(tokens.shape[1]):
        logits, state = model(tokens[:, t : t + 1], state)
        expected, entries = official.forward([int(tokens[0, t])], entries)
        assert_same((logits[:, 0], state), expected[None], official_state(entries, model.config.n_layer))


@torch.no_grad()
def test_in_ragged_chunks(pair: tuple[Finch, Any]) -> None:
    model, official = pair
    tokens = torch.randint(0, 300, (1, 90))
    expected, entries = official.forward(tokens[0].tolist(), None, full_output=True)
    state, pieces = None, []
    for part in tokens.split([1, 33, 2, 54], dim=1):
        logits, state = model(part, state)
        pieces.append(logits)
    assert_same((torch.cat(pieces, 1), state), expected[None], official_state(entries, model.config.n_layer))
