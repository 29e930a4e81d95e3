"""The operators around the recurrence in C++: against float64, for every width and number of threads.

What they share with the other backends is tested there. Uninitialised memory holds NaN in every test.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infctx_kernels import group_norm_gate, shifted_mix, shifted_mix_unbound, sigmoid_gate, squared_relu
from infctx_kernels.cpu import library
from infctx_kernels.cross_entropy.chunked import torch_row_pass
from infctx_kernels.dispatch import BackendError
from infctx_kernels.surrounding import SurroundingBackend, choose_surrounding

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Below a vector, between two, whole ones, and more than a task takes at once (256).
WIDTHS = [1, 7, 17, 64, 200, 300]
# One token; within a segment of 32; its end; several, the last one short; rows that end within a segment.
LENGTHS = [1, 31, 32, 75]


def run_cpp_row_pass(*arguments: Tensor | float | bool) -> tuple[Tensor, Tensor | None]:
    from infctx_kernels.cross_entropy.cpp_op import cpp_row_pass

    return cpp_row_pass(*arguments)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mix_inputs(num_tokens: int, channels: int, *, mixes: int = 3) -> list[Tensor]:
    shapes = [(2, num_tokens, channels), (2, channels), (mixes, channels), (mixes, 2, num_tokens, channels)]
    return [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def make_starts(num_tokens: int) -> Tensor:
    """Next to each other, at a segment's border, and at a row's first and last token."""
    starts = torch.zeros(2, num_tokens, dtype=torch.bool)
    starts[0, [num_tokens - 1, num_tokens // 2, num_tokens // 2 - 1]] = True
    starts[0, 32::32] = True
    starts[1, 0] = True
    return starts


def norm_inputs(num_tokens: int, heads: int, size: int) -> list[Tensor]:
    width = heads * size
    shapes = [(2, num_tokens, heads, size), (2, num_tokens, width), (width,), (width,)]
    return [randn(*shape, seed=seed) + (seed == 0) for seed, shape in enumerate(shapes)]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What the function returns, and the gradients of a fixed functional of it, in the inputs' dtypes."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    seed = randn(*out.shape, seed=9).to(torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, seed)]


def assert_rounded_once(found: list[Tensor], expected: list[Tensor], *, float32_error: float) -> None:
    """Half a unit in the last place of the dtype, beside float32's own error, relative to the largest value."""
    for index, (value, exact) in enumerate(zip(found, expected, strict=True)):
        rounding = 0.0 if value.dtype == torch.float32 else torch.finfo(value.dtype).eps / 2
        allowed = exact.abs() * rounding + float32_error * exact.abs().max() + torch.finfo(value.dtype).tiny
        assert value.shape == exact.shape
        assert bool(((value.double() - exact).abs() <= allowed).all()), index


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def mixing(starts: Tensor | None, backend: str) -> Callable[..., Tensor]:
    return lambda *x: shifted_mix(*x[:3], dynamic=x[3], starts=starts, backend=backend)


def norming(backend: str) -> Callable[..., Tensor]:
    return lambda *x: group_norm_gate(*x, eps=0.01, backend=backend)


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_shifted_mix(num_tokens: int, channels: int, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in mix_inputs(num_tokens, channels)]
    for starts in (None, make_starts(num_tokens)):
        expected = results(mixing(starts, "reference"), [x.double() for x in inputs])
        # The weights' gradient sums 150 tokens.
        assert_rounded_once(results(mixing(starts, "cpp"), inputs), expected, float32_error=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_carried_is_used_as_the_hidden_that_it_stands_for(dtype: torch.dtype) -> None:
    hidden, carried, weights, dynamic = mix_inputs(5, 17)
    inputs = [hidden.to(dtype), carried.float(), weights.float(), dynamic.to(dtype)]
    rounded = [inputs[0], inputs[1].to(dtype).float(), *inputs[2:]]
    assert not torch.equal(inputs[1], rounded[1])
    found, expected = (results(mixing(None, "cpp"), x) for x in (inputs, rounded))
    assert [x.dtype for x in found[1:]] == [x.dtype for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mixes", [1, 2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_mix_without_dynamic_weights(mixes: int, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in mix_inputs(40, 21, mixes=mixes)[:3]]
    starts = make_starts(40)
    found, expected = (
        results(lambda *x, b=backend: shifted_mix(*x, starts=starts, backend=b), leaves)
        for backend, leaves in (("cpp", inputs), ("reference", [x.double() for x in inputs]))
    )
    assert_rounded_once(found, expected, float32_error=1e-6)


def test_a_mix_without_a_gradient_counts_as_zeros() -> None:
    inputs = [x.float() for x in mix_inputs(40, 300)]
    gradients = []
    for backend in ("cpp", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        mixed = shifted_mix_unbound(*leaves[:3], dynamic=leaves[3], backend=backend)
        gradients.append(torch.autograd.grad(mixed[1].square().sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not bool(gradients[0][3][[0, 2]].any())


def test_every_token_starts_a_document() -> None:
    inputs = [x.float() for x in mix_inputs(40, 17)]
    inputs[1].fill_(torch.inf)
    mixed, _, to_carried, to_weights, _ = results(mixing(torch.ones(2, 40, dtype=torch.bool), "cpp"), inputs)
    torch.testing.assert_close(mixed, inputs[0] * (1 - (inputs[2][:, None, None] + inputs[3])), rtol=1e-5, atol=1e-6)
    assert not bool(to_carried.any())
    assert bool(to_weights.isfinite().all())


@pytest.mark.parametrize("border", [31, 32, 33])
def test_nothing_crosses_a_start_at_a_segments_border(border: int) -> None:
    inputs = [x.float() for x in mix_inputs(64, 17)]
    starts = torch.zeros(2, 64, dtype=torch.bool)
    starts[:, border] = True
    clean = results(mixing(starts, "cpp"), inputs)
    inputs[0][:, border - 1] = torch.inf
    inputs[3][:, :, border] = torch.nan  # what comes from after the start must not be sent before it
    broken = results(mixing(starts, "cpp"), inputs)
    assert torch.equal(broken[0][:, :, border + 1 :], clean[0][:, :, border + 1 :])
    assert torch.equal(broken[1][:, : border - 1], clean[1][:, : border - 1])
    assert torch.equal(broken[1][:, border - 1], clean[1][:, border - 1])
    assert bool(broken[1][:, border].isnan().all())


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 7, 17, 64, 200])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_group_norm_gate(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in norm_inputs(num_tokens, 3, size)]
    expected = results(norming("reference"), [x.double() for x in inputs])
    assert_rounded_once(results(norming("cpp"), inputs), expected, float32_error=3e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_group_norm_gate_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, gate, weight, bias = norm_inputs(5, 2, 24)
    inputs = [x.to(dtypes[0]), gate.to(dtypes[1]), weight.bfloat16(), bias.float()]
    found = results(norming("cpp"), inputs)
    assert [x.dtype for x in found] == [dtypes[1], *dtypes, torch.bfloat16, torch.float32]
    expected = results(norming("reference"), [x.double() for x in inputs])
    assert_rounded_once(found, expected, float32_error=3e-6)


ALL_BFLOAT16 = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)


def test_every_bfloat16_squared() -> None:
    found = squared_relu(ALL_BFLOAT16, backend="cpp")
    expected = ALL_BFLOAT16.float().relu().square().to(torch.bfloat16)
    assert torch.equal(found.isnan(), ALL_BFLOAT16.isnan())
    # Denormal results are zero.
    expected[expected < torch.finfo(torch.bfloat16).tiny] = 0.0
    assert torch.equal(found.nan_to_num(3.0), expected.nan_to_num(3.0))


def test_the_sigmoid_of_every_bfloat16() -> None:
    receptance = ALL_BFLOAT16[ALL_BFLOAT16.isfinite()]
    inputs = [receptance, torch.full_like(receptance, 1.5)]
    found = results(lambda *x: sigmoid_gate(*x, backend="cpp"), inputs)
    sigmoid = torch.sigmoid(receptance.double())
    seed = randn(*receptance.shape, seed=9).bfloat16().double()
    slope = sigmoid * torch.sigmoid(-receptance.double())
    for value, exact in zip(found, [1.5 * sigmoid, 1.5 * seed * slope, seed * sigmoid], strict=True):
        # Half a unit in the last place and float32's share of it; denormals are zero.
        allowed = exact.abs() * (2.0**-8 * 1.001) + 6 * torch.finfo(torch.float32).tiny
        assert bool(((value.double() - exact).abs() <= allowed).all())


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("size", [1, 15, 16, 8191, 8193, 20001])
def test_elements_one_by_one(size: int) -> None:
    inputs = [randn(size, seed=seed).float() for seed in range(2)]
    for function, number in ((squared_relu, 1), (sigmoid_gate, 2)):
        found = results(lambda *x, f=function: f(*x, backend="cpp"), inputs[:number])
        expected = results(lambda *x, f=function: f(*x, backend="reference"), [x.double() for x in inputs[:number]])
        assert_rounded_once(found, expected, float32_error=5e-7)


def row_inputs(num_rows: int, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(num_ids, (num_rows,), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(num_rows, generator=torch.Generator().manual_seed(2)) + 0.5
    weight[1::3] = 0.0
    return randn(num_rows, num_ids) * 4.0, targets, weight


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("l2_wrap", [0.0, 0.05])
@pytest.mark.parametrize("num_ids", [1, 5, 16, 257, 1024, 1025, 65537])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_pass(dtype: torch.dtype, num_ids: int, l2_wrap: float) -> None:
    logits, targets, weight = row_inputs(5, num_ids)
    logits = logits.to(dtype)
    exact = torch_row_pass(logits.double(), targets, weight.double(), l2_wrap, True)
    losses, gradient = run_cpp_row_pass(logits.clone(), targets, weight, l2_wrap, True)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-6, atol=1e-6)
    assert_rounded_once([gradient], [exact[1]], float32_error=5e-7)
    assert not bool(losses[1::3].any())
    assert not bool(gradient[1::3].any())
    again, without = run_cpp_row_pass(logits, targets, weight, l2_wrap, False)
    assert without is None
    assert torch.equal(again, losses)


def test_the_gradient_takes_the_logits_place_and_no_more() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for num_ids in (5, 37):
            whole = torch.full((6, num_ids), 7.0, dtype=dtype)
            _, targets, weight = row_inputs(4, num_ids)
            _, gradient = run_cpp_row_pass(whole[1:5], targets, weight, 0.0, True)
            assert gradient.data_ptr() == whole[1:5].data_ptr()
            assert torch.equal(whole[[0, 5]], torch.full((2, num_ids), 7.0, dtype=dtype))
            strided = torch.ones(num_ids, 4, dtype=dtype).t()
            _, of_strided = run_cpp_row_pass(strided, targets, weight, 0.0, True)
            assert torch.equal(of_strided, gradient)


@pytest.mark.parametrize("places", [(3, 4), (0, 2000), (1023, 1024), (1500, 1501, 2049)])
def test_of_equal_largest_logits_the_first_is_held_back(places: tuple[int, ...]) -> None:
    logits = randn(1, 2050).float()
    logits[0, list(places)] = 9.0
    targets, weight = torch.tensor([7]), torch.tensor([2.0])
    _, with_penalty = run_cpp_row_pass(logits.clone(), targets, weight, 0.5, True)
    _, without = run_cpp_row_pass(logits.clone(), targets, weight, 0.0, True)
    expected = torch.zeros(1, 2050)
    expected[0, places[0]] = 0.5 * 2.0 * 9.0
    torch.testing.assert_close(with_penalty - without, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(offset: float) -> None:
    logits, targets, weight = row_inputs(5, 257)
    logits = (logits + offset).float()
    exact = torch_row_pass(logits.double(), targets, weight.double(), 1e-4, True)
    losses, gradient = run_cpp_row_pass(logits, targets, weight, 1e-4, True)
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-6, atol=1e-6)
    assert_rounded_once([gradient], [exact[1]], float32_error=5e-7)


def test_logits_that_are_not_finite() -> None:
    """As in torch: -inf has probability 0; +inf, NaN and a row of -inf alone are seen everywhere."""
    logits = randn(6, 40).float()
    logits[0, :30] = -torch.inf
    logits[1, 35] = -torch.inf  # the target
    logits[2, 4] = torch.inf
    logits[3, 39] = torch.nan
    logits[4] = -torch.inf
    targets, weight = torch.full((6,), 35), torch.ones(6)
    expected = torch_row_pass(logits.clone(), targets, weight, 0.1, True)
    found = run_cpp_row_pass(logits, targets, weight, 0.1, True)
    assert expected[0].isfinite().tolist() == [True, False, False, False, False, True]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("wrong", [-1, 40, 2**62, -(2**62)])
def test_an_id_that_does_not_exist_is_seen_unless_its_weight_is_zero(wrong: int) -> None:
    logits = randn(3, 40).float()
    targets, weight = torch.tensor([1, wrong, wrong]), torch.tensor([1.0, 1.0, 0.0])
    losses, gradient = run_cpp_row_pass(logits, targets, weight, 0.1, True)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    def everything() -> list[Tensor]:
        mixes = [x.to(dtype) for x in mix_inputs(150, 700)]
        # Weights in float32: bf16 would hide what the order of sums changes.
        mixes[2] = mixes[2].float()
        norms = [x.to(dtype) for x in norm_inputs(150, 5, 40)]
        norms[2:] = [x.float() for x in norms[2:]]
        found = results(mixing(make_starts(150), "cpp"), mixes) + results(norming("cpp"), norms)
        found += results(lambda x: squared_relu(x, backend="cpp"), norms[1:2])
        found += results(lambda *x: sigmoid_gate(*x, backend="cpp"), [norms[1], norms[1].flip(1)])
        logits, targets, weight = row_inputs(9, 3001)
        return found + list(run_cpp_row_pass(logits.to(dtype), targets, weight, 0.1, True))

    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_long_sequences_sum_exactly_enough() -> None:
    # Segments grow beyond 32 tokens here.
    inputs = [randn(1, 5000, 4), randn(1, 4), randn(1, 4)]
    expected = results(lambda *x: shifted_mix(*x, backend="reference"), inputs)
    found = results(lambda *x: shifted_mix(*x, backend="cpp"), [x.float() for x in inputs])
    assert_rounded_once(found, expected, float32_error=2e-6)


def test_flushing_to_zero_stays_inside() -> None:
    tiny = torch.tensor([1e-40])
    assert float(squared_relu(torch.tensor([1e-21]), backend="cpp")) == 0.0
    assert float(tiny * 0.5) > 0.0


def test_recomputed_in_the_backward_pass() -> None:
    mixes, norms = ([x.float() for x in inputs] for inputs in (mix_inputs(3, 5), norm_inputs(3, 1, 5)))
    for function, inputs in (
        (mixing(None, "cpp"), mixes),
        (lambda *x: torch.stack(shifted_mix_unbound(*x, backend="cpp")), mixes[:3]),
        (norming("cpp"), norms),
        (lambda x: squared_relu(x, backend="cpp"), norms[:1]),
        (lambda x: sigmoid_gate(x, x, backend="cpp"), norms[:1]),
    ):
        recomputed = results(lambda *x, f=function: checkpoint(f, *x, use_reentrant=False), inputs)
        assert all(torch.equal(a, b) for a, b in zip(recomputed, results(function, inputs), strict=True))


def test_a_second_derivative_is_refused() -> None:
    leaves = [x.float().requires_grad_() for x in mix_inputs(3, 5)]
    norms = [x.float().requires_grad_() for x in norm_inputs(3, 1, 5)]
    for out, leaf in (
        (mixing(None, "cpp")(*leaves), leaves[0]),
        (torch.stack(shifted_mix_unbound(*leaves[:3], backend="cpp")), leaves[0]),
        (norming("cpp")(*norms), norms[0]),
        (squared_relu(leaves[0], backend="cpp"), leaves[0]),
        (sigmoid_gate(leaves[0], leaves[0], backend="cpp"), leaves[0]),
    ):
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_who_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for dtypes in ((torch.float32,), (torch.bfloat16, torch.float32), (torch.float16,)):
        assert choose_surrounding(None, device=CPU, dtypes=dtypes) == SurroundingBackend.CPP
    assert choose_surrounding(None, device=CPU, dtypes=(torch.float32, torch.float64)) == SurroundingBackend.TORCH
    with pytest.raises(BackendError, match=r"'cpp' cannot run on cpu: it computes in float32, .*float64.* torch, ref"):
        choose_surrounding("cpp", device=CPU, dtypes=(torch.float64,))
    with pytest.raises(BackendError, match="'cpp' cannot run on meta: it runs on CPUs only"):
        choose_surrounding("cpp", device=torch.device("meta"), dtypes=(torch.float32,))
    monkeypatch.setattr(library, "why_not", lambda: "no C++ compiler found")
    # The recurrence's choice has said it.
    with caplog.at_level(logging.DEBUG):
        assert choose_surrounding(None, device=CPU, dtypes=(torch.float32,)) == SurroundingBackend.TORCH
    assert not caplog.records
    with pytest.raises(BackendError, match=r"no C\+\+ compiler found\. Usable here: (triton, )?torch, reference"):
        choose_surrounding("cpp", device=CPU, dtypes=(torch.float32,))


def test_the_oracle_of_these_tests() -> None:
    """The row pass in float64, by hand, for one row."""
    losses, gradient = torch_row_pass(torch.tensor([[0.0, 1.0]]).double(), torch.tensor([0]), torch.ones(1), 0.5, True)
    probability = 1 / (1 + math.exp(-1))
    assert math.isclose(float(losses), math.log(1 + math.exp(1)) + 0.25)
    expected = torch.tensor([[-probability, probability + 0.5]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)
