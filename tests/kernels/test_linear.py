"""The linear layer through oneDNN against float64, and when it is left to torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from infctx_kernels import linear as module
from infctx_kernels.linear import FEWEST_ROWS, linear


@pytest.fixture
def _takes_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)


@pytest.mark.usefixtures("_takes_onednn")
@pytest.mark.parametrize("shape", [(16, 8, 3), (2, 33, 65, 130), (1, 257, 512, 96), (4, 5, 7, 1, 1)])
@pytest.mark.parametrize("is_turned", [False, True])
def test_product_and_gradients_equal_float64(shape: tuple[int, ...], is_turned: bool) -> None:
    *rows, inside, outside = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inside, generator=generator)
    weight = torch.randn(outside, inside, generator=generator)
    if is_turned:  # neither contiguous
        x, weight = x.transpose(0, -1).contiguous().transpose(0, -1), weight.t().contiguous().t()
    seed = torch.randn(*rows, outside, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight)]
        product = linear(*leaves)
        assert product.shape == seed.shape
        functions = f"{product.grad_fn} {product.grad_fn.next_functions}"
        assert ("OneDnn" in functions) == (dtype == torch.float32)
        results.append([product.detach(), *torch.autograd.grad(product, leaves, seed.to(dtype))])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max()) * max(shape) ** 0.5


@pytest.mark.usefixtures("_takes_onednn")
def test_only_the_gradients_that_are_wanted() -> None:
    x, weight = torch.randn(20, 4), torch.randn(3, 4, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, -1))
    x.requires_grad_()
    linear(x, weight.detach()).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(20, -1))


@pytest.mark.usefixtures("_takes_onednn")
def test_what_is_left_to_torch() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    few = linear(torch.randn(FEWEST_ROWS - 1, 4), weight)
    half = linear(torch.randn(20, 4).bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = linear(torch.randn(20, 4), weight)
    assert under_autocast.dtype == torch.bfloat16
    for product in (few, half, under_autocast):
        assert "OneDnn" not in f"{product.grad_fn} {product.grad_fn.next_functions}"
    assert linear(torch.randn(0, 4), weight).shape == (0, 3)


def test_a_machine_where_mkl_is_as_fast_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    x, weight = torch.randn(20, 4), torch.randn(3, 4)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.usefixtures("_takes_onednn")
def test_second_derivatives() -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(20, 20, generator=generator).to(dtype).requires_grad_() for _ in range(2))
        gradients = torch.autograd.grad(linear(x, weight).pow(3).sum(), [x, weight], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, weight]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("_takes_onednn")
@pytest.mark.parametrize("shape", [(20, 4), (2, 10, 4)])
def test_the_product_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    product = linear(torch.randn(shape), weight)
    product[..., 1:] = -torch.inf
    product[..., 0].sum().backward()
    assert not bool(weight.grad[1:].any())
