"""Every kind: the identity at the start, merged equals attached, exact through chunks, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import infctx
from infctx.adapters.adapter import Adapter
from infctx.adapters.full import attach_full
from infctx.adapters.load import load_adapter
from infctx.adapters.peft_adapters import PeftAdapter, attach_peft
from infctx.adapters.peft_kinds import PeftSettings
from infctx.adapters.state_tuning import attach_state
from infctx.errors import CheckpointError, RecipeError
from infctx.model.finch import Finch
from infctx.recipe.adapter_section import AdapterSection
from infctx.run_adapter import attach_adapter
from infctx.training.precision import apply_precision_

MATRICES = ["receptance", "key", "value", "gate", "output"]
# Sizes of the test models are 32 and 101: these have divisors that are ranks.
SQUARE = ["time_mix.key", "time_mix.output", "channel_mix.receptance"]
EVERYWHERE = [*MATRICES, "head"]
PEFT_CASES: dict[str, dict[str, Any]] = {
    "lora": {"targets": EVERYWHERE, "ranks": {"blocks.0.*": 3, "*.channel_mix.*": 5}, "alphas": {"head": 2.0}},
    "lora on the embedding, with states": {
        "kind": "lora",
        "targets": ["embedding", "key"],
        "initial_state": True,
        "initial_shifts": True,
        "train_also": ["*.bonus", "*.decay_base"],
    },
    "rslora": {"targets": ["embedding", "channel_mix.*", "head"], "ranks": {"head": 2}},
    "dora": {"targets": EVERYWHERE, "ranks": {"blocks.1.*": 2}},
    "dora on the embedding": {"kind": "dora", "targets": ["embedding", "output"]},
    "pissa": {"targets": EVERYWHERE, "ranks": {"*.gate": 2}, "alphas": {"head": 2.0}, "initial_state": True},
    "pissa, exact": {"kind": "pissa", "targets": ["key"], "svd_iterations": None, "alpha": 7.0},
    "olora": {"targets": EVERYWHERE, "ranks": {"*.gate": 2}, "train_also": ["*.decay_base"]},
    "miss": {"targets": EVERYWHERE, "rank": 6},
    "miss, bat": {"kind": "miss", "targets": SQUARE, "miss_init": "bat", "rank": 8},
    "miss, mini": {"kind": "miss", "targets": SQUARE, "miss_init": "mini", "miss_mini_rank": 4, "initial_state": True},
}
CASES = ["full", "state", "state and shifts", *PEFT_CASES]


def attach(model: Finch, case: str, *, seed: int = 0) -> Adapter:
    """Put the adapter of a case on a model."""
    torch.manual_seed(seed)
    if case == "full":
        return attach_full(model, freeze=["*norm*"], initial_state=True)
    if case.startswith("state"):
        return attach_state(model, initial_shifts="shifts" in case)
    return attach_peft(model, settings_of(case))


def settings_of(case: str) -> PeftSettings:
    return PeftSettings(**{"kind": case, "rank": 4, "alpha": None if "miss" in case else 8.0, **PEFT_CASES[case]})


def disturb_(model: Finch) -> None:
    """Give every trainable parameter values that matter, as training would."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * (0.5 if parameter.dim() == 3 else 0.1))


TOKENS = torch.arange(40)[None] % 50
STARTS = torch.zeros(1, 40, dtype=torch.bool)
STARTS[0, [0, 11, 12]] = True


@pytest.fixture
def finch(make_finch: Callable[..., Finch]) -> Callable[..., Finch]:
    def make(version: str = "6", **sizes: object) -> Finch:
        if version == "goldfinch":
            sizes |= {"front": "6", "uses_rope": True}
        return make_finch(version, n_layer=2, **sizes)

    return make


def version_of(case: str) -> str:
    """Eagle now and then."""
    return "5.2" if CASES.index(case) % 3 == 1 else "6"


# A GoldFinch's keys are made of the embedding's rows themselves.
CASES_OF_VERSIONS = [
    *((case, version_of(case)) for case in CASES),
    *((case, "goldfinch") for case in CASES if "embedding" not in case and case != "rslora"),
]


@pytest.mark.parametrize("version", ["6c2", "goldfinch"])
def test_the_default_targets_are_those_that_there_are(finch: Callable[..., Finch], version: str) -> None:
    section = AdapterSection(kind="lora", rank=2, alpha=4)
    model = finch(version)
    attach_adapter(section, model)
    matrices = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_" in name}
    assert matrices == {"receptance", "key", "value", "output"} | (
        {"query", "gate"} if version == "goldfinch" else set()
    )
    with pytest.raises(RecipeError, match="'gate' matches no matrix"):
        attach_adapter(AdapterSection(kind="lora", rank=2, alpha=4, targets=["gate"]), finch("6c2"))


def test_an_adapter_on_the_embedding_of_a_goldfinch_is_refused(finch: Callable[..., Finch]) -> None:
    for targets in (["embedding"], ["*"]):
        with pytest.raises(RecipeError, match="'embedding' cannot be a target in a GoldFinch"):
            attach_peft(finch("goldfinch"), PeftSettings(kind="lora", rank=2, alpha=4.0, targets=targets))
    with pytest.raises(RecipeError, match=r"'token_cat.decompress' cannot be a target"):
        attach_peft(finch("goldfinch"), PeftSettings(kind="lora", rank=2, alpha=4.0, targets=["token_cat.*"]))


def values(model: Finch) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("case", "version"), CASES_OF_VERSIONS)
def test_attached_is_the_identity_and_merged_equals_attached(
    finch: Callable[..., Finch], case: str, version: str
) -> None:
    model = finch(version)
    before, _ = model(TOKENS)
    base = values(model)
    adapter = attach(model, case)
    torch.testing.assert_close(model(TOKENS)[0], before, rtol=0, atol=1e-5)
    disturb_(model)
    attached, _ = model(TOKENS)
    assert bool(((attached - before).abs() > 0.05).any())
    changed = adapter.names()
    streamed = {name: adapter.merged_parameter(name) for name in [*base, *changed]}
    # Looking at merged values changes nothing.
    assert torch.equal(model(TOKENS)[0], attached)
    adapter.merge_()
    torch.testing.assert_close(model(TOKENS)[0], attached, rtol=0, atol=1e-5)
    merged = values(model)
    assert merged.keys() == streamed.keys() == base.keys() | set(changed)
    assert all(torch.equal(merged[name], streamed[name]) for name in merged)
    assert {name for name in merged if name not in base or not torch.equal(merged[name], base[name])} == set(changed)
    assert all(tensor.dtype == torch.float32 for tensor in streamed.values())


@pytest.mark.parametrize("case", PEFT_CASES)
def test_merged_values_are_those_of_peft_s_own_merge(finch: Callable[..., Finch], case: str) -> None:
    model = finch()
    adapter = attach(model, case)
    disturb_(model)
    found = {name: adapter.merged_parameter(name) for name in adapter.names()}
    adapter.peft_model.merge_and_unload(safe_merge=True)
    expected = values(model)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", ["lora", "dora", "dora on the embedding", "pissa", "olora", "miss", "miss, bat"])
def test_a_base_stored_in_bf16_is_the_only_thing_that_is_rounded(finch: Callable[..., Finch], case: str) -> None:
    stored = finch().to(torch.bfloat16)
    expected, _ = finch().to(torch.bfloat16).float()(TOKENS)
    attach(stored, case)
    apply_precision_(stored, "fp32")
    torch.testing.assert_close(stored(TOKENS)[0], expected, rtol=0, atol=1e-5)

    model = finch().to(torch.bfloat16)
    adapter = attach(model, case)
    apply_precision_(model, "bf16")
    disturb_(model)
    merged = {name: adapter.merged_parameter(name) for name in adapter.names()}
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    # The rounded base, with everything computed in float32.
    apply_precision_(model, "fp32")
    attached, _ = model(TOKENS)
    adapter.merge_()
    for name, tensor in merged.items():
        model.get_parameter(name).data = tensor
    torch.testing.assert_close(model(TOKENS)[0], attached, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("case", "version"), CASES_OF_VERSIONS)
def test_the_gradient_through_chunks_is_exact(finch: Callable[..., Finch], case: str, version: str) -> None:
    model = finch(version)
    attach(model, case)
    disturb_(model)
    model.double()
    logits, _ = model(TOKENS, starts=STARTS)
    is_target = ~STARTS[0, 1:]
    loss = F.cross_entropy(logits[0, :-1][is_target], TOKENS[0, 1:][is_target])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    infctx.backward_through_chunks(model, TOKENS, starts=STARTS, chunk_tokens=7)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert float(expected[name].norm()) > 0, name
            assert float((parameter.grad - expected[name]).norm() / expected[name].norm()) < 1e-10, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("case", [case for case in CASES if case != "full"])
def test_saved_and_loaded_gives_the_same_logits(finch: Callable[..., Finch], case: str, tmp_path: Path) -> None:
    model = finch()
    adapter = attach(model, case)
    disturb_(model)
    expected, _ = model(TOKENS, starts=STARTS)
    adapter.save(tmp_path, base_fingerprint="0123")
    again = finch()
    loaded = load_adapter(again, tmp_path, base_fingerprint="0123")
    torch.testing.assert_close(again(TOKENS, starts=STARTS)[0], expected, rtol=0, atol=1e-5)
    assert loaded.names() == adapter.names()
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(adapter, PeftAdapter) and not (tmp_path / "trained_parameters.safetensors").exists():
        through_peft = peft.PeftModel.from_pretrained(finch(), str(tmp_path))
        torch.testing.assert_close(through_peft(TOKENS, starts=STARTS)[0], expected, rtol=0, atol=1e-5)
    loaded.merge_()
    torch.testing.assert_close(again(TOKENS, starts=STARTS)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "pissa", "olora"])
def test_ranks_and_alphas_land_where_they_should(finch: Callable[..., Finch], case: str, tmp_path: Path) -> None:
    model = finch()
    ranks = {"blocks.0.*": 2, "*.channel_mix.*": 6, "blocks.1.time_mix.key": 3, "head": 5}
    settings = PeftSettings(
        kind=case, rank=4, alpha=8.0, targets=EVERYWHERE, ranks=ranks, alphas={"*.channel_mix.*": 30.0, "gate": 3.0}
    )
    adapter = attach_peft(model, settings)

    def expected(name: str) -> int:
        if name in ("head", "blocks.1.time_mix.key"):
            return {"head": 5}.get(name, 3)
        if "channel_mix" in name:
            return 6
        return 2 if name.startswith("blocks.0.") else 4

    found = {name: layer.lora_A["default"].weight.shape[0] for name, layer in adapter.layers.items()}
    assert len(found) == 2 * 8 + 1
    assert found == {name: expected(name) for name in found}
    for name, layer in adapter.layers.items():
        alpha = 30.0 if "channel_mix" in name else 3.0 if name.endswith("gate") else 8.0
        rank = found[name]
        assert layer.scaling["default"] == pytest.approx(alpha / (rank**0.5 if case == "rslora" else rank)), name
    adapter.save(tmp_path)
    facts = json.loads((tmp_path / "infctx.json").read_text())
    assert (facts["kind"], facts["rank"], facts["alpha"]) == (case, 4, 8.0)
    assert facts["ranks"] == {name: rank for name, rank in found.items() if rank != 4}


@pytest.mark.parametrize("case", ["pissa", "pissa, exact", "olora"])
def test_what_begins_from_the_matrix_can_be_attached_again_to_the_bit(finch: Callable[..., Finch], case: str) -> None:
    model = finch().to(torch.bfloat16)
    settings = settings_of(case)
    torch.manual_seed(1)
    first = attach_peft(model, settings, frozen_dtype=torch.bfloat16)
    assert first.start is not None
    again = finch().to(torch.bfloat16)
    torch.manual_seed(2)
    drawn = torch.get_rng_state()
    second = attach_peft(again, settings, start=first.start, frozen_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "base_layer" in name:
            assert torch.equal(again.get_parameter(name), parameter), name
    assert {p.dtype for name, p in again.named_parameters() if "base_layer" in name} == {torch.bfloat16}
    assert {p.dtype for name, p in again.named_parameters() if "lora_" in name} == {torch.float32}
    assert not torch.equal(torch.get_rng_state(), drawn), "peft draws its first values all the same"
    assert all(torch.equal(first.start[name], second.start[name]) for name in first.start)
    wrong = dict(first.start)
    name, tensor = wrong.popitem()
    with pytest.raises(CheckpointError, match=r"adapter start: tensor .* is missing"):
        attach_peft(finch(), settings, start=wrong)
    with pytest.raises(CheckpointError, match=r"adapter start: tensor .*: expected .*, found"):
        attach_peft(finch(), settings, start={**wrong, name: tensor[:1]})


def test_a_new_run_draws_the_same_numbers_whether_it_decomposes_or_not(finch: Callable[..., Finch]) -> None:
    """A run that is killed before its first checkpoint begins again with the factors on the disk."""
    torch.manual_seed(1)
    first = attach_peft(finch(), settings_of("pissa"))
    after = torch.rand(3)
    torch.manual_seed(1)
    attach_peft(finch(), settings_of("pissa"), start=first.start)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pissa", "targets": ["embedding"]}, r"adapter\.targets: 'embedding' cannot .*pissa.*rslora or dora"),
        ({"kind": "olora", "targets": ["embedding", "key"]}, r"adapter\.targets: 'embedding' cannot"),
        ({"kind": "miss", "targets": ["emb*"], "alpha": None}, r"adapter\.targets: 'embedding' cannot .* miss"),
        ({"targets": ["*.keyy"]}, r"adapter\.targets: '\*\.keyy' matches no matrix\. Nearest: .*key"),
        ({"ranks": {"*.gate": 3}}, r"adapter\.ranks: '\*\.gate' matches none of the targets\. There are: .*key"),
        ({"alphas": {"kee": 3.0}}, r"adapter\.alphas: 'kee' matches none of the targets"),
        ({"kind": "pissa", "rank": 33}, r"adapter\.rank: 33 for .*time_mix\.key \[32, 32\]: expected at most 32"),
        ({"kind": "miss", "rank": 33, "alpha": None}, r"adapter\.rank: 33 for .*: expected at most its 32 inputs"),
        ({"kind": "miss", "rank": 5, "miss_init": "bat"}, r"adapter\.rank: 5 for .*: expected a divisor of both sizes"),
        ({"kind": "miss", "miss_init": "mini", "miss_mini_rank": 5}, r"adapter\.miss_mini_rank: 5 for .*a divisor"),
        ({"kind": "pissa", "train_also": ["*.key.weight"]}, r"adapter\.train_also: .*channel_mix\.key\.weight is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(finch: Callable[..., Finch], changes: dict[str, object], message: str) -> None:
    settings = PeftSettings(**{"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ["key"], **changes})
    with pytest.raises(RecipeError, match=message):
        attach_peft(finch(), settings)
