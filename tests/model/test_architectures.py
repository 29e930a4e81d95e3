"""Finch-C2, GPTAlpha and GoldFinch against the paper's formulas: logits, what is carried, and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import infctx
from infctx.checkpoint.model_file import official_tensors
from infctx.model import cached_attention
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from tests.conftest import random_finch
from tests.model.architecture_formulas import Reading, Tensors, Untold, read_document

ROWS, TOKENS, IDS = 2, 20, 7
# A document of one token, two that begin inside every cut below, and one that begins with a chunk.
STARTS = ((0, 9, 10, 15), (0, 5, 18))
SPLITS = {"whole": [20], "single tokens": [1] * 20, "ragged": [1, 4, 7, 1, 7]}
# Largest difference over the deviation of the logits, or the largest value of a state.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
# Finch's norm of each head makes much of rounding where a head is almost silent: the formulas themselves, in float32,
# are 1e-4 from float64 there. Two ways to compute them are at most this many times as far from it.
NOISE = 4.0
VARIANTS = {
    "Finch-C2": {"version": "6c2"},
    "Finch-C2 with a bonus": {"version": "6c2", "uses_value2": False},
    "Finch-C2 with keys as they are": {"version": "6c2", "weakens_keys": False},
    "Finch-C2 with both": {"version": "6c2", "uses_value2": False, "weakens_keys": False, "has_initial_state": True},
    "GPTAlpha": {"version": "gptalpha", "n_layer": 2},
    "GPTAlpha without positions": {"version": "gptalpha", "n_layer": 2, "uses_rope": False},
    "GoldFinch": {"version": "goldfinch", "n_layer": 5},
    "GoldFinch with positions": {"version": "goldfinch", "uses_rope": True, "has_initial_state": True},
    "GoldFinch in halves": {"version": "goldfinch", "n_layer": 4, "ratio": 2, "weakens_keys": False},
    "GoldFinch behind Finch": {"version": "goldfinch", "front": "6", "n_layer": 4, "ratio": 4},
    "GoldFinch behind Finch with positions": {"version": "goldfinch", "front": "6", "uses_rope": True},
    "GPTAlpha behind Finch-C2": {"version": "gptalpha"},
}
SWITCHES = ("uses_value2", "weakens_keys")


class Case(NamedTuple):
    """A float64 model and two rows of documents."""

    model: Finch
    untold: Untold
    tokens: Tensor
    starts: Tensor


def make_model(variant: str) -> Finch:
    sizes = {name: value for name, value in VARIANTS[variant].items() if name not in SWITCHES}
    model = random_finch(dtype=torch.float64, **sizes)
    if variant == "GPTAlpha behind Finch-C2":
        return in_front_of(random_finch("6c2", dtype=torch.float64), model, uses_rope=True)
    told = {name: value for name, value in VARIANTS[variant].items() if name in SWITCHES}
    return with_parameters(replace(model.config, **told), model.state_dict())


def in_front_of(front: Finch, back: Finch, *, uses_rope: bool) -> Finch:
    """The blocks of one model and the last block of another."""
    last = f"blocks.{front.config.n_layer - 1}."
    parameters = {name: value for name, value in front.state_dict().items() if not name.startswith(last)}
    parameters |= {name: value for name, value in back.state_dict().items() if name.startswith(last)}
    return with_parameters(replace(front.config, version="gptalpha", n_attention=1, uses_rope=uses_rope), parameters)


def with_parameters(config: FinchConfig, parameters: dict[str, Tensor]) -> Finch:
    """A float64 model."""
    model = Finch(config, has_initial_state=any(name.endswith("initial_state") for name in parameters)).double().eval()
    model.load_state_dict(parameters)
    return model


def untold_of(config: FinchConfig) -> Untold:
    return Untold(
        head_size=config.head_size,
        use_v2=config.uses_value2,
        use_one_minus_w=config.weakens_keys,
        rope=config.uses_rope,
    )


def case_of(model: Finch) -> Case:
    # Few ids: the gradient of an embedding comes from many tokens.
    tokens = torch.randint(IDS, (ROWS, TOKENS), generator=torch.Generator().manual_seed(4))
    starts = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    for row, places in enumerate(STARTS):
        starts[row, list(places)] = True
    return Case(model, untold_of(model.config), tokens, starts)


@pytest.fixture(autouse=True)
def _keys_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a few tokens, and yet several blocks of keys."""
    monkeypatch.setattr(cached_attention, "KEYS_AT_ONCE", 6)
    monkeypatch.setattr(cached_attention, "SCORES_AT_ONCE", 200)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(make_model(request.param))


def documents(tensors: Tensors, case: Case) -> list[list[Reading]]:
    """Each document of each row, alone."""
    rows: list[list[Reading]] = []
    for row, places in enumerate(STARTS):
        ends = [*places[1:], TOKENS]
        parts = [case.tokens[row, begin:end] for begin, end in zip(places, ends, strict=True)]
        rows.append([read_document(tensors, part, case.untold) for part in parts])
    return rows


class Expected(NamedTuple):
    """What the formulas give in float64, and how far from it a float type may be."""

    rows: list[list[Reading]]
    bounds: dict[torch.dtype, float]


def what_to_expect(case: Case) -> Expected:
    tensors = official_tensors(case.model)
    with torch.no_grad():
        rows = documents(tensors, case)
        rounded = logits_of(documents({name: tensor.float() for name, tensor in tensors.items()}, case))
    noise = float((rounded - logits_of(rows)).abs().max() / logits_of(rows).std())
    return Expected(rows, {**BOUNDS, torch.float32: max(BOUNDS[torch.float32], NOISE * noise)})


@pytest.fixture(scope="module")
def expected(case: Case) -> Expected:
    return what_to_expect(case)


def logits_of(rows: list[list[Reading]]) -> Tensor:
    return torch.stack([torch.cat([document.logits for document in row]) for row in rows])


def pieces(case: Case, split: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(case.tokens.split(split, 1), case.starts.split(split, 1), strict=True)


def assert_close(found: Tensor, expected: Tensor, *, bound: float, scale: Tensor | None = None) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        scale = expected.abs().max() if scale is None else scale
        difference = float((found.double() - expected).abs().max() / scale)
        assert difference <= bound, difference


def assert_state(found: ModelState, rows: list[list[Reading]], case: Case, *, bound: float) -> None:
    """What is carried is the last document's; what is cached is of all of them, with their first tokens marked."""
    for name in ("wkv", "att_shift", "ffn_shift"):
        assert_close(getattr(found, name), torch.stack([getattr(row[-1], name) for row in rows], 1), bound=bound)
    assert found.has_cache == bool(rows[0][0].cached.shape[1])
    if found.has_cache:
        cached = torch.stack([torch.cat([document.cached for document in row]) for row in rows])
        assert_close(found.cached, cached[None], bound=bound)
        marked = torch.where(case.starts, ~case.tokens, case.tokens).int()
        assert torch.equal(found.cached_tokens, marked[None])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_each_document_is_what_the_formulas_say(case: Case, expected: Expected, split: str, dtype: torch.dtype) -> None:
    """At once, token by token and in ragged chunks: logits, and all that is carried on."""
    model = copy.deepcopy(case.model).to(dtype)
    state, found = None, []
    with torch.no_grad():
        for tokens, starts in pieces(case, SPLITS[split]):
            logits, state = model(tokens, state, starts=starts)
            found.append(logits)
    logits, bound = logits_of(expected.rows), expected.bounds[dtype]
    assert 0.5 < float(logits.std()) < 2
    assert_close(torch.cat(found, 1), logits, bound=bound, scale=logits.std())
    assert_state(state, expected.rows, case, bound=bound)


def test_without_starts_a_row_is_one_document(case: Case) -> None:
    with torch.no_grad():
        logits, state = case.model(case.tokens[:, :8])
        row = read_document(official_tensors(case.model), case.tokens[1, :8], case.untold)
    assert_close(logits[1], row.logits, bound=1e-10)
    assert_close(state.wkv[:, 1], row.wkv, bound=1e-10)
    if state.has_cache:
        assert torch.equal(state.cached_tokens[0] < 0, torch.arange(8).expand(ROWS, 8) == 0)


def gradients_by_formulas(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of autograd through whole documents; zeros where a tensor is not used."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in official_tensors(case.model).items()}
    rows, losses = documents(leaves, case), []
    for row, readings in enumerate(rows):
        for begin, reading in zip(STARTS[row], readings, strict=True):
            targets = case.tokens[row, begin + 1 : begin + len(reading.logits)]
            losses.append(F.cross_entropy(reading.logits[:-1], targets, reduction="sum"))
    loss = torch.stack(losses).sum() / (ROWS * TOKENS - sum(map(len, STARTS)))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, found, strict=True))


def gradients_in_chunks(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by the two sweeps, under official names."""
    model = case.model
    model.zero_grad(set_to_none=True)
    loss = infctx.backward_through_chunks(model, case.tokens, starts=case.starts, chunk_tokens=5, window="document")
    # A model whose parameters are the gradients tells them by their official names.
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for place, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            place.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return loss, official_tensors(gradients)


def is_invisible(name: str, config: FinchConfig) -> bool:
    """A shift of all keys alike, which no softmax sees: the gradient is rounding. Positions turn each key otherwise."""
    return name.endswith("ln_k.bias") and not config.uses_rope


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], config: FinchConfig) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        is_relative = bool(gradient.any()) and not is_invisible(name, config)
        scale = gradient.norm() if is_relative else 1.0
        assert float((found[name] - gradient).norm() / scale) <= 1e-10, name


def test_every_gradient_through_chunks_is_autograd_through_the_formulas(case: Case) -> None:
    loss, expected = gradients_by_formulas(case)
    found_loss, found = gradients_in_chunks(case)
    assert_close(found_loss, loss, bound=1e-12)
    assert_gradients(found, expected, case.model.config)
    without = {name.split(".att.")[-1] for name, gradient in expected.items() if not gradient.any()}
    # Every other tensor has a gradient to be compared.
    unused = {"time_faaaa"} if case.untold.use_v2 else {"time_value2_w1", "time_value2_w2", "time_maa_v2"}
    assert without <= (unused if "6c2" in case.model.config.kinds else set()), without


@pytest.mark.parametrize("variant", ["Finch-C2", "Finch-C2 with both", "GoldFinch in halves", "GoldFinch behind Finch"])
def test_extreme_decays(variant: str) -> None:
    """From what forgets nothing in a document (1 - 2e-9 a token) to what forgets at once (0 in float32)."""
    model = make_model(variant)
    with torch.no_grad():
        for block in model.blocks[: model.config.n_recurrent]:
            block.time_mix.decay_base.copy_(torch.tensor([-20.0, -6.0, 0.0, 2.0, 5.0]).repeat(7)[:32])
    case = case_of(model)
    expected = what_to_expect(case)
    logits = logits_of(expected.rows)
    for dtype, bound in expected.bounds.items():
        with torch.no_grad():
            found, state = copy.deepcopy(model).to(dtype)(case.tokens, starts=case.starts)
        assert_close(found, logits, bound=bound, scale=logits.std())
        assert_state(state, expected.rows, case, bound=bound)
    assert_gradients(gradients_in_chunks(case)[1], gradients_by_formulas(case)[1], model.config)
