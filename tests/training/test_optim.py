"""Which parameter gets which learning rate and weight decay, and the course of the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from infctx.model.finch import Finch
from infctx.training.optim import LearningRate, parameter_groups


@pytest.mark.parametrize("version", ["6", "5.2"])
def test_grouping_of_every_key(make_finch: Callable[..., Finch], version: str) -> None:
    model = make_finch(version, n_layer=2, has_initial_state=True)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, decay_lr_multiplier=2.0)
    rule = {id(p): (g["lr_multiplier"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert len(rule) == len(names)
    for name, parameter in names.items():
        if name.endswith("decay_base"):
            expected = (2.0, 0.0)
        elif name.endswith("initial_state") or (parameter.dim() == 2 and name.endswith(".weight")):
            expected = (1.0, 0.1)
        else:
            expected = (1.0, 0.0)
        assert rule[id(parameter)] == expected, name
    decayed = {name.split(".")[-2] for name, p in names.items() if rule[id(p)][1] and name.endswith(".weight")}
    assert decayed == {"embedding", "head", "receptance", "key", "value", "gate", "output"}


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
