"""Head and cross entropy in one: every backend against float64, in the loss and both gradients.

Uninitialised memory holds NaN in every test, so a value that a kernel forgets is seen.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infctx_kernels.cross_entropy import linear_cross_entropy, op
from infctx_kernels.cross_entropy.op import RUNNERS
from infctx_kernels.dispatch import BackendError
from infctx_kernels.surrounding import RUNS_ON

# On a GPU deterministic matrix products, which the tests ask for, need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
L2_WRAP = 0.05  # 500 times the usual, to be seen beside the cross entropy


def backends(dtype: torch.dtype) -> list:
    """Those that take this dtype; one that cannot run here is skipped with its reason."""
    found = []
    for backend in RUNNERS:
        why = RUNS_ON[backend](DEVICE, (torch.float32,))
        if why is not None or RUNS_ON[backend](DEVICE, (dtype,)) is None:
            found.append(pytest.param(str(backend), marks=pytest.mark.skipif(why is not None, reason=str(why))))
    return found


def make_inputs(num_tokens: int, num_ids: int, *, channels: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, channels, generator=generator, dtype=torch.float64)
    head = torch.randn(num_ids, channels, generator=generator, dtype=torch.float64)
    targets = torch.randint(num_ids, (num_tokens,), generator=generator)
    weight = torch.rand(num_tokens, generator=generator, dtype=torch.float64) + 0.5
    return hidden, head, targets, weight


def written_out(
    hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor, l2_wrap: float, scale: float
) -> dict[str, Tensor]:
    """The loss and its gradient by the formulas, scaled; nothing of it by autograd."""
    logits = hidden @ head.t()
    rows = torch.arange(len(targets))
    largest, place = logits.max(dim=1)
    losses = torch.logsumexp(logits, 1) - logits[rows, targets] + 0.5 * l2_wrap * largest**2
    gradient = torch.softmax(logits, 1)
    gradient[rows, targets] -= 1.0
    gradient[rows, place] += l2_wrap * largest
    gradient *= scale * weight[:, None]
    return {"loss": (losses * weight).sum(), "d hidden": gradient @ head, "d head": gradient.t() @ hidden}


def run(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    backend: str,
    dtype: torch.dtype,
    *,
    l2_wrap: float = 0.0,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """The loss and the gradients of `scale` times it."""
    hidden, head = (x.to(DEVICE, dtype).detach().requires_grad_() for x in inputs[:2])
    targets, weight = inputs[2].to(DEVICE), inputs[3].to(DEVICE, torch.float32)
    loss = linear_cross_entropy(hidden, head, targets, weight, l2_wrap=l2_wrap, backend=backend)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = torch.autograd.grad(loss * scale, (hidden, head))
    assert [g.dtype for g in gradients] == [dtype, dtype]
    return {"loss": loss.detach().cpu(), "d hidden": gradients[0].cpu(), "d head": gradients[1].cpu()}


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any of them, relative to the largest expected value; NaN if there is a NaN."""
    errors = [
        (found[name].double() - expected[name].double()).abs().max() / expected[name].double().abs().max()
        for name in expected
    ]
    return float(torch.stack(errors).max())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 3 tokens of a vocabulary of 37, and of programs that take a row in several steps."""
    monkeypatch.setattr(op, "LOGITS_AT_ONCE", 3 * 37 + 1)
    if RUNS_ON["triton"](DEVICE, (torch.float32,)) is None:
        from infctx_kernels.cross_entropy import triton_op

        monkeypatch.setattr(triton_op, "LOGITS_OF_A_STEP", 16)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("l2_wrap", [0.0, L2_WRAP])
@pytest.mark.parametrize(("num_tokens", "num_ids"), [(1, 1), (1, 37), (2, 37), (3, 37), (4, 37), (7, 37), (2, 32)])
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_equals_the_formulas(backend: str, num_tokens: int, num_ids: int, l2_wrap: float) -> None:
    inputs = make_inputs(num_tokens, num_ids)
    inputs = (*inputs[:3], inputs[3].float().double())
    # A scale that is no power of two: the incoming gradient.
    expected = written_out(*inputs, l2_wrap, scale=0.3)
    found = run(inputs, backend, torch.float32, l2_wrap=l2_wrap, scale=0.3)
    if num_ids == 1 and l2_wrap == 0.0:  # one id is certain: all is 0
        assert not any(bool(value.any()) for value in found.values())
    else:
        # Logits of size 10 in float32 are off by 1e-6, their exponentials as much in proportion.
        assert worst_error(found, expected) < 3e-6


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("l2_wrap", [0.0, L2_WRAP])
@pytest.mark.parametrize("backend", backends(torch.float64))
def test_equals_the_formulas_in_float64(backend: str, l2_wrap: float) -> None:
    inputs = make_inputs(7, 37)
    inputs = (*inputs[:3], inputs[3].float().double())
    expected = written_out(*inputs, l2_wrap, scale=0.3)
    assert worst_error(run(inputs, backend, torch.float64, l2_wrap=l2_wrap, scale=0.3), expected) < 1e-13


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("l2_wrap", [0.0, L2_WRAP])
@pytest.mark.parametrize("backend", backends(torch.float64))
def test_gradcheck(backend: str, l2_wrap: float) -> None:
    hidden, head, targets, weight = make_inputs(5, 9, channels=3)
    weight[1] = 0.0
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda *x: linear_cross_entropy(*x, targets, weight, l2_wrap=l2_wrap, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_is_torchs_cross_entropy(backend: str) -> None:
    hidden, head, targets, weight = make_inputs(7, 37)
    expected = (F.cross_entropy(hidden @ head.t(), targets, reduction="none") * weight).sum()
    found = linear_cross_entropy(
        *(x.to(DEVICE, torch.float32) for x in (hidden, head)), targets.to(DEVICE), weight.to(DEVICE), backend=backend
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", backends(torch.bfloat16))
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    hidden, head, targets, weight = make_inputs(7, 37)
    # Few digits: half precision holds the logits exactly.
    hidden, head = ((x * 4).round() / 4 for x in (hidden, head))
    hidden[:, 0], head[:, 0] = 1.0, torch.arange(37) / 16
    logits = hidden @ head.t()
    assert torch.equal(logits.to(dtype).double(), logits)
    inputs = (hidden, head, targets, weight.float().double())
    found = run(inputs, backend, dtype, l2_wrap=L2_WRAP)
    expected = written_out(*inputs, L2_WRAP, scale=1.0)
    # The loss is computed in float32 from logits that are exact.
    assert abs(float(found["loss"] / expected["loss"]) - 1.0) < 1e-6
    # The logits' gradient is rounded to half precision (cut off in Triton's interpreter), and the gradients are; each
    # is a sum of terms as large as the largest.
    for name in ("d hidden", "d head"):
        error = (found[name].double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 3 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("backend", [b for b in backends(torch.bfloat16) if b.values[0] != "reference"])
def test_the_heads_gradient_is_summed_in_float32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LOGITS_AT_ONCE", 2)  # a token a piece
    hidden = torch.ones(21, 1, dtype=torch.bfloat16, device=DEVICE)
    head = torch.zeros(2, 1, device=DEVICE, requires_grad=True)
    targets, weight = torch.zeros(21, dtype=torch.int64, device=DEVICE), torch.ones(21, device=DEVICE)
    weight[0] = 512.0
    linear_cross_entropy(hidden, head, targets, weight, backend=backend).backward()
    # Halves of the weights. In bf16 adding 0.5 to 256 changes nothing.
    assert head.grad.flatten().tolist() == [-266.0, 266.0]


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_of_equal_largest_logits_the_first_is_held_back(backend: str) -> None:
    hidden = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    head = torch.tensor([[1.0], [3.0], [3.0], [2.0], [3.0]], device=DEVICE, requires_grad=True)
    arguments = (torch.tensor([3], device=DEVICE), torch.ones(1, device=DEVICE))
    with_penalty = linear_cross_entropy(hidden, head, *arguments, l2_wrap=0.5, backend=backend)
    without = linear_cross_entropy(hidden, head, *arguments, backend=backend)
    difference = torch.autograd.grad(with_penalty - without, head)[0]
    expected = torch.tensor([[0.0], [1.5], [0.0], [0.0], [0.0]])
    torch.testing.assert_close(difference.cpu(), expected, rtol=1e-6, atol=1e-6)


def dtypes_and_backends(dtypes: list[torch.dtype]) -> list:
    """Every dtype with every backend that takes it."""
    return [pytest.param(dtype, *b.values, marks=b.marks) for dtype in dtypes for b in backends(dtype)]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("l2_wrap", [0.0, L2_WRAP])
@pytest.mark.parametrize(("dtype", "backend"), dtypes_and_backends([torch.float32, torch.float64, torch.bfloat16]))
def test_the_terms_beside_the_sum(dtype: torch.dtype, backend: str, l2_wrap: float) -> None:
    """One for each token, of torch's cross entropy in float64; sum and gradients keep their bits."""
    hidden, head, targets, weight = make_inputs(7, 37)
    # Few digits: every dtype holds the logits exactly.
    hidden, head = ((x * 4).round() / 4 for x in (hidden, head))
    hidden[:, 0], head[:, 0] = 1.0, torch.arange(37) / 16
    weight = weight.float().double()
    weight[[0, 4]] = 0.0
    hidden[4] = torch.nan
    inputs = (hidden, head, targets, weight)
    plain = run(inputs, backend, dtype, l2_wrap=l2_wrap)
    logits = hidden @ head.t()
    losses = F.cross_entropy(logits, targets, reduction="none") + 0.5 * l2_wrap * logits.amax(1) ** 2
    expected = torch.where(weight == 0, 0.0, losses * weight)
    hidden, head = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, head))
    fixed = {"targets": targets.to(DEVICE), "loss_weight": weight.to(DEVICE, torch.float32), "l2_wrap": l2_wrap}
    loss, terms = linear_cross_entropy(hidden, head, **fixed, backend=backend, with_token_losses=True)
    gradients = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    found = {"loss": loss.detach(), "d hidden": gradients[0], "d head": gradients[1]}
    assert all(torch.equal(found[name].cpu(), plain[name]) for name in plain)
    assert not terms.requires_grad
    assert (terms.shape, terms.dtype) == ((7,), loss.dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(terms.cpu().double(), expected, rtol=tolerance, atol=0.0)
    with torch.no_grad():
        again, same_terms = linear_cross_entropy(hidden, head, **fixed, backend=backend, with_token_losses=True)
    assert torch.equal(again, loss)
    assert torch.equal(same_terms, terms)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_a_token_of_weight_zero_adds_nothing(backend: str, bad: float) -> None:
    hidden, head, targets, weight = make_inputs(7, 37)
    padding = torch.tensor([False, True, False, True, True, True, False])
    weight[padding] = 0.0
    kept = (hidden[~padding], head, targets[~padding], weight[~padding])
    expected = run(kept, backend, torch.float32, l2_wrap=L2_WRAP)
    hidden[padding] = bad
    targets[padding] = torch.tensor([-100, 37, 2**62, -(2**62)])
    found = run((hidden, head, targets, weight), backend, torch.float32, l2_wrap=L2_WRAP)
    assert not bool(found["d hidden"][padding].any())
    found["d hidden"] = found["d hidden"][~padding]
    assert worst_error(found, expected) < 1e-6


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_weights_of_zero_alone_give_zero(backend: str) -> None:
    hidden, head, targets, weight = make_inputs(3, 5)
    found = run((hidden, head, targets, weight * 0.0), backend, torch.float32, l2_wrap=L2_WRAP)
    assert not any(bool(value.any()) for value in found.values())


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_a_nan_in_a_weighted_token_is_seen(backend: str) -> None:
    hidden, head, targets, weight = make_inputs(3, 5)
    hidden[1, 2] = torch.nan
    found = run((hidden, head, targets, weight), backend, torch.float32)
    assert bool(found["loss"].isnan())
    assert bool(found["d head"].isnan().all())


@pytest.mark.usefixtures("small_pieces")  # the first step of a row holds nothing else
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_ids_whose_logit_is_minus_infinity(backend: str) -> None:
    hidden, head, targets, weight = make_inputs(3, 40)
    hidden[:, 0] = 1.0
    masked = head.clone()
    masked[:20, 0] = -torch.inf
    targets = 20 + targets % 20
    loss = linear_cross_entropy(
        *(x.to(DEVICE, torch.float32) for x in (hidden, masked)), targets.to(DEVICE), weight.to(DEVICE), backend=backend
    )
    expected = written_out(hidden, head[20:], targets - 20, weight, 0.0, scale=1.0)["loss"]
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_large_logits(backend: str) -> None:
    hidden, head, targets, weight = make_inputs(3, 37)
    inputs = (hidden.float().double() * 100, head.float().double(), targets, weight.float().double())
    expected = written_out(*inputs, 0.0, scale=1.0)
    # Logits of several hundred are off by 3e-5 in float32.
    assert worst_error(run(inputs, backend, torch.float32), expected) < 1e-4


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_one_gradient_alone_or_none(backend: str) -> None:
    inputs = make_inputs(7, 37)
    expected = run(inputs, backend, torch.float32, l2_wrap=L2_WRAP)
    hidden, head = (x.to(DEVICE, torch.float32) for x in inputs[:2])
    rest = {"targets": inputs[2].to(DEVICE), "loss_weight": inputs[3].to(DEVICE, torch.float32), "l2_wrap": L2_WRAP}
    for name, wanted in (("d hidden", hidden), ("d head", head)):
        wanted.requires_grad_()
        loss = linear_cross_entropy(hidden, head, **rest, backend=backend)
        assert torch.equal(torch.autograd.grad(loss, wanted)[0].cpu(), expected[name])
        with torch.no_grad():
            without = linear_cross_entropy(hidden, head, **rest, backend=backend)
        assert not without.requires_grad
        assert torch.equal(without.cpu(), expected["loss"])
        wanted.requires_grad_(False)
    assert not linear_cross_entropy(hidden, head, **rest, backend=backend).requires_grad


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_where_no_gradient_is_needed_none_is_computed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("computes gradients")

    monkeypatch.setattr(op.ChunkedLoss, "forward", refuse)
    hidden, head, targets, weight = (x.to(DEVICE) for x in make_inputs(3, 5))
    hidden, head = hidden.float(), head.float()
    linear_cross_entropy(hidden, head, targets, weight, backend=backend)
    with torch.no_grad():
        linear_cross_entropy(hidden.requires_grad_(), head, targets, weight, backend=backend)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_strided_inputs_autocast_and_a_graph_that_is_kept(backend: str) -> None:
    inputs = make_inputs(7, 37)
    expected = run(inputs, backend, torch.float32, l2_wrap=L2_WRAP)
    hidden, head = (x.to(DEVICE, torch.float32).mT.contiguous().mT.requires_grad_() for x in inputs[:2])
    targets = inputs[2].to(DEVICE)[:, None].repeat(1, 2)[:, 0]
    weight = inputs[3].to(DEVICE, torch.float32)[:, None].repeat(1, 2)[:, 0]
    leaves = (hidden, head, targets, weight)
    assert not any(x.is_contiguous() for x in leaves)
    before = [x.detach().clone() for x in leaves]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(*leaves, l2_wrap=L2_WRAP, backend=backend)
    for _ in range(2):
        gradients = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
        found = {"loss": loss.detach().cpu(), "d hidden": gradients[0].cpu(), "d head": gradients[1].cpu()}
        # Another order of sums in the product of strided factors.
        assert worst_error(found, expected) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("backend", backends(torch.bfloat16))
def test_a_head_in_float32_keeps_its_gradient_in_float32(backend: str) -> None:
    hidden, head, targets, weight = (x.to(DEVICE) for x in make_inputs(7, 37))
    hidden, head = hidden.bfloat16().requires_grad_(), head.float().requires_grad_()
    loss = linear_cross_entropy(hidden, head, targets, weight, backend=backend)
    rounded = linear_cross_entropy(hidden, head.bfloat16(), targets, weight, backend=backend)
    assert torch.equal(loss, rounded)
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("backend", [b for b in backends(torch.float32) if b.values[0] != "reference"])
def test_the_logits_of_one_piece_at_a_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == 101 and not result._is_view():
                sizes.append(result.shape[0])
            return result

    monkeypatch.setattr(op, "LOGITS_AT_ONCE", 350)
    hidden, head, targets, weight = (x.to(DEVICE) for x in make_inputs(10, 101))
    with Watch():
        linear_cross_entropy(hidden.float().requires_grad_(), head.float(), targets, weight, backend=backend)
    assert sizes
    assert max(sizes) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_an_id_that_does_not_exist_is_seen_on_a_gpu(backend: str) -> None:
    hidden, head, targets, weight = make_inputs(3, 5)
    targets[1] = 5
    found = run((hidden, head, targets, weight), backend, torch.float32)
    assert bool(found["loss"].isnan())


@pytest.mark.parametrize("wrong", [-1, 5, 2**62])
def test_the_row_passes_read_no_id_that_does_not_exist(wrong: int) -> None:
    from infctx_kernels.cross_entropy.chunked import torch_row_pass

    row_passes = [torch_row_pass]
    if RUNS_ON["cpp"](DEVICE, (torch.float32,)) is None:
        from infctx_kernels.cross_entropy.cpp_op import cpp_row_pass

        row_passes.append(cpp_row_pass)
    if RUNS_ON["triton"](DEVICE, (torch.float32,)) is None:
        from infctx_kernels.cross_entropy.triton_op import triton_row_pass

        row_passes.append(triton_row_pass)
    for row_pass in row_passes:
        targets = torch.tensor([1, wrong, wrong], device=DEVICE)
        weight = torch.tensor([1.0, 1.0, 0.0], device=DEVICE)
        losses, gradient = row_pass(torch.ones(3, 5, device=DEVICE), targets, weight, 0.1, True)
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == [False, True, False]
        assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.usefixtures("_as_users_run_it")
def test_wrong_arguments_say_what_was_expected() -> None:
    hidden, head, targets, weight = make_inputs(4, 9)
    good = {"hidden": hidden, "head_weight": head, "targets": targets, "loss_weight": weight}
    wrong_targets = targets.clone()
    wrong_targets[2] = 9
    cases = [
        ({"hidden": hidden[:0]}, r"hidden: expected \[T, C\], none of them 0, got \[0, 6\]"),
        ({"hidden": hidden.int()}, "hidden: expected a dtype of"),
        ({"head_weight": head[:, :5]}, r"head_weight: expected shape \[9, 6\], got \[9, 5\]"),
        ({"head_weight": head[0]}, r"head_weight: expected \[V, C\] with V >= 1, got \[6\]"),
        ({"targets": targets[:3]}, r"targets: expected shape \[4\], got \[3\]"),
        ({"targets": targets.int()}, "targets: expected int64, got torch.int32"),
        ({"targets": wrong_targets}, "targets: expected ids from 0 to 8 where loss_weight is not 0, got 9 at token 2"),
        ({"loss_weight": weight.long()}, "loss_weight: expected a dtype of"),
        ({"loss_weight": weight.clone().requires_grad_()}, "loss_weight: expected a tensor without gradient"),
        ({"loss_weight": weight.to("meta")}, "loss_weight: expected device cpu as hidden, got meta"),
        ({"l2_wrap": -1.0}, r"l2_wrap: expected a finite number >= 0, got -1\.0"),
        ({"l2_wrap": float("inf")}, "l2_wrap: expected a finite number >= 0, got inf"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**(good | change))
    with pytest.raises(BackendError, match="'warp' does not exist"):
        linear_cross_entropy(**good, backend="warp")
    with pytest.raises(BackendError, match="'triton' cannot run on cpu: it computes in float32"):
        linear_cross_entropy(**good, backend="triton")
