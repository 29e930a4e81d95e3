"""The token-shift mixes: every backend against float64, in the output and all gradients.

Uninitialised memory holds NaN in every test, so a value that a kernel forgets is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infctx_kernels.dispatch import BackendError
from infctx_kernels.shifted_mix import shifted_mix, shifted_mix_unbound
from infctx_kernels.shifted_mix.op import RUNNERS
from infctx_kernels.surrounding import RUNS_ON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("hidden", "carried", "weights", "dynamic")
# Each operation is rounded to the dtype; the others compute in float32 and round once.
ROUND_EACH_OPERATION = ("torch", "reference")


def backends(dtype: torch.dtype) -> list:
    """Those that take this dtype; one that cannot run here is skipped with its reason."""
    found = []
    for backend in RUNNERS:
        why = RUNS_ON[backend](DEVICE, (torch.float32,))
        if why is not None or RUNS_ON[backend](DEVICE, (dtype,)) is None:
            found.append(pytest.param(str(backend), marks=pytest.mark.skipif(why is not None, reason=str(why))))
    return found


# (rows, tokens, mixes, with dynamic weights, with starts). A program takes 8: a row ends with one, inside one,
# or several do.
CASES = [
    (2, 8, 2, True, False),
    (1, 1, 1, False, False),
    (3, 1, 5, True, True),
    (2, 13, 1, False, True),
    (2, 13, 2, False, False),
    (3, 9, 4, False, True),
    (2, 13, 5, True, True),
    (1, 9, 3, True, False),
]


def make_inputs(rows: int, num_tokens: int, num_mixes: int, *, channels: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, num_tokens, channels), (rows, channels), (num_mixes, channels)]
    shapes.append((num_mixes, rows, num_tokens, channels))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def make_starts(rows: int, num_tokens: int) -> Tensor:
    """Documents that start at the first token, in the middle, next to each other, and at the last token."""
    starts = torch.zeros(rows, num_tokens, dtype=torch.bool)
    starts[0, [0, num_tokens // 2, num_tokens - 1]] = True
    if num_tokens > 8:
        starts[-1, [4, 5, 8]] = True
    return starts


def hand_written(inputs: list[Tensor], starts: Tensor | None, seed: Tensor) -> dict[str, Tensor]:
    """The definition and its gradient, token by token."""
    hidden, carried, weights, dynamic = inputs
    grads = {name: torch.zeros_like(tensor) for name, tensor in zip(NAMES, inputs, strict=True)}
    mixed = torch.empty_like(seed)
    for row in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            is_start = starts is not None and bool(starts[row, t])
            before = carried[row] if t == 0 else hidden[row, t - 1]
            previous = torch.zeros_like(before) if is_start else before
            amount = weights + dynamic[:, row, t]
            mixed[:, row, t] = hidden[row, t] + (previous - hidden[row, t]) * amount
            g = seed[:, row, t]
            grads["hidden"][row, t] += (g * (1 - amount)).sum(0)
            grads["weights"] += g * (previous - hidden[row, t])
            grads["dynamic"][:, row, t] = g * (previous - hidden[row, t])
            if not is_start:
                to_previous = grads["carried"][row] if t == 0 else grads["hidden"][row, t - 1]
                to_previous += (g * amount).sum(0)
    return {"mixed": mixed} | {f"d {name}": grad for name, grad in grads.items()}


def make_seed(inputs: list[Tensor]) -> Tensor:
    return torch.randn(inputs[3].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def run(
    inputs: list[Tensor],
    starts: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    *,
    with_dynamic: bool = True,
    function: Callable[..., Tensor] = shifted_mix,
) -> dict[str, Tensor]:
    """Mixes, and the gradient of a fixed functional of them with respect to every input, in their dtypes."""
    leaves = [tensor.to(DEVICE, dtype).detach().requires_grad_() for tensor in inputs]
    starts = None if starts is None else starts.to(DEVICE)
    mixed = function(*leaves[:3], dynamic=leaves[3] if with_dynamic else None, starts=starts, backend=backend)
    assert mixed.dtype == dtype
    gradients = torch.autograd.grad(mixed, leaves, make_seed(inputs).to(DEVICE, dtype), allow_unused=True)
    results = {"mixed": mixed.detach().cpu()}
    for name, gradient, leaf in zip(NAMES, gradients, leaves, strict=True):
        if gradient is not None:
            assert gradient.dtype == leaf.dtype
            results[f"d {name}"] = gradient.cpu()
    return results


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any of them, relative to the largest expected value; NaN if there is a NaN."""
    assert found
    errors = [
        (found[name].double() - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-6)
        for name in found
    ]
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("backend", backends(torch.float32))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: tuple[int, int, int, bool, bool], backend: str) -> None:
    rows, num_tokens, num_mixes, with_dynamic, with_starts = case
    inputs = make_inputs(rows, num_tokens, num_mixes)
    if not with_dynamic:
        inputs[3].zero_()
    starts = make_starts(rows, num_tokens) if with_starts else None
    expected = hand_written(inputs, starts, make_seed(inputs))
    found = run(inputs, starts, backend, torch.float32, with_dynamic=with_dynamic)
    assert ("d dynamic" in found) == with_dynamic
    # A few float32 roundings (6e-8) of terms as large as the largest value; the weights' gradient sums up to 27 tokens.
    assert worst_error(found, expected) < 1e-6


@pytest.mark.parametrize("backend", backends(torch.float64))
def test_equals_the_definition_in_float64(backend: str) -> None:
    inputs, starts = make_inputs(2, 13, 5), make_starts(2, 13)
    expected = hand_written(inputs, starts, make_seed(inputs))
    assert worst_error(run(inputs, starts, backend, torch.float64), expected) < 1e-14


@pytest.mark.parametrize("backend", backends(torch.float64))
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_gradcheck(backend: str, num_tokens: int) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, num_tokens, 2, channels=2)]
    starts = torch.zeros(2, num_tokens, dtype=torch.bool)
    starts[0, num_tokens // 2] = True

    def function(*leaves: Tensor) -> Tensor:
        return shifted_mix(*leaves[:3], dynamic=leaves[3], starts=starts, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", backends(torch.bfloat16))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype).double() for x in make_inputs(2, 13, 5)]
    starts = make_starts(2, 13)
    seed = make_seed(inputs).to(dtype).double()
    expected = hand_written(inputs, starts, seed)
    found = run(inputs, starts, backend, dtype)
    last_place = torch.finfo(dtype).eps
    for name, value in found.items():
        largest = expected[name].abs().max()
        # Triton's interpreter cuts digits off where a GPU rounds: one unit in the last place, not half of one. A sum of
        # terms that cancel keeps what float32 rounded off the terms.
        allowed = last_place * expected[name].abs() + 1e-6 * largest
        if backend in ROUND_EACH_OPERATION:
            allowed = 8 * last_place * largest
        assert bool(((value.double() - expected[name]).abs() <= allowed).all()), name


@pytest.mark.parametrize("backend", backends(torch.bfloat16))
def test_state_and_weights_keep_their_own_dtype(backend: str) -> None:
    hidden, carried, weights, dynamic = make_inputs(2, 5, 2)
    leaves = [hidden.bfloat16(), carried.float(), weights.float(), dynamic.bfloat16()]
    leaves = [x.to(DEVICE).requires_grad_() for x in leaves]
    mixed = shifted_mix(*leaves[:3], dynamic=leaves[3], backend=backend)
    gradients = torch.autograd.grad(mixed.float().square().sum(), leaves)
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    # What is carried is used as the rounded hidden that it stands for (near enough to be cut off to it, too).
    unrounded = [*leaves[:1], (leaves[1].detach().bfloat16().float() * (1 + 2.0**-11)).requires_grad_(), *leaves[2:]]
    rounded = [*leaves[:1], unrounded[1].detach().bfloat16().requires_grad_(), *leaves[2:]]
    (of_unrounded,), (of_rounded,) = (
        torch.autograd.grad(shifted_mix(*x[:3], dynamic=x[3], backend=backend).float().square().sum(), x[2:3])
        for x in (unrounded, rounded)
    )
    assert torch.equal(of_unrounded, of_rounded)


@pytest.fixture
def _narrow_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from infctx_kernels.shifted_mix import triton_op

    monkeypatch.setattr(triton_op, "FORWARD_CHANNELS", 8)
    monkeypatch.setattr(triton_op, "BACKWARD_CHANNELS", 4)


@pytest.mark.usefixtures("_narrow_triton")
@pytest.mark.parametrize("channels", [3, 4, 11])
def test_channels_in_several_programs(channels: int) -> None:
    inputs, starts = make_inputs(2, 9, 2, channels=channels), make_starts(2, 9)
    expected = hand_written(inputs, starts, make_seed(inputs))
    assert worst_error(run(inputs, starts, "triton", torch.float32), expected) < 1e-6


# Triton's interpreter computes with numpy, which warns of inf - inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_nothing_crosses_a_start(backend: str) -> None:
    inputs, starts = make_inputs(2, 9, 2), make_starts(2, 9)
    expected = run(inputs, starts, "reference", torch.float64)
    broken = [x.clone() for x in inputs]
    broken[1][0] = torch.inf  # row 0 starts at its first token
    broken[0][1, 4] = torch.inf  # row 1 starts at tokens 4 and 5
    found = run(broken, starts, backend, torch.float32)
    # The infinite token is mixed into its own place.
    for name in ("mixed", "d dynamic"):
        assert not bool(found[name][:, 1, 4].isfinite().any())
        found[name][:, 1, 4] = expected[name][:, 1, 4].float()
    del found["d weights"]
    assert worst_error(found, expected) < 1e-6
    assert not bool(found["d carried"][0].any())


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_weights_of_zero_change_nothing(backend: str) -> None:
    hidden, carried, weights, _ = (x.to(DEVICE, torch.float32) for x in make_inputs(2, 9, 4))
    mixed = shifted_mix(hidden, carried, torch.zeros_like(weights), backend=backend)
    assert torch.equal(mixed, hidden.expand_as(mixed))


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_a_chunk_carries_on_where_the_last_one_ended(backend: str) -> None:
    hidden, carried, weights, dynamic = (x.to(DEVICE, torch.float32) for x in make_inputs(2, 12, 2))
    whole = shifted_mix(hidden, carried, weights, dynamic=dynamic, backend=backend)
    first = shifted_mix(hidden[:, :5], carried, weights, dynamic=dynamic[:, :, :5], backend=backend)
    second = shifted_mix(hidden[:, 5:], hidden[:, 4], weights, dynamic=dynamic[:, :, 5:], backend=backend)
    assert torch.equal(whole, torch.cat([first, second], dim=2))


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_strided_inputs_and_gradients(backend: str) -> None:
    inputs, starts = make_inputs(2, 9, 2), make_starts(2, 9)
    expected = run(inputs, starts, backend, torch.float32)
    strided = [x.to(DEVICE, torch.float32).mT.contiguous().mT.requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    strided_starts = starts.to(DEVICE).mT.contiguous().mT
    mixed = shifted_mix(*strided[:3], dynamic=strided[3], starts=strided_starts, backend=backend)
    seed = make_seed(inputs).to(DEVICE, torch.float32).mT.contiguous().mT
    gradients = torch.autograd.grad(mixed, strided, seed)
    found = {"mixed": mixed.detach()} | {f"d {name}": g for name, g in zip(NAMES, gradients, strict=True)}
    # Torch sums in an order that depends on the strides.
    assert worst_error({name: x.cpu() for name, x in found.items()}, expected) < 1e-6


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_mixes_one_by_one(backend: str) -> None:
    inputs, starts = make_inputs(2, 9, 5), make_starts(2, 9)

    def stacked(*arguments: Tensor, **options: Tensor | str | None) -> Tensor:
        return torch.stack(shifted_mix_unbound(*arguments, **options))

    expected = run(inputs, starts, backend, torch.float32)
    found = run(inputs, starts, backend, torch.float32, function=stacked)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # A mix that nobody uses sends back nothing.
    hidden, carried, weights, _ = (x.to(DEVICE, torch.float32).requires_grad_() for x in inputs)
    shifted_mix_unbound(hidden, carried, weights, backend=backend)[1].sum().backward()
    assert bool(weights.grad[1].any())
    assert not bool(weights.grad[[0, 2, 3, 4]].any())


@pytest.mark.parametrize("backend", backends(torch.float32))
@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone_is_the_same(backend: str, wanted: int) -> None:
    inputs, starts = make_inputs(2, 9, 2), make_starts(2, 9)
    expected = run(inputs, starts, backend, torch.float32)[f"d {NAMES[wanted]}"]
    leaves = [x.to(DEVICE, torch.float32) for x in inputs]
    leaves[wanted].requires_grad_()
    mixed = shifted_mix(*leaves[:3], dynamic=leaves[3], starts=starts.to(DEVICE), backend=backend)
    mixed.backward(make_seed(inputs).to(DEVICE, torch.float32))
    assert torch.equal(leaves[wanted].grad.cpu(), expected)
    assert all(leaf.grad is None for leaf in leaves if leaf is not leaves[wanted])


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_inputs_are_not_changed_and_autocast_changes_nothing(backend: str) -> None:
    inputs, starts = make_inputs(2, 9, 2), make_starts(2, 9)
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in inputs]
    before = [x.detach().clone() for x in leaves]
    plain = shifted_mix(*leaves[:3], dynamic=leaves[3], starts=starts.to(DEVICE), backend=backend)
    plain.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        under_autocast = shifted_mix(*leaves[:3], dynamic=leaves[3], starts=starts.to(DEVICE), backend=backend)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("backend", [b for b in backends(torch.float32) if b.values[0] not in ROUND_EACH_OPERATION])
def test_keeps_its_inputs_only(backend: str) -> None:
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in make_inputs(2, 9, 5)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        shifted_mix(*leaves[:3], dynamic=leaves[3], backend=backend)
    assert kept
    assert set(kept) <= {x.data_ptr() for x in leaves}


@pytest.mark.usefixtures("_as_users_run_it")
def test_wrong_arguments_say_what_was_expected() -> None:
    hidden, carried, weights, dynamic = (x.float() for x in make_inputs(2, 5, 2))
    good = {"hidden": hidden, "carried": carried, "weights": weights, "dynamic": dynamic}
    cases = [
        ({"hidden": hidden[:, :0]}, r"hidden: expected \[B, T, C\], none of them 0, got \[2, 0, 6\]"),
        ({"hidden": hidden.int()}, "hidden: expected a dtype of fp32, bf16, fp16, fp64, got torch.int32"),
        ({"carried": carried[:1]}, r"carried: expected shape \[2, 6\], got \[1, 6\]"),
        ({"weights": weights[0]}, r"weights: expected \[M, C\] with M from 1 to 5, got \[6\]"),
        ({"weights": weights.repeat(3, 1)}, r"weights: expected .* got \[6, 6\]"),
        ({"dynamic": dynamic[:, :, :4]}, "dynamic: expected shape"),
        ({"dynamic": dynamic.double()}, "dynamic: expected torch.float32 as hidden, got torch.float64"),
        ({"starts": torch.zeros(2, 5)}, "starts: expected bool, got torch.float32"),
        ({"starts": torch.zeros(2, 4, dtype=torch.bool)}, "starts: expected shape"),
        ({"carried": carried.to("meta")}, "carried: expected device cpu as hidden, got meta"),
    ]
    for change, message in cases:
        for function in (shifted_mix, shifted_mix_unbound):
            with pytest.raises(ValueError, match=message):
                function(**(good | change))
    with pytest.raises(BackendError, match=r"'warp' does not exist\. Usable on cpu: .*torch, reference"):
        shifted_mix(**good, backend="warp")
    with pytest.raises(BackendError, match="'triton' cannot run on cpu: it computes in float32"):
        shifted_mix(hidden.double(), carried, weights, backend="triton")
