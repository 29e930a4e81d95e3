"""Squared ReLU and sigmoid gate: every backend against float64, in the output and all gradients.

Uninitialised memory holds NaN in every test, so a value that a kernel forgets is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infctx_kernels.channel_mix import sigmoid_gate, squared_relu
from infctx_kernels.channel_mix.op import SIGMOID_GATE_RUNNERS, SQUARED_RELU_RUNNERS
from infctx_kernels.dispatch import BackendError
from infctx_kernels.surrounding import RUNS_ON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUND_EACH_OPERATION = ("torch", "reference")
# None, one, one that ends inside a program's 1024, and one of several programs.
SHAPES = [(0, 3), (1,), (3, 7, 5), (1, 2, 1031)]


def backends(dtype: torch.dtype) -> list:
    """Those that take this dtype; one that cannot run here is skipped with its reason."""
    assert SIGMOID_GATE_RUNNERS.keys() == SQUARED_RELU_RUNNERS.keys()
    found = []
    for backend in SQUARED_RELU_RUNNERS:
        why = RUNS_ON[backend](DEVICE, (torch.float32,))
        if why is not None or RUNS_ON[backend](DEVICE, (dtype,)) is None:
            found.append(pytest.param(str(backend), marks=pytest.mark.skipif(why is not None, reason=str(why))))
    return found


def squared_relu_written_out(x: Tensor, seed: Tensor) -> list[Tensor]:
    positive = (x > 0) * x
    return [positive**2, 2 * positive * seed]


def sigmoid_gate_written_out(receptance: Tensor, value: Tensor, seed: Tensor) -> list[Tensor]:
    sigmoid = 1 / (1 + torch.exp(-receptance))
    # sigmoid · (1 - sigmoid) without the difference.
    slope = sigmoid / (1 + torch.exp(receptance))
    return [sigmoid * value, seed * value * slope, seed * sigmoid]


# function, its definition and gradient, number of arguments
OPERATORS = [
    pytest.param(squared_relu, squared_relu_written_out, 1, id="squared_relu"),
    pytest.param(sigmoid_gate, sigmoid_gate_written_out, 2, id="sigmoid_gate"),
]


def make_tensors(shape: tuple[int, ...], number: int, *, dtype: torch.dtype) -> list[Tensor]:
    """The arguments and a gradient for the result, float64 with values that `dtype` holds."""
    generator = torch.Generator().manual_seed(0)
    return [
        (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).double() for _ in range(number + 1)
    ]


def run(function: Callable[..., Tensor], tensors: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of all arguments."""
    *leaves, seed = (x.to(DEVICE, dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves, backend=backend)
    results = [out.detach(), *torch.autograd.grad(out, leaves, seed)]
    assert all(x.dtype == dtype and x.shape == seed.shape for x in results)
    return [x.cpu() for x in results]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("function", "written_out", "number"), OPERATORS)
def test_equals_the_definition(
    function: Callable[..., Tensor],
    written_out: Callable[..., list[Tensor]],
    number: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    tensors = make_tensors(shape, number, dtype=dtype)
    expected = written_out(*tensors)
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    names = [backend.values[0] for backend in backends(dtype) if not backend.marks[0].args[0]]
    assert {"torch", "reference"} <= set(names)
    for backend in names:
        for value, exact in zip(run(function, tensors, backend, dtype), expected, strict=True):
            # A backend that rounds once errs by half a unit in the last place, a whole one in Triton's interpreter,
            # which cuts digits off; in float32 the computation itself adds a few. Torch rounds the sigmoid, then its
            # distance from 1 keeps that error.
            units = 1.01 if dtype in (torch.bfloat16, torch.float16) else 8.0
            allowed = units * eps * exact.abs() + smallest
            if backend in ROUND_EACH_OPERATION:
                allowed = 4 * eps * torch.maximum(exact.abs(), (tensors[-1] * tensors[-2]).abs()) + smallest
            assert bool(((value.double() - exact).abs() <= allowed).all()), backend


@pytest.mark.parametrize("backend", backends(torch.float64))
@pytest.mark.parametrize(("function", "written_out", "number"), OPERATORS)
def test_gradcheck(
    function: Callable[..., Tensor], written_out: Callable[..., list[Tensor]], number: int, backend: str
) -> None:
    *tensors, _ = make_tensors((3, 4), number, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *arguments: function(*arguments, backend=backend), leaves)


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_squared_relu_at_its_edges(backend: str) -> None:
    x = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 2.0, torch.nan], device=DEVICE, requires_grad=True)
    out = squared_relu(x, backend=backend)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0, torch.nan])
    torch.testing.assert_close(out.detach().cpu(), expected, equal_nan=True)
    out.backward(torch.tensor([1.0, torch.inf, 3.0, 3.0, 3.0, 3.0], device=DEVICE))
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 12.0, torch.nan])
    torch.testing.assert_close(x.grad.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_gates_that_are_wide_open_or_shut(backend: str) -> None:
    receptance = torch.tensor([-1000.0, -100.0, 100.0, 1000.0], device=DEVICE, requires_grad=True)
    value = torch.full((4,), 3.0, device=DEVICE, requires_grad=True)
    out = sigmoid_gate(receptance, value, backend=backend)
    out.sum().backward()
    torch.testing.assert_close(out.detach().cpu(), torch.tensor([0.0, 0.0, 3.0, 3.0]))
    torch.testing.assert_close(receptance.grad.cpu(), torch.zeros(4))
    torch.testing.assert_close(value.grad.cpu(), torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("backend", backends(torch.float32))
@pytest.mark.parametrize(("function", "written_out", "number"), OPERATORS)
def test_strided_inputs_autocast_and_what_is_kept(
    function: Callable[..., Tensor], written_out: Callable[..., list[Tensor]], number: int, backend: str
) -> None:
    tensors = make_tensors((3, 4), number, dtype=torch.float32)
    expected = run(function, tensors, backend, torch.float32)

    *leaves, seed = (x.to(DEVICE, torch.float32).mT.contiguous().mT for x in tensors)
    assert not seed.is_contiguous()
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves, backend=backend)
    found = [out.detach(), *torch.autograd.grad(out, leaves, seed)]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))

    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in tensors[:-1]]
    before = [x.detach().clone() for x in leaves]
    kept: list[int] = []
    with (
        torch.autocast(DEVICE.type, dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x),
    ):
        out = function(*leaves, backend=backend)
    assert torch.equal(out.detach().cpu(), expected[0])
    out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    assert kept
    assert backend in ROUND_EACH_OPERATION or set(kept) <= {x.data_ptr() for x in leaves}


@pytest.mark.usefixtures("_as_users_run_it")
def test_wrong_arguments_say_what_was_expected() -> None:
    x = torch.ones(2, 3)
    cases = [
        (lambda: squared_relu(x.int()), "x: expected a dtype of fp32, bf16, fp16, fp64, got torch.int32"),
        (lambda: sigmoid_gate(x.int(), x), "receptance: expected a dtype"),
        (lambda: sigmoid_gate(x, x[:1]), r"value: expected shape \[2, 3\], got \[1, 3\]"),
        (lambda: sigmoid_gate(x, x.double()), r"value: expected torch\.float32 as receptance, got torch\.float64"),
        (lambda: sigmoid_gate(x, x.to("meta")), "value: expected device cpu as receptance, got meta"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for function in (squared_relu, lambda x, backend: sigmoid_gate(x, x, backend=backend)):
        with pytest.raises(BackendError, match="'warp' does not exist"):
            function(x, backend="warp")
        with pytest.raises(BackendError, match="'triton' cannot run on cpu: it computes in float32"):
            function(x.double(), backend="triton")
