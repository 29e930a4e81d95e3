"""A side that is wrong is told so, and gets no ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infctx.bench.gates import Gate, GateKeeper, small_case
from infctx.bench.pairs import PairTimes
from infctx.bench.wkv6_sides import RESULT_NAMES, Case, Side, backend_side
from infctx.bench.wkv6_suite import Comparison, Row, open_gates, time_rows

CASE = Case(device=torch.device("cpu"), dtype="fp32", rows=1, tokens=40, heads=2, head_size=8)
Change = Callable[..., tuple[Tensor, Tensor]]
TORCH = backend_side("torch")


def side(run: Change, **changes: object) -> Side:
    return replace(TORCH, name="suspect", run=run, **changes)


def scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same values with another gradient."""
    return tensor + (factor - 1.0) * (tensor - tensor.detach())


def wrong_key_gradient(r, k, v, raw, u, s):
    return TORCH.run(r, scaled_gradient(k, 1.0001), v, raw, u, s)


def forgets_the_state_gradient(r, k, v, raw, u, s):
    return TORCH.run(r, k, v, raw, u, s.detach())


def hands_the_state_on_as_it_is(r, k, v, raw, u, s):
    # As an operator that writes its final state over the initial one: autograd takes it for the same.
    output, new_state = TORCH.run(r, k, v, raw, u, s)
    return output, s + (new_state - s).detach()


def wrong_without_autograd(r, k, v, raw, u, s):
    output, new_state = TORCH.run(r, k, v, raw, u, s)
    return output if torch.is_grad_enabled() else output * 1.01, new_state


def wrong_shape(r, k, v, raw, u, s):
    output, new_state = TORCH.run(r, k, v, raw, u, s)
    return output, new_state[:, :1]


def not_a_number(r, k, v, raw, u, s):
    output, new_state = TORCH.run(r, k, v, raw, u, s)
    return output, new_state * math.nan


def raises(r, k, v, raw, u, s):
    raise NotImplementedError("not for these sizes\nand more")


def clamped(r, k, v, raw, u, s):
    return TORCH.run(r, k, v, raw.clamp(max=1.67), u, s)


WRONG = {
    wrong_key_gradient: "d key is off by 1.0e-04 of its largest value, allowed 5.0e-06",
    forgets_the_state_gradient: "d state is off by 1.0e+00",
    hands_the_state_on_as_it_is: "d value is off by 3.7e-01",
    wrong_without_autograd: "output without autograd is off by 1.0e-02",
    wrong_shape: "",
    not_a_number: "nan of its largest value",
    raises: "NotImplementedError: not for these sizes",
}


def gate(suspect: Side, case: Case = CASE) -> Gate:
    return GateKeeper().gate(suspect, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_our_own_backend_passes(dtype: str, tokens: int) -> None:
    opened = gate(TORCH, CASE.replaced(dtype=dtype, tokens=tokens, rows=3))
    assert opened.is_passed, opened.reason
    assert opened.extreme_reason is None
    assert opened.errors.keys() > set(RESULT_NAMES)
    assert opened.errors.keys() == opened.bounds.keys() == opened.extreme_errors.keys()
    assert max(opened.errors[name] for name in ("new_state", "d raw_decay", "d state")) < 5e-6
    # What is returned in bf16 is rounded once.
    assert (opened.errors["output"] > 1e-4) == (dtype == "bf16")


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_sides_get_no_ratio(wrong: Change) -> None:
    opened = gate(side(wrong))
    assert not opened.is_passed
    assert WRONG[wrong] in str(opened.reason)

    def never(call: object, num_calls: int) -> float:
        raise AssertionError("nothing is to be timed")

    for ours, other in ((TORCH, side(wrong)), (side(wrong), TORCH), (side(wrong), None)):
        (row,) = rows_of(ours, other, timer=never)
        assert row.times is None
        assert WRONG[wrong] in str(row.reason)
        assert "suspect" in str(row.reason)


@pytest.mark.parametrize("wrong", [wrong_without_autograd, forgets_the_state_gradient, hands_the_state_on_as_it_is])
def test_bf16_hides_no_mistake_however_much_is_rounded(wrong: Change) -> None:
    tiny = {"case": CASE.replaced(dtype="bf16")}
    assert not gate(side(wrong), **tiny).is_passed
    if wrong is not wrong_without_autograd:
        assert not gate(side(wrong, rounds_inside=True), **tiny).is_passed


def test_a_clamped_decay_passes_and_is_told_of() -> None:
    opened = gate(side(clamped))
    assert opened.is_passed
    assert max(opened.extreme_errors.values()) > 1e-3
    assert opened.extreme_reason is not None


def test_a_side_that_refuses_is_not_tried() -> None:
    opened = gate(side(raises, refusal=lambda case: f"not {case.tokens} tokens"))
    assert opened.reason == "not 40 tokens"
    assert opened.errors == {}


def test_each_side_is_tried_once() -> None:
    tries = []

    def counted(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        tries.append(tensors[0].shape)
        return TORCH.run(*tensors)

    keeper = GateKeeper()
    for tokens in (1024, 4096, 512):
        keeper.gate(side(counted), CASE.replaced(tokens=tokens))
    # With and without autograd, usual and extreme decays.
    assert tries == [(1, 256, 2, 8)] * 4
    assert len(keeper.gates) == 1


@pytest.mark.parametrize(
    ("timed", "tried"), [(1, 1), (130, 130), (256, 256), (257, 129), (1000, 232), (1024, 256), (4096, 256)]
)
def test_the_small_case_has_the_remainder_of_the_timed_one(timed: int, tried: int) -> None:
    case = small_case(CASE.replaced(tokens=timed, heads=12, rows=8))
    assert (case.tokens, case.heads, case.rows) == (tried, 2, 2)
    assert (timed - tried) % 128 == 0


def rows_of(ours: Side, other: Side | None, *, timer: Callable[..., float], case: Case = CASE) -> list[Row]:
    comparison = Comparison(case=case, which="forward+backward", ours=ours, other=other)
    keeper = GateKeeper()
    open_gates([comparison], keeper)
    return list(time_rows([comparison], keeper, timer, pairs=2, seconds_per_case=None))


def timed_once(call: Callable[[], object], num_calls: int) -> float:
    call()
    return 0.25


def test_right_sides_get_one() -> None:
    (row,) = rows_of(TORCH, side(clamped), timer=timed_once)
    assert row.reason is None
    assert row.times == PairTimes(ours=(0.25,) * 3, other=(0.25,) * 2)
    assert not row.is_noisy


def test_a_side_that_is_wrong_at_the_timed_size_only() -> None:
    def wrong_when_long(r, k, v, raw, u, s):
        output, new_state = TORCH.run(r, k, v, raw, u, s)
        return (output if r.shape[1] <= 256 else output + 0.01), new_state

    long = CASE.replaced(tokens=300)
    assert gate(side(wrong_when_long), long).is_passed
    (row,) = rows_of(TORCH, side(wrong_when_long), timer=timed_once, case=long)
    assert row.times is None
    assert "torch and suspect differ at 300 tokens: output is off by " in str(row.reason)


def test_a_side_that_raises_at_the_timed_size_is_a_row_and_the_rest_goes_on() -> None:
    def raises_when_long(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if tensors[0].shape[1] > 256:
            raise MemoryError("too long")
        return TORCH.run(*tensors)

    comparisons = [
        Comparison(case=CASE.replaced(tokens=300), which="forward", ours=TORCH, other=other)
        for other in (side(raises_when_long), None)
    ]
    first, second = time_rows(comparisons, GateKeeper(), timed_once, pairs=1, seconds_per_case=None)
    assert first.reason == "MemoryError: too long"
    assert second.times is not None


def test_noise() -> None:
    comparison = Comparison(case=CASE, which="forward", ours=TORCH, other=None)
    quiet, loud = (Row(comparison=comparison, times=PairTimes(ours=(1.0, second))) for second in (1.02, 1.04))
    assert not quiet.is_noisy
    assert loud.is_noisy
