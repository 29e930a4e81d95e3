"""The C++ backend: against float64, for every head size, length and kind of decay; and how it is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infctx_kernels import BackendError, choose_backend, wkv6, wkv6_from_raw_decay

CPU = torch.device("cpu")
# "never forgets" to "forgets everything", and mixed in one channel, so that some channels decay inside a sweep's loop.
RAW_RANGES = [(-6.0, 1.0), (-20.0, -10.0), (1.0, 3.0), (-8.0, 8.5), (3.0, 8.0)]
NAMES = ("receptance", "key", "value", "decay", "bonus", "state", "start_state")


def make_inputs(num_tokens: int, raw_range: tuple[float, float], *, rows=2, heads=2, size=64, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low, high = raw_range
    sequence = (rows, num_tokens, heads, size)
    receptance, key, value = (torch.randn(sequence, generator=generator) for _ in range(3))
    raw = torch.rand(sequence, generator=generator) * (high - low) + low
    bonus = torch.randn(heads, size, generator=generator)
    state = torch.randn(rows, heads, size, size, generator=generator)
    return [receptance, key, value, raw, bonus, state, torch.randn(heads, size, size, generator=generator)]


def make_starts(num_tokens: int) -> Tensor:
    """At the first token, in the middle of a block, next to each other, and in one row only at a block's border."""
    starts = torch.zeros(2, num_tokens, dtype=torch.bool)
    starts[0, ::7] = True
    starts[0, 3:5] = True
    starts[1, 16::32] = True
    return starts


def run(inputs: list[Tensor], starts: Tensor | None, backend: str, *, raw: bool = True) -> dict[str, Tensor]:
    """Both results, and the gradient of a fixed functional of both with respect to every input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    operator = wkv6_from_raw_decay if raw else wkv6
    out, state = operator(*leaves[:6], starts=starts, start_state=leaves[6], backend=backend)
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, state)]
    gradients = torch.autograd.grad((out, state), leaves, seeds, allow_unused=True)
    results = {"out": out.detach(), "new_state": state.detach()}
    for name, gradient, leaf in zip(NAMES, gradients, leaves, strict=True):
        results[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def worst_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Largest error relative to the largest expected value: of all but the decay's gradient, and of that."""
    relative = {}
    for name, tensor in expected.items():
        # max() would pass over a NaN.
        difference = (found[name].double() - tensor).abs().nan_to_num(nan=torch.inf)
        relative[name] = float(difference.max() / tensor.abs().max().clamp(min=1e-6))
    decay = relative.pop("d decay")
    return max(relative.values()), decay


def double(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in inputs]


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("raw_range", RAW_RANGES)
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 33, 67])
def test_float32_is_within_5e_6_of_float64(num_tokens: int, raw_range: tuple[float, float], with_starts: bool) -> None:
    inputs = make_inputs(num_tokens, raw_range)
    starts = make_starts(num_tokens) if with_starts else None
    expected = run(double(inputs), starts, "torch")
    found = run(inputs, starts, "cpp")
    others, decay = worst_errors(found, expected)
    assert others < 5e-6
    if raw_range == (3.0, 8.0):
        # All of it is e^-17 and less of what it is a difference of: judged beside the other gradients, not by itself.
        assert float((found["d decay"] - expected["d decay"]).abs().max()) < 1e-4
    else:
        assert decay < (5e-6 if raw_range[1] <= 1.0 and raw_range[0] < 1.0 else 1e-4)


@pytest.mark.parametrize("size", [1, 8, 16, 24, 32, 64, 80, 128])
def test_any_head_size(size: int) -> None:
    inputs = make_inputs(35, (-6.0, 3.0), size=size)
    starts = make_starts(35)
    others, decay = worst_errors(run(inputs, starts, "cpp"), run(double(inputs), starts, "torch"))
    assert others < 5e-6
    assert decay < 1e-4


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    # With more threads than heads, a head's columns are divided among them.
    inputs = make_inputs(70, (-6.0, 3.0), heads=1)
    starts = make_starts(70)
    alone = run(inputs, starts, "cpp")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shared = run(inputs, starts, "cpp")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.parametrize("decay_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, decay_dtype: torch.dtype) -> None:
    inputs = make_inputs(50, (-6.0, 1.0))
    inputs = [x.to(dtype) for x in inputs[:3]] + [inputs[3].to(decay_dtype)] + inputs[4:]
    starts = make_starts(50)
    found = run(inputs, starts, "cpp")
    assert [found[f"d {name}"].dtype for name in NAMES] == [x.dtype for x in inputs]
    # The seed of the output is rounded to its dtype; expected has the same.
    leaves = [x.double().requires_grad_() for x in inputs]
    out, state = wkv6_from_raw_decay(*leaves[:6], starts=starts, start_state=leaves[6], backend="torch")
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(out.shape, generator=generator).to(dtype).double()]
    seeds.append(torch.randn(state.shape, generator=generator).double())
    gradients = torch.autograd.grad((out, state), leaves, seeds)
    expected = {"out": out.detach(), "new_state": state.detach()}
    expected |= {f"d {name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)}
    for name, tensor in found.items():
        # Half a unit in the last place of the dtype it is returned in, beside float32's own error.
        rounding = torch.finfo(tensor.dtype).eps / 2 if tensor.dtype != torch.float32 else 0.0
        allowed = expected[name].abs() * rounding + 5e-6 * expected[name].abs().max()
        assert bool(((tensor.double() - expected[name]).abs() <= allowed).all()), name


def test_the_log_decay_itself() -> None:
    inputs = make_inputs(40, (-6.0, 1.0))
    inputs[3] = -inputs[3].exp()
    others, decay = worst_errors(run(inputs, None, "cpp", raw=False), run(double(inputs), None, "torch", raw=False))
    assert max(others, decay) < 5e-6


def test_long_rows_and_slow_decay() -> None:
    inputs = make_inputs(3000, (-9.0, -5.0), rows=1, heads=1)
    others, decay = worst_errors(run(inputs, None, "cpp"), run(double(inputs), None, "torch"))
    assert max(others, decay) < 5e-6


def test_tensors_that_are_not_contiguous() -> None:
    inputs = make_inputs(40, (-6.0, 1.0))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    turned[3] = inputs[3][:1, :1].expand(2, 40, -1, -1)
    turned += [inputs[4].t().contiguous().t(), inputs[5].transpose(2, 3).contiguous().transpose(2, 3), inputs[6]]
    starts = make_starts(40).t().contiguous().t()
    others, decay = worst_errors(run(turned, starts, "cpp"), run(double(turned), starts, "torch"))
    assert max(others, decay) < 5e-6
    # An expanded decay gathers its gradient through autograd's own expand.
    base = inputs[3][:1, :1].clone().requires_grad_()
    out, _ = wkv6_from_raw_decay(*inputs[:3], base.expand(2, 40, -1, -1), *inputs[4:6], backend="cpp")
    out.sum().backward()
    assert base.grad is not None
    assert base.grad.shape == base.shape


def test_an_infinite_state_stays_in_its_document() -> None:
    inputs = make_inputs(40, (-6.0, 1.0), rows=1)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 21] = True
    clean, _ = wkv6_from_raw_decay(*inputs[:6], starts=starts, backend="cpp")
    inputs[5] = torch.full_like(inputs[5], torch.inf)
    out, state = wkv6_from_raw_decay(*inputs[:6], starts=starts, backend="cpp")
    assert torch.equal(out[:, 21:], clean[:, 21:])
    assert bool(state.isfinite().all())
    assert not bool(out[:, :16].isfinite().any())


def test_flushing_to_zero_stays_inside() -> None:
    tiny = torch.tensor([1e-40])
    wkv6_from_raw_decay(*make_inputs(20, (-6.0, 1.0))[:6], backend="cpp")
    assert float(tiny * 0.5) > 0.0


def test_results_without_a_gradient_of_their_own() -> None:
    inputs = make_inputs(20, (-6.0, 1.0))
    for index in (0, 1):
        gradients = []
        for backend in ("cpp", "torch"):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            results = wkv6_from_raw_decay(*leaves[:6], start_state=leaves[6], backend=backend)
            results[index].sum().backward()
            gradients.append([leaf.grad for leaf in leaves[1:4]])
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(3, (-6.0, 1.0), size=8)[:6]]
    out, _ = wkv6_from_raw_decay(*leaves, backend="cpp")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_float64_goes_to_another_backend() -> None:
    inputs = double(make_inputs(3, (-6.0, 1.0), size=8))
    with pytest.raises(BackendError, match=r"float32, the inputs are float64\. Usable here: torch, reference"):
        wkv6_from_raw_decay(*inputs[:6], backend="cpp")
    out, _ = wkv6_from_raw_decay(*inputs[:6])
    assert out.dtype == torch.float64
    with pytest.raises(BackendError, match="CPUs only"):
        choose_backend("cpp", device=torch.device("meta"), head_size=64)


PROGRAM = """
import logging, sys, torch
logging.basicConfig(stream=sys.stderr)
from infctx_kernels import choose_backend
from infctx_kernels.cpu import library
print(choose_backend(None, device=torch.device("cpu"), head_size=64), library.why_not())
"""


def start(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A fresh process with a cache of its own; PATH may be replaced."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=-1, stderr=-1, text=True)


def test_several_processes_build_once(tmp_path: Path) -> None:
    counting = tmp_path / "bin" / "g++"
    counting.parent.mkdir()
    builds = tmp_path / "builds"
    counting.write_text(f'#!/bin/sh\necho "$*" >> {builds}\nexec {shutil.which("g++")} "$@"\n')
    counting.chmod(0o755)
    path = f"{counting.parent}:{os.environ['PATH']}"
    processes = [start(tmp_path, PATH=path) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["cpp None\n"] * 3
    assert builds.read_text().count("-shared") == 1
    (built,) = (tmp_path / "infctx_kernels").glob("*/kernels.so")
    assert sorted(path.name for path in built.parent.iterdir()) == ["kernels.so", "lock"]
    before = built.stat().st_mtime_ns
    # A file that cannot be loaded is built again; one that can is not.
    built.unlink()
    built.write_bytes(b"not a library")
    out, err = start(tmp_path, PATH=path).communicate()
    assert out == "cpp None\n"
    assert "building it again" in err
    again = built.stat().st_mtime_ns
    assert again > before
    assert start(tmp_path, PATH=path).communicate()[0] == "cpp None\n"
    assert built.stat().st_mtime_ns == again


def test_without_a_compiler_torch_runs_and_says_what_one_would_gain(tmp_path: Path) -> None:
    out, err = start(tmp_path, PATH="").communicate()
    assert out.startswith("torch no C++ compiler found")
    assert err.count("sudo apt-get install g++") == 1


def test_a_compiler_that_fails_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "g++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'internal error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    out, err = start(tmp_path, PATH=str(broken.parent)).communicate()
    assert out.startswith(f"torch {broken} could not build the kernels: internal error: out of luck")
    assert "out of luck" in err


def test_a_cache_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    shared = tmp_path / "infctx_kernels"
    shared.mkdir()
    shared.chmod(0o777)
    private = tmp_path / "private"
    private.mkdir()
    assert start(tmp_path, TMPDIR=str(private)).communicate()[0] == "cpp None\n"
    assert not list(shared.iterdir())
    assert list(private.glob("infctx_kernels-*/*/kernels.so"))


@pytest.mark.parametrize("raw_range", [(-6.0, 1.0), (1.0, 3.0)])
def test_the_decays_gradient_does_not_lose_digits_with_length(raw_range: tuple[float, float]) -> None:
    inputs = make_inputs(2000, raw_range, rows=1, heads=1, size=32)
    others, decay = worst_errors(run(inputs, None, "cpp"), run(double(inputs), None, "torch"))
    assert others < 5e-6
    assert decay < (5e-6 if raw_range[1] <= 1.0 else 1e-4)


def test_any_nan_stays_one_in_bf16() -> None:
    # One that rounding to the nearest bf16 would carry into the sign.
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    inputs = [x.bfloat16() for x in make_inputs(5, (-6.0, 1.0), rows=1, heads=1, size=16)[:3]]
    raw, bonus, state = make_inputs(5, (-6.0, 1.0), rows=1, heads=1, size=16)[3:6]
    state[0, 0, 2, 3] = nan
    out, _ = wkv6_from_raw_decay(*inputs, raw, bonus, state, backend="cpp")
    assert out[0, :, 0, 3].isnan().all()
    assert out[0, :, 0, :3].isfinite().all()
