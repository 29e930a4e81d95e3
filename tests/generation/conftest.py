"""A small byte model that can write."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from infctx.data.tokenizer import BytesTokenizer
from infctx.generation.prompt_state import Reader
from infctx.generation.row import Voice
from infctx.model.finch import Finch
from infctx.model.single_token import SingleTokenStep


@pytest.fixture
def voice(make_finch: Callable[..., Finch]) -> Voice:
    model = make_finch(n_layer=2, n_embd=16, vocab_size=257, dim_ffn=32)
    return Voice(model=model, step=SingleTokenStep(model), tokenizer=BytesTokenizer())


@pytest.fixture
def reader() -> Reader:
    return Reader(fingerprint="f" * 16, tokenizer="bytes", dtype="float32")


@pytest.fixture
def document() -> npt.NDArray[np.int32]:
    """Two chunks and a half."""
    return np.random.default_rng(0).integers(1, 257, 2560).astype(np.int32)
