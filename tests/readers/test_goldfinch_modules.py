"""Finch-C2, GPTAlpha and GoldFinch against the published modules themselves, on weights written here.

    python -m pytest tests/readers/test_goldfinch_modules.py --goldfinch-code FOLDER

FOLDER is a checkout of the GoldFinch paper's code (recursal/GoldFinch-paper). Its CUDA recurrence is replaced by a
plain one, in a Python process of its own; everything else is run as it is. With -s it prints every difference.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import infctx
from infctx.checkpoint.model_file import official_tensors
from infctx.checkpoint.switches import SUFFIX
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from tests.conftest import random_finch
from tests.model.test_architectures import in_front_of, with_parameters

LAYERS, CHANNELS, HEAD_SIZE, HIDDEN, VOCABULARY, TOKENS = 6, 64, 16, 224, 50, 33
# The published code has these ranks at every width.
SIZES = {"n_layer": LAYERS, "n_embd": CHANNELS, "vocab_size": VOCABULARY, "head_size": HEAD_SIZE, "dim_ffn": HIDDEN}
RANKS = {"lerp_rank": 32, "decay_rank": 64}
# Their config -> what we call it. The names are those of their configs.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, bool]]] = {
    "finchc2": ({"tmix": "x060c2"}, {"version": "6c2"}, {}),
    "finchc2_no_v2": ({"tmix": "x060c2", "use_v2": 0}, {"version": "6c2"}, {"uses_value2": False}),
    "finchc2_no_one_minus_w": ({"tmix": "x060c2", "use_one_minus_w": 0}, {"version": "6c2"}, {"weakens_keys": False}),
    "gptalpha": ({"tmix": "gptalpha", "has_rope": True}, {"version": "gptalpha"}, {}),
    "gptalpha_no_rope": ({"tmix": "gptalpha"}, {"version": "gptalpha", "uses_rope": False}, {}),
    "goldfinch": ({"tmix": "x060c2", "tmix2": "gold"}, {"version": "goldfinch"}, {}),
    "goldfinch_rope10k": (
        {"tmix": "x060c2", "tmix2": "gold", "has_rope": True},
        {"version": "goldfinch", "uses_rope": True},
        {},
    ),
    "goldfinch_invratio_2": (
        {"tmix": "x060c2", "tmix2": "gold", "inv_other_layer_ratio": 2},
        {"version": "goldfinch", "ratio": 2},
        {},
    ),
    "goldfinch_upgrade": (
        {"tmix": "x060", "tmix2": "gold", "inv_other_layer_ratio": 6},
        {"version": "goldfinch", "front": "6", "ratio": 6},
        {},
    ),
    "goldfinch_gptalpha": ({"tmix": "x060c2", "tmix2": "gptalpha", "inv_other_layer_ratio": 6}, {}, {}),
}
# Largest difference over the deviation or the norm; the rotary positions there are of float32.
EXACT, WITH_ROPE = 1e-10, 1e-5
# In float32, and how many times as far apart both may be as ours is from float64: see tests/readers/conftest.py.
FLOAT32, NOISE = 2e-5, 4.0


class Published(NamedTuple):
    """A float64 model of ours, the tokens, and what the published code made of both; folder: see the program."""

    model: Finch
    tokens: Tensor
    found: dict[str, Tensor]
    folder: Path


@pytest.fixture(scope="module")
def code(pytestconfig: pytest.Config) -> Path:
    folder = pytestconfig.getoption("--goldfinch-code")
    if folder is None:
        pytest.skip("needs --goldfinch-code FOLDER, the published code; see the head of this file")
    return Path(folder).resolve(strict=True)


@pytest.fixture(scope="module", params=MODELS)
def published(
    request: pytest.FixtureRequest,
    code: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_program: Callable[..., str],
) -> Published:
    theirs, ours, switches = MODELS[request.param]
    if ours:
        model = with_switches(random_finch(**SIZES, **RANKS, **ours), switches)
    else:
        sides = [random_finch(version, **SIZES, **RANKS) for version in ("6c2", "gptalpha")]
        model = in_front_of(*sides, uses_rope=False)
    folder = tmp_path_factory.mktemp(request.param)
    # Whose parameters are float32 numbers.
    infctx.save_model(model, folder / "model.pth", dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    settings = {"has_rope": False, "ctx_len": 40, **SIZES, **theirs}
    run_program(sys.executable, "goldfinch_program.py", str(folder), str(code), json.dumps(settings))
    return Published(model.double(), tokens, load_file(folder / "answers.safetensors"), folder)


def with_switches(model: Finch, switches: dict[str, bool]) -> Finch:
    return with_parameters(replace(model.config, **switches), model.state_dict())


def bound_of(config: FinchConfig) -> float:
    return WITH_ROPE if config.uses_rope else EXACT


def test_every_layer_and_the_logits(published: Published) -> None:
    """In float64: the output of each time mix, the residual stream behind each block, the logits."""
    ours: dict[str, Tensor] = {}
    handles = []
    for i, block in enumerate(published.model.blocks):
        for name, module in ((f"time_mix.{i}", block.time_mix), (f"block.{i}", block)):
            handles.append(module.register_forward_hook(lambda _, __, out, name=name: ours.update({name: out[0]})))
    with torch.no_grad():
        ours["logits"] = published.model(published.tokens)[0]
    for handle in handles:
        handle.remove()
    assert len(ours) == 2 * LAYERS + 1
    for name, tensor in ours.items():
        expected = published.found[name]
        difference = float((tensor - expected).abs().max() / expected.std())
        print(f"{name}: {difference:.1e}")
        assert difference <= bound_of(published.model.config), name


def test_every_gradient_through_chunks(published: Published) -> None:
    model = copy.deepcopy(published.model)
    infctx.backward_through_chunks(model, published.tokens, chunk_tokens=7, window="document")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    for name, ours in official_tensors(model).items():
        expected = published.found[f"gradient.{name}"]
        # A shift of all keys alike changes no softmax: that gradient is rounding.
        is_relative = bool(expected.any()) and not name.endswith("ln_k.bias")
        error = float((ours - expected).norm() / (expected.norm() if is_relative else 1.0))
        print(f"{name}: {error:.1e}")
        assert error <= bound_of(model.config), name


def test_a_token_at_a_time(published: Published) -> None:
    """As both would generate, in float32: from its state or cache there, and from ours."""
    model, state, logits = copy.deepcopy(published.model).float(), None, []
    with torch.no_grad():
        for t in range(TOKENS):
            one, state = model(published.tokens[:, t : t + 1], state)
            logits.append(one)
        ours, exact, theirs = torch.cat(logits, 1), published.model(published.tokens)[0], published.found["steps"]
    difference, noise = (float((ours - other).abs().max() / exact.std()) for other in (theirs, exact))
    print(f"steps: {difference:.1e} noise {noise:.1e}")
    assert difference <= max(FLOAT32, NOISE * noise)


def test_what_it_wrote_is_read(published: Published) -> None:
    (published.folder / f"model.pth{SUFFIX}").replace(published.folder / f"returned.pth{SUFFIX}")
    returned = infctx.load_model(published.folder / "returned.pth", dtype=torch.float64)
    assert returned.config == published.model.config
    for name, tensor in official_tensors(returned).items():
        assert torch.equal(tensor, official_tensors(published.model)[name]), name


def test_fresh_values(published: Published, request: pytest.FixtureRequest) -> None:
    """Those that are no random numbers are the same; the others have the same spread."""
    if not (ours := MODELS[request.node.callspec.params["published"]][1]):
        pytest.skip("a model that this project reads, and does not make")
    fresh = Finch(new_config(**SIZES, **ours))
    initialise_(fresh, seed=0)
    theirs = torch.load(published.folder / "fresh.pth", weights_only=True)
    found = official_tensors(fresh)
    assert found.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert found[name].shape == expected.shape, name
        is_random = name.endswith("_w2") or (name.endswith(".weight") and ".ln" not in name and "ln_" not in name)
        if is_random:
            assert float(found[name].std()) == pytest.approx(float(expected.std()), rel=0.05, abs=1e-9), name
        else:
            torch.testing.assert_close(
                found[name], expected, rtol=0, atol=2e-6, msg=lambda text, name=name: name + text
            )
