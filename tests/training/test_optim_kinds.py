"""The kinds of AdamW: each against a formula, against another kind or against the library itself, and its state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.errors import RecipeError
from infctx.training.eight_bit_adamw import make_eight_bit_adamw
from infctx.training.offloaded_adamw import OffloadedAdamW
from infctx.training.optim import make_adamw, make_optimizer, moment_bytes
from infctx.training.optimizer_state import join_state_, split_state

CPU = torch.device("cpu")
NAMES = ["adamw", "adamw-8bit", "adamw-offloaded"]
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6}
# One that 8-bit moments are for, one that is too small for them, and one that is no multiple of any block or vector.
SHAPES = ((80, 60), (33,), (4099,))


def make_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def groups_of(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": weights[:1], "weight_decay": 0.1, "lr_multiplier": 1.0},
        {"params": weights[1:], "weight_decay": 0.0, "lr_multiplier": 3.0},
    ]


def make(name: str, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(groups_of(weights), name=name, **SETTINGS, device=CPU)


def gradient(step: int, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(SHAPES[index], generator=generator, dtype=dtype)


def take_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    """With a learning rate that changes, and a weight that has no gradient in every third step."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step) * group["lr_multiplier"]
        for index, weight in enumerate(weights):
            has_none = index == 1 and step % 3 == 2
            weight.grad = None if has_none else gradient(step, index, weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("kind", [make_adamw, OffloadedAdamW])
def test_adamw_is_the_formula(kind: Callable[..., torch.optim.Optimizer], is_fused: bool) -> None:
    """Of the paper's algorithm 2, in float64."""
    weights = make_weights(dtype=torch.float64)
    take_steps(kind(groups_of(weights), **SETTINGS, is_fused=is_fused), weights, range(7))
    for index, (weight, found) in enumerate(zip(make_weights(dtype=torch.float64), weights, strict=True)):
        expected, first, second, count = weight.detach(), 0.0, 0.0, 0
        for step in range(7):
            if index == 1 and step % 3 == 2:
                continue
            count += 1
            lr = 0.01 / (1 + step) * (1.0 if index == 0 else 3.0)
            g = gradient(step, index, torch.float64)
            first = 0.9 * first + 0.1 * g
            second = 0.95 * second + 0.05 * g * g
            update = (first / (1 - 0.9**count)) / ((second / (1 - 0.95**count)).sqrt() + 1e-6)
            expected = expected - lr * (0.1 if index == 0 else 0.0) * expected - lr * update
        torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("is_fused", [None, False, True])
def test_offloaded_is_adamw_bit_for_bit(is_fused: bool | None) -> None:
    """As a run on a CPU makes them, and as one on a GPU would."""
    straight, offloaded = make_weights(), make_weights()
    if is_fused is None:
        expected, optimizer = make("adamw", straight), make("adamw-offloaded", offloaded)
    else:
        expected = make_adamw(groups_of(straight), **SETTINGS, is_fused=is_fused)
        optimizer = OffloadedAdamW(groups_of(offloaded), **SETTINGS, is_fused=is_fused)
    take_steps(expected, straight, range(8))
    take_steps(optimizer, offloaded, range(8))
    assert all(torch.equal(*pair) for pair in zip(straight, offloaded, strict=True))
    assert isinstance(optimizer, OffloadedAdamW)
    assert not optimizer.state, "nothing beside the weights on their device"


def test_offloaded_goes_on_from_the_weights_that_are_there() -> None:
    """A checkpoint's weights are put in place after the optimizer was made."""
    expected, found = make_weights(1), make_weights(2)
    optimizer = make("adamw-offloaded", found)
    with torch.no_grad():
        for weight, other in zip(found, make_weights(1), strict=True):
            weight.copy_(other)
    straight = make("adamw", expected)
    take_steps(optimizer, found, range(3))
    take_steps(straight, expected, range(3))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    # And into one that has stepped already.
    with torch.no_grad():
        for weight in (*expected, *found):
            weight.mul_(0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, found, range(3, 5))
    take_steps(straight, expected, range(3, 5))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_eight_bit_is_the_librarys() -> None:
    ours, theirs = make_weights(), make_weights()
    groups = [{"betas": (0.9, 0.95), "eps": 1e-6, **group} for group in groups_of(theirs)]
    take_steps(make("adamw-8bit", ours), ours, range(6))
    take_steps(bitsandbytes.optim.AdamW8bit(groups), theirs, range(6))
    exact = make_weights()
    take_steps(make("adamw", exact), exact, range(6))
    for index, (expected, found, plain) in enumerate(zip(theirs, ours, exact, strict=True)):
        assert torch.equal(expected, found)
        error = (found - plain).detach().norm() / (plain - make_weights()[index]).detach().norm()
        # 8 bits of a moment are right to a few percent; tensors below 4,096 elements have 32.
        assert float(error) < (1e-5 if index == 1 else 0.1)


@pytest.mark.parametrize("name", [*NAMES, "fused"])
def test_a_state_survives_a_file_to_the_bit(name: str, tmp_path: Path) -> None:
    def make_one(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return make_adamw(groups_of(weights), **SETTINGS, is_fused=True) if name == "fused" else make(name, weights)

    straight, stopped = make_weights(), make_weights()
    take_steps(make_one(straight), straight, range(9))

    before = make_one(stopped)
    take_steps(before, stopped, range(4))
    tensors, numbers = split_state(before)
    write_safetensors(tmp_path / "state.safetensors", tensors)
    # Whatever is trained on after a checkpoint is not in it.
    kept = [weight.detach().clone() for weight in stopped]
    take_steps(before, stopped, range(4, 6))
    continued = [nn.Parameter(weight) for weight in kept]
    after = make_one(continued)
    join_state_(after, read_safetensors(tmp_path / "state.safetensors")[0], numbers)
    found = split_state(after)
    assert found[1] == numbers
    assert found[0].keys() == tensors.keys()
    assert all(found[0][place].dtype == tensor.dtype for place, tensor in tensors.items())
    assert bool(numbers) == (name == "adamw-8bit")
    take_steps(after, continued, range(4, 9))
    assert all(torch.equal(*pair) for pair in zip(straight, continued, strict=True))
    first, second = split_state(after), split_state(after)
    assert first[1] == second[1]


def test_a_state_of_nothing_is_nothing() -> None:
    weights = make_weights()
    optimizer = make("adamw", weights)
    assert split_state(optimizer) == ({}, {})
    join_state_(optimizer, {}, {})
    assert not optimizer.state


def test_bytes_of_the_moments() -> None:
    weights = [nn.Parameter(torch.randn(256, 256))]
    sizes = {}
    for name in NAMES:
        optimizer = make_optimizer(
            [{"params": weights, "weight_decay": 0.0, "lr_multiplier": 1.0}], name=name, **SETTINGS, device=CPU
        )
        weights[0].grad = torch.ones_like(weights[0])
        optimizer.step()
        tensors = {place: t for place, t in split_state(optimizer)[0].items() if "qmap" not in place}
        sizes[name] = sum(t.numel() * t.element_size() for t in tensors.values()) / weights[0].numel()
    assert sizes["adamw"] == sizes["adamw-offloaded"] == pytest.approx(8, abs=1e-3)
    assert sizes["adamw-8bit"] == pytest.approx(2 + 2 * 4 / 256, abs=1e-3)
    assert [moment_bytes(name, CPU) for name in NAMES] == [8, 2, 8]
    assert [moment_bytes(name, torch.device("cuda")) for name in NAMES] == [8, 2, 0]


def test_without_bitsandbytes_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match=r"adamw-8bit needs bitsandbytes.*pip install 'infctx\[bitsandbytes\]'"):
        make("adamw-8bit", make_weights())


def test_a_device_that_it_cannot_step_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", refuse)
    with pytest.raises(RecipeError, match=r"adamw-8bit cannot run here: bitsandbytes .* on cpu: no such kernel"):
        make_eight_bit_adamw(groups_of(make_weights()), **SETTINGS, device=CPU)


@pytest.mark.parametrize("name", NAMES)
def test_trying_an_optimizer_draws_no_random_numbers(name: str, make_finch: Callable[..., Any]) -> None:
    before = torch.get_rng_state()
    make(name, make_weights())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["adamw", "adamw-offloaded"])
def test_fused_is_asked_for_or_left_to_the_device(name: str) -> None:
    found = {}
    for is_fused in (None, False, True):
        optimizer = make_optimizer(groups_of(make_weights()), name=name, **SETTINGS, device=CPU, is_fused=is_fused)
        inner = optimizer._on_host if isinstance(optimizer, OffloadedAdamW) else optimizer
        found[is_fused] = bool(inner.defaults["fused"])
    assert found == {None: False, False: False, True: True}
