"""Folders for flash-linear-attention, read by it and run by its own kernels, and a folder it wrote, read here.

    python -m pytest tests/readers/test_fla_reader.py --fla-python PYTHON

PYTHON has torch, triton, transformers, einops and flash-linear-attention; seen with 0.6.0. It needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import infctx
from infctx.model.finch import Finch

# Nothing is taken from the number of channels there. Its kernel for more than 64 tokens is not for the interpreter.
SIZES = {"n_layer": 2, "n_embd": 64, "head_size": 16, "dim_ffn": 101, "lerp_rank": 5, "decay_rank": 7}
# Its group norms have the epsilon of its other norms, for which the export scales the values, and so the state.
VALUE_SCALE = 1 / 8


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> str:
    python = pytestconfig.getoption("--fla-python")
    if python is None:
        pytest.skip("needs --fla-python PYTHON, one with flash-linear-attention; see the head of this file")
    return str(python)


@pytest.fixture(scope="module", params=["6", "5.2"])
def model(request: pytest.FixtureRequest, make_finch: Callable[..., Finch]) -> Finch:
    """A Finch; and an Eagle, which is exported as the Finch that computes the same."""
    return make_finch(request.param, **SIZES)


@pytest.fixture(scope="module")
def answers(python: str, model: Finch, ask: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("reader") / "fla"
    infctx.save_model(model, folder, format="fla", dtype=torch.float32)
    return ask(python, "fla_program.py", folder)


def test_fla_computes_the_same(answers: Any, model: Finch) -> None:
    answers.check(model, wkv_scale=VALUE_SCALE)


def test_what_fla_wrote_is_read(answers: Any) -> None:
    answers.check_returned(infctx.load_model(answers.returned))
