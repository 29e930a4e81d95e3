"""Group norm and gate: every backend against float64, in the output and all gradients.

Uninitialised memory holds NaN in every test, so a value that a kernel forgets is seen.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infctx_kernels.dispatch import BackendError
from infctx_kernels.group_norm_gate import group_norm_gate
from infctx_kernels.group_norm_gate.op import RUNNERS
from infctx_kernels.surrounding import RUNS_ON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("x", "gate", "weight", "bias")
# The norm and the silu are rounded to the dtype; the others compute in float32 and round once.
ROUND_EACH_OPERATION = ("torch", "reference")
EPS = 0.01


def backends(dtype: torch.dtype) -> list:
    """Those that take this dtype; one that cannot run here is skipped with its reason."""
    found = []
    for backend in RUNNERS:
        why = RUNS_ON[backend](DEVICE, (torch.float32,))
        if why is not None or RUNS_ON[backend](DEVICE, (dtype,)) is None:
            found.append(pytest.param(str(backend), marks=pytest.mark.skipif(why is not None, reason=str(why))))
    return found


# (rows, tokens, heads, head size): the smallest, padded heads and sizes, more tokens than the 8 of a program.
CASES = [(1, 1, 1, 2), (2, 3, 4, 2), (1, 1, 2, 8), (2, 5, 3, 6), (2, 13, 2, 4)]


def make_inputs(rows: int, num_tokens: int, heads: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = heads * size
    shapes = [(rows, num_tokens, heads, size), (rows, num_tokens, width), (width,), (width,)]
    x, gate, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    # Heads far from 0 and of very different sizes: what the norm is for.
    return [x * torch.logspace(-1, 2, heads)[:, None] + 1.0, gate * 3.0, weight, bias]


def make_seed(inputs: list[Tensor]) -> Tensor:
    return torch.randn(inputs[1].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def hand_written(inputs: list[Tensor], seed: Tensor, *, eps: float = EPS) -> dict[str, Tensor]:
    """The definition and its gradient, written out."""
    x, gate, weight, bias = inputs
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + eps)
    affine = normed.flatten(2) * weight + bias
    sigmoid = 1 / (1 + torch.exp(-gate))
    to_affine = seed * gate * sigmoid
    to_normed = (to_affine * weight).view_as(x)
    to_x = to_normed - to_normed.mean(-1, keepdim=True) - normed * (to_normed * normed).mean(-1, keepdim=True)
    return {
        "out": affine * gate * sigmoid,
        "d x": to_x / torch.sqrt(variance + eps),
        "d gate": seed * affine * (sigmoid + gate * sigmoid * (1 - sigmoid)),
        "d weight": (to_affine * normed.flatten(2)).sum((0, 1)),
        "d bias": to_affine.sum((0, 1)),
    }


def run(inputs: list[Tensor], backend: str, dtype: torch.dtype, *, eps: float = EPS) -> dict[str, Tensor]:
    """The output, and the gradient of a fixed functional of it with respect to every input, in their dtypes."""
    leaves = [tensor.to(DEVICE, dtype).detach().requires_grad_() for tensor in inputs]
    out = group_norm_gate(*leaves, eps=eps, backend=backend)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, leaves, make_seed(inputs).to(DEVICE, dtype))
    assert all(gradient.dtype == dtype for gradient in gradients)
    return {"out": out.detach().cpu()} | {f"d {name}": g.cpu() for name, g in zip(NAMES, gradients, strict=True)}


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any of them, relative to the largest expected value; NaN if there is a NaN."""
    errors = [
        (found[name].double() - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-6)
        for name in expected
    ]
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("backend", backends(torch.float32))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: tuple[int, int, int, int], backend: str) -> None:
    inputs = make_inputs(*case)
    expected = hand_written([x.float().double() for x in inputs], make_seed(inputs).float().double())
    # The mean is 1 and the smallest head's deviation 0.1: the float32 rounding (6e-8) of x - mean counts ten times.
    assert worst_error(run(inputs, backend, torch.float32), expected) < 3e-6


@pytest.mark.parametrize("backend", backends(torch.float64))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition_in_float64(case: tuple[int, int, int, int], backend: str) -> None:
    inputs = make_inputs(*case)
    assert worst_error(run(inputs, backend, torch.float64), hand_written(inputs, make_seed(inputs))) < 1e-13


@pytest.mark.parametrize("backend", backends(torch.float64))
def test_gradcheck(backend: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 2, 2, 3)]
    assert torch.autograd.gradcheck(lambda *leaves: group_norm_gate(*leaves, eps=EPS, backend=backend), inputs)


@pytest.mark.parametrize("backend", backends(torch.bfloat16))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype).double() for x in make_inputs(2, 9, 2, 8)]
    expected = hand_written(inputs, make_seed(inputs).to(dtype).double())
    last_place = torch.finfo(dtype).eps
    for name, value in run(inputs, backend, dtype).items():
        largest = expected[name].abs().max()
        # Triton's interpreter cuts digits off where a GPU rounds: one unit in the last place, not half of one. Where
        # terms cancel, what float32 rounded off them stays.
        allowed = last_place * expected[name].abs() + 3e-6 * largest
        if backend in ROUND_EACH_OPERATION:
            allowed = 8 * last_place * largest
        assert bool(((value.double() - expected[name]).abs() <= allowed).all()), name


@pytest.mark.parametrize("backend", backends(torch.bfloat16))
def test_each_tensor_keeps_its_dtype(backend: str) -> None:
    x, gate, weight, bias = make_inputs(2, 3, 2, 4)
    leaves = [x.float(), gate.bfloat16(), weight.float(), bias.bfloat16()]
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in leaves]
    out = group_norm_gate(*leaves, eps=EPS, backend=backend)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_eps_decides_where_a_head_is_constant(backend: str) -> None:
    inputs = make_inputs(1, 2, 2, 4)
    inputs[0][:, :, 0] = 2.0
    for eps in (1e-5, 0.5):
        expected = hand_written(inputs, make_seed(inputs), eps=eps)
        assert worst_error(run(inputs, backend, torch.float32, eps=eps), expected) < 3e-6


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_gates_that_are_wide_open_or_shut(backend: str) -> None:
    inputs = make_inputs(1, 2, 2, 4)
    inputs[1] = torch.where(inputs[1] > 0, 1000.0, -1000.0)
    found = run(inputs, backend, torch.float32)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert not bool(found["out"][inputs[1] < 0].any())
    assert bool(found["out"][inputs[1] > 0].any())


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_strided_inputs_and_gradients(backend: str) -> None:
    inputs = make_inputs(2, 9, 2, 4)
    strided = [x.to(DEVICE, torch.float32).mT.contiguous().mT.requires_grad_() for x in inputs[:2]]
    strided += [x.to(DEVICE, torch.float32)[:, None].repeat(1, 2)[:, 0].requires_grad_() for x in inputs[2:]]
    assert not any(x.is_contiguous() for x in strided)
    out = group_norm_gate(*strided, eps=EPS, backend=backend)
    gradients = torch.autograd.grad(out, strided, make_seed(inputs).to(DEVICE, torch.float32).mT.contiguous().mT)
    found = {"out": out.detach().cpu()} | {f"d {name}": g.cpu() for name, g in zip(NAMES, gradients, strict=True)}
    # Torch sums in an order that depends on the strides.
    assert worst_error(found, run(inputs, backend, torch.float32)) < 1e-6


@pytest.mark.parametrize("backend", backends(torch.float32))
@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone_is_the_same(backend: str, wanted: int) -> None:
    inputs = make_inputs(2, 9, 2, 4)
    expected = run(inputs, backend, torch.float32)[f"d {NAMES[wanted]}"]
    leaves = [x.to(DEVICE, torch.float32) for x in inputs]
    leaves[wanted].requires_grad_()
    group_norm_gate(*leaves, eps=EPS, backend=backend).backward(make_seed(inputs).to(DEVICE, torch.float32))
    assert torch.equal(leaves[wanted].grad.cpu(), expected)


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_inputs_are_not_changed_and_autocast_changes_nothing(backend: str) -> None:
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in make_inputs(2, 9, 2, 4)]
    before = [x.detach().clone() for x in leaves]
    plain = group_norm_gate(*leaves, eps=EPS, backend=backend)
    plain.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        under_autocast = group_norm_gate(*leaves, eps=EPS, backend=backend)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("backend", [b for b in backends(torch.float32) if b.values[0] not in ROUND_EACH_OPERATION])
def test_keeps_its_inputs_only(backend: str) -> None:
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in make_inputs(2, 9, 2, 4)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        group_norm_gate(*leaves, eps=EPS, backend=backend)
    assert kept
    assert set(kept) <= {x.data_ptr() for x in leaves}


def test_heads_in_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from infctx_kernels.group_norm_gate import triton_op

    monkeypatch.setattr(triton_op, "CHANNELS_AT_ONCE", 8)
    inputs = make_inputs(2, 9, 5, 3)  # programs of two heads, one of them padded
    expected = hand_written(inputs, make_seed(inputs))
    assert worst_error(run(inputs, "triton", torch.float32), expected) < 3e-6


@pytest.mark.usefixtures("_as_users_run_it")
def test_wrong_arguments_say_what_was_expected() -> None:
    x, gate, weight, bias = (tensor.float() for tensor in make_inputs(2, 3, 2, 4))
    good = {"x": x, "gate": gate, "weight": weight, "bias": bias, "eps": EPS}
    cases = [
        ({"x": x.flatten(2)}, r"x: expected \[B, T, H, N\], none of them 0 and N >= 2, got \[2, 3, 8\]"),
        ({"x": x[:, :0]}, "x: expected"),
        ({"x": x[..., :1]}, "x: expected .* N >= 2"),
        ({"x": x.int()}, "x: expected a dtype of fp32, bf16, fp16, fp64, got torch.int32"),
        ({"gate": gate[..., :4]}, r"gate: expected shape \[2, 3, 8\], got \[2, 3, 4\]"),
        ({"weight": weight.view(2, 4)}, r"weight: expected shape \[8\], got \[2, 4\]"),
        ({"bias": bias.long()}, "bias: expected a dtype"),
        ({"bias": bias.to("meta")}, "bias: expected device cpu as x, got meta"),
        ({"eps": 0.0}, r"eps: expected a finite number > 0, got 0\.0"),
        ({"eps": float("nan")}, "eps: expected a finite number > 0, got nan"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            group_norm_gate(**(good | change))
    with pytest.raises(BackendError, match="'warp' does not exist"):
        group_norm_gate(**good, backend="warp")
    with pytest.raises(BackendError, match="'triton' cannot run on cpu: it computes in float32"):
        group_norm_gate(**(good | {"gate": gate.double()}), backend="triton")
