"""What every test can count on: seeds, poisoned memory, small random models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Read by the rwkv wheel, the oracle of the model tests, when it is imported: plain torch, no compiled extensions.
os.environ.update({"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"})

import jaxtyping
import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/readers needs and this project does not install: other people's model code, and a Python to run it."""
    group = parser.getgroup("readers", "tests/readers: exports read by programs nobody here wrote")
    group.addoption("--hf-code", metavar="FOLDER", help="modeling_rwkv{5,6}.py and the files that go with them")
    group.addoption("--hf-python", metavar="PYTHON", help="a Python with torch and transformers (default: this one)")
    group.addoption("--fla-python", metavar="PYTHON", help="a Python with flash-linear-attention")
    group.addoption("--goldfinch-code", metavar="FOLDER", help="a checkout of the GoldFinch paper's code")
    group.addoption("--llama-python", metavar="PYTHON", help="a Python with llama-cpp-python")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """The same numbers every time; memory that nobody filled holds NaN, so that nobody reads it unnoticed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)


def random_finch(
    version: str = "6",
    *,
    n_layer: int = 3,
    n_embd: int = 32,
    vocab_size: int = 50,
    head_size: int = 8,
    dim_ffn: int = 101,
    lerp_rank: int = 4,
    decay_rank: int = 6,
    has_initial_state: bool = False,
    has_initial_shifts: bool = False,
    uses_rope: bool | None = None,
    front: str | None = None,
    ratio: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Finch:
    """A model in which every path carries signal: fresh weights are zero in many places and would hide errors."""
    config = new_config(
        version=version,
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=head_size,
        dim_ffn=dim_ffn,
        lerp_rank=lerp_rank,
        decay_rank=decay_rank,
        uses_rope=uses_rope,
        front=front,
        ratio=ratio,
    )
    model = Finch(config, has_initial_state=has_initial_state, has_initial_shifts=has_initial_shifts)
    initialise_(model, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.embedding.weight.normal_(generator=generator)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[1] if name.endswith("weight") and parameter.dim() == 2 else parameter.shape[0]
            parameter.add_(noise * (fan_in**-0.5 if parameter.dim() == 2 else 0.2))
        model.head.weight.normal_(generator=generator).mul_(n_embd**-0.5)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def make_finch() -> Callable[..., Finch]:
    return random_finch


@pytest.fixture
def _as_users_run_it() -> Iterator[None]:
    """Without the shape checks that tests add: what is wrong reaches the function's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
