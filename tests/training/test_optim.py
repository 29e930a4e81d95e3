"""Which parameter gets which learning rate and weight decay, and the course of the learning rate."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from infctx.adapters.catalog import ATTACH
from infctx.errors import RecipeError
from infctx.model.finch import Finch
from infctx.training.optim import LearningRate, parameter_groups

# Every kind of parameter, the number of the layer aside, that is not among the others.
MATRICES = {
    "embedding.weight",
    "head.weight",
    *(f"blocks.*.time_mix.{name}.weight" for name in ("receptance", "key", "value", "gate", "output")),
    *(f"blocks.*.channel_mix.{name}.weight" for name in ("receptance", "key", "value")),
    "blocks.*.time_mix.initial_state",
}
NORMS = {
    f"{norm}.{part}"
    for norm in ("input_norm", "output_norm", "blocks.*.time_mix_norm", "blocks.*.channel_mix_norm")
    for part in ("weight", "bias")
} | {"blocks.*.time_mix.group_norm.weight", "blocks.*.time_mix.group_norm.bias"}
OTHERS = {
    "6": {
        *(f"blocks.*.time_mix.lerp_{name}" for name in ("input", "receptance", "key", "value", "gate", "decay")),
        *(f"blocks.*.channel_mix.lerp_{name}" for name in ("receptance", "key")),
        *(f"blocks.*.time_mix.{name}" for name in ("lerp_down", "lerp_up", "decay_down", "decay_up", "bonus")),
    },
    "5.2": {
        *(f"blocks.*.time_mix.mix_{name}" for name in ("receptance", "key", "value", "gate")),
        *(f"blocks.*.channel_mix.mix_{name}" for name in ("receptance", "key")),
        "blocks.*.time_mix.bonus",
    },
}


def rules_of(model: Finch, **settings: Any) -> dict[str, tuple[float, float]]:
    """Multiplier and weight decay of every kind of trained parameter, which has to be the same in every layer."""
    defaults = {"weight_decay": 0.1, "decay_lr_multiplier": 2.0}
    groups = parameter_groups(model.named_parameters(), **(defaults | settings))
    rule = {id(p): (g["lr_multiplier"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rule), "a parameter in two groups"
    found: dict[str, tuple[float, float]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            assert found.setdefault(kind, rule[id(parameter)]) == rule[id(parameter)], name
    return found


@pytest.mark.parametrize("version", ["6", "5.2"])
def test_grouping_of_every_key(make_finch: Callable[..., Finch], version: str) -> None:
    expected = dict.fromkeys(MATRICES, (1.0, 0.1)) | dict.fromkeys(NORMS | OTHERS[version], (1.0, 0.0))
    expected["blocks.*.time_mix.decay_base"] = (2.0, 0.0)
    assert rules_of(make_finch(version, n_layer=2, has_initial_state=True)) == expected


@pytest.mark.parametrize("version", ["6", "5.2"])
def test_matrices_of_a_lora_are_decayed(make_finch: Callable[..., Finch], version: str) -> None:
    model, mix = make_finch(version, n_layer=2), "lerp" if version == "6" else "mix"
    ATTACH["lora"](model, rank=3, alpha=6.0, targets=["key", "gate"], train_also=[f"*.{mix}_key", "*.decay_base"])
    decayed = {
        f"blocks.*.{part}.lora_{side}.default.weight"
        for part in ("time_mix.key", "time_mix.gate", "channel_mix.key")
        for side in "AB"
    }
    assert rules_of(model) == dict.fromkeys(decayed, (1.0, 0.1)) | {
        f"blocks.*.time_mix.{mix}_key": (1.0, 0.0),
        f"blocks.*.channel_mix.{mix}_key": (1.0, 0.0),
        "blocks.*.time_mix.decay_base": (2.0, 0.0),
    }


def test_factors_by_name(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", n_layer=2, has_initial_state=True)
    plain = rules_of(model)
    factors = {"*.time_mix.*": 3.0, "*.decay_base": 0.5, "head*": 0.25}
    found = rules_of(model, lr_multipliers=factors, state_lr_multiplier=10.0)
    for kind, (multiplier, decay) in plain.items():
        factor = 3.0 if ".time_mix." in kind else 0.25 if kind == "head.weight" else 1.0
        factor *= {"decay_base": 0.5, "initial_state": 10.0}.get(kind.rsplit(".", 1)[-1], 1.0)
        assert found[kind] == (multiplier * factor, decay), kind
    # The shifts of a tuned initial state, as adapters call them, are vectors.
    shift = torch.nn.Parameter(torch.zeros(8))
    groups = parameter_groups(
        [("blocks.0.time_mix.att_initial_shift", shift)],
        weight_decay=0.1,
        decay_lr_multiplier=2.0,
        state_lr_multiplier=7.0,
    )
    assert [(group["lr_multiplier"], group["weight_decay"]) for group in groups] == [(7.0, 0.0)]


def test_factors_that_mean_nothing_are_refused(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", n_layer=2)
    with pytest.raises(RecipeError, match=r"lr_multipliers: '\*\.decay_bas' matches no trained parameter.*decay_base"):
        rules_of(model, lr_multipliers={"*.lerp_*": 2.0, "*.decay_bas": 2.0})
    with pytest.raises(RecipeError, match=r"optimizer\.state_lr: no initial state is trained"):
        rules_of(model, state_lr_multiplier=2.0)
    model.head.weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"'head\.weight' matches no trained parameter"):
        rules_of(model, lr_multipliers={"head.weight": 2.0})


def test_frozen_parameters_are_in_no_group(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0, decay_lr_multiplier=2.0)
    assert [list(map(id, group["params"])) for group in groups] == [[id(model.head.weight)]]


def rates(schedule: str, *, warmup: int, total: int) -> list[float]:
    rate = LearningRate(lr=1.0, lr_final=0.1, schedule=schedule, warmup_steps=warmup, total_steps=total)
    return [rate.at(step) for step in range(total)]


def test_warmup_rises_from_one_percent_and_then_stays() -> None:
    found = rates("constant", warmup=10, total=15)
    assert found[0] == pytest.approx(0.01)
    assert found[5] == pytest.approx(0.01 + 0.99 * 0.5)
    assert found[10:] == [1.0] * 5


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("exponential", 0.1**0.5)])
def test_decaying_schedules_end_at_the_final_rate(schedule: str, middle: float) -> None:
    found = rates(schedule, warmup=0, total=101)
    assert found[0] == pytest.approx(1.0)
    assert found[50] == pytest.approx(middle)
    assert found[-1] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)
    after_warmup = rates(schedule, warmup=20, total=101)
    assert after_warmup[20] == pytest.approx(1.0)
    assert after_warmup[-1] == pytest.approx(0.1)


WSD_TABLES = {
    # 4 steps of warm-up, then lr, then a fifth of 20 steps straight down to lr_final in the last.
    (4, 20, 0.2): [0.01, 0.2575, 0.505, 0.7525, *[1.0] * 12, 0.775, 0.55, 0.325, 0.1],
    (0, 10, 0.3): [*[1.0] * 7, 0.7, 0.4, 0.1],
    (0, 4, 0.99): [0.775, 0.55, 0.325, 0.1],
    # At least one step descends.
    (0, 5, 0.01): [1.0, 1.0, 1.0, 1.0, 0.1],
    # Where the warm-up reaches into the descent, both count.
    (3, 4, 0.5): [0.01, 0.34, 0.67 * 0.55, 0.1],
}


@pytest.mark.parametrize("case", list(WSD_TABLES))
def test_warmup_stable_decay(case: tuple[int, int, float]) -> None:
    warmup, total, fraction = case
    rate = LearningRate(
        lr=1.0, lr_final=0.1, schedule="wsd", warmup_steps=warmup, total_steps=total, decay_fraction=fraction
    )
    assert [rate.at(step) for step in range(total)] == pytest.approx(WSD_TABLES[case], rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 10])
def test_runs_shorter_than_their_warmup_have_a_rate(total: int) -> None:
    assert all(0 < rate <= 1 for rate in rates("cosine", warmup=10, total=total))


def test_multipliers_are_applied_to_the_groups() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [
        {"params": [p], "lr_multiplier": m, "weight_decay": 0.0} for p, m in zip(parameters, (1.0, 2.0), strict=False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    rate = LearningRate(lr=0.5, lr_final=0.5, schedule="constant", warmup_steps=0, total_steps=10)
    assert rate.apply_(optimizer, 3) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]
