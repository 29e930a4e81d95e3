"""WKV6: every backend against float64 recurrences, in outputs, all gradients and the carried state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infctx_kernels import Backend, BackendError, choose_backend, dispatch, wkv6, wkv6_from_raw_decay

# Triton has tests of its own: its interpreter is slow, and wants heads of 16 and more.
BACKENDS = [str(backend) for backend in Backend if backend is not Backend.TRITON]
# A backend that computes in float32 whatever it is given, and how far from float64 it may be.
IN_FLOAT32 = {"cpp": 1e-5}
FLOAT64_BACKENDS = [name for name in BACKENDS if name not in IN_FLOAT32]
# From "never forgets" to "forgets everything at once", and mixed in one channel.
RAW_RANGES = [(-6.0, 1.0), (-20.0, -10.0), (1.0, 3.0), (-8.0, 8.0), (3.0, 8.0)]
LENGTHS = [1, 2, 15, 32, 33, 65]
# Where every channel forgets almost everything at a token, this gradient is next to nothing, and judged by itself.
VANISHING = (3.0, 8.0)
INPUT_NAMES = ("receptance", "key", "value", "raw_decay", "bonus", "state", "start_state")


def make_inputs(num_tokens: int, raw_range: tuple[float, float], *, rows=2, heads=2, size=8, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low, high = raw_range

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sequence = (rows, num_tokens, heads, size)
    raw = torch.rand(sequence, generator=generator, dtype=torch.float64) * (high - low) + low
    state, start_state = normal(rows, heads, size, size), normal(heads, size, size)
    return [normal(*sequence), normal(*sequence), normal(*sequence), raw, normal(heads, size), state, start_state]


def make_starts(rows: int, num_tokens: int) -> Tensor:
    """Documents that start at a row's first token, mid-block, at a block's border and next to each other."""
    starts = torch.zeros(rows, num_tokens, dtype=torch.bool)
    starts[0, ::7] = True
    starts[-1, num_tokens // 2 :: 16] = True
    if rows > 1 and num_tokens > 3:
        starts[-1, 2:4] = True
    return starts


def run(inputs: list[Tensor], starts: Tensor | None, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, and the gradient of a fixed functional of both of them with respect to every input."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    out, state = wkv6_from_raw_decay(*leaves[:6], starts=starts, start_state=leaves[6], backend=backend)
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in (out, state)]
    gradients = torch.autograd.grad((out, state), leaves, seeds, allow_unused=True)
    results = {"out": out.detach(), "new_state": state.detach()}
    for name, gradient, leaf in zip(INPUT_NAMES, gradients, leaves, strict=True):
        results[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each, relative to the largest expected value; NaN is infinite, for max() passes over it."""
    relative = {}
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor).abs().nan_to_num(nan=torch.inf)
        relative[name] = float(difference.max() / tensor.abs().max().clamp(min=1e-6))
    return relative


def hand_written(inputs: list[Tensor], seed_out: Tensor, seed_state: Tensor) -> dict[str, Tensor]:
    """The recurrence and its gradient written out token by token, without autograd (no documents' starts)."""
    r, k, v, raw, u, first_state, _ = inputs
    w = torch.exp(-torch.exp(raw))
    states, outs = [first_state], []
    for t in range(r.shape[1]):
        kv = torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        outs.append(torch.einsum("bhi,bhij->bhj", r[:, t], states[-1] + u[None, :, :, None] * kv))
        states.append(w[:, t, :, :, None] * states[-1] + kv)
    z = seed_state.clone()
    dr, dk, dv, dw = (torch.zeros_like(r) for _ in range(4))
    du = torch.zeros_like(u)
    for t in reversed(range(r.shape[1])):
        g, s, ru = seed_out[:, t], states[t], r[:, t] * u
        dr[:, t] = torch.einsum("bhj,bhij->bhi", g, s) + u * k[:, t] * (g * v[:, t]).sum(-1, keepdim=True)
        dk[:, t] = torch.einsum("bhij,bhj->bhi", z, v[:, t]) + ru * (g * v[:, t]).sum(-1, keepdim=True)
        dv[:, t] = torch.einsum("bhij,bhi->bhj", z, k[:, t]) + g * (ru * k[:, t]).sum(-1, keepdim=True)
        du += (r[:, t] * k[:, t] * (g * v[:, t]).sum(-1, keepdim=True)).sum(0)
        dw[:, t] = (z * s).sum(-1)
        z = w[:, t, :, :, None] * z + torch.einsum("bhi,bhj->bhij", r[:, t], g)
    return {
        "out": torch.stack(outs, 1),
        "new_state": states[-1],
        "d receptance": dr,
        "d key": dk,
        "d value": dv,
        "d raw_decay": dw * w * -torch.exp(raw),
        "d bonus": du,
        "d state": z,
    }


def precision_of(backend: str) -> tuple[torch.dtype, float]:
    """The widest dtype it computes in, and the largest error relative to the largest value."""
    return (torch.float32, IN_FLOAT32[backend]) if backend in IN_FLOAT32 else (torch.float64, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_equals_the_hand_written_gradient(backend: str, num_tokens: int) -> None:
    inputs = make_inputs(num_tokens, (-6.0, 2.0))
    generator = torch.Generator().manual_seed(9)
    shapes = (inputs[0].shape, inputs[5].shape)
    seeds = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = hand_written(inputs, *seeds)
    dtype, bound = precision_of(backend)
    assert max(errors(run(inputs, None, backend, dtype), expected).values()) < bound


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 5, 34])
def test_gradcheck(backend: str, num_tokens: int) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(num_tokens, (-3.0, 1.0), rows=2, heads=1, size=2)]
    starts = make_starts(2, num_tokens)
    starts[1] &= torch.arange(num_tokens) > 0  # row 1 reads the state it is given, row 0 discards it

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return wkv6_from_raw_decay(*leaves[:6], starts=starts, start_state=leaves[6], backend=backend)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=num_tokens > 5)


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("raw_range", RAW_RANGES)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_torch_backend_equals_the_reference(num_tokens: int, raw_range: tuple[float, float], with_starts: bool) -> None:
    inputs = make_inputs(num_tokens, raw_range)
    starts = make_starts(2, num_tokens) if with_starts else None
    expected = run(inputs, starts, "reference", torch.float64)
    in_fp64 = errors(run(inputs, starts, "torch", torch.float64), expected)
    assert max(in_fp64.values()) < 1e-11, in_fp64
    # Rounding the inputs to float32 is a part of it: a raw decay of 8 has log decay 3000 ± 2e-4.
    in_fp32 = errors(run(inputs, starts, "torch", torch.float32), expected)
    assert max(in_fp32.values()) < 1e-5, in_fp32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [-100.0, -20.0, 8.0, 30.0, 100.0])
def test_extreme_decays_give_finite_gradients(backend: str, raw: float) -> None:
    inputs = make_inputs(35, (raw, raw))
    results = run(inputs, make_starts(2, 35), backend, torch.float32)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_log_decay_of_minus_infinity_forgets(backend: str) -> None:
    receptance, key, value, _, bonus, state, _ = (x.float() for x in make_inputs(34, (0.0, 0.0)))
    forget = torch.full_like(key, -torch.inf).requires_grad_()
    out, new_state = wkv6(receptance, key, value, forget, bonus, state, backend=backend)
    # y_t reads only k_{t-1} v_{t-1} and its own; the state before the first token is read once.
    expected = key[:, -1, :, :, None] * value[:, -1, :, None, :]
    torch.testing.assert_close(new_state, expected)
    (out.sum() + new_state.sum()).backward()
    assert bool(torch.isfinite(forget.grad).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [1, 31, 32, 40])
def test_any_split_equals_one_piece(backend: str, split: int) -> None:
    inputs = make_inputs(45, (-6.0, 2.0))
    starts = make_starts(2, 45)
    dtype, bound = precision_of(backend)
    inputs = [tensor.to(dtype) for tensor in inputs]
    whole = run(inputs, starts, backend, dtype)

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    state, outs = leaves[5], []
    for place in (slice(0, split), slice(split, None)):
        part = [leaf[:, place] for leaf in leaves[:4]]
        out, state = wkv6_from_raw_decay(
            *part, leaves[4], state, starts=starts[:, place], start_state=leaves[6], backend=backend
        )
        outs.append(out)
    out = torch.cat(outs, 1)
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in (out, state)]
    gradients = torch.autograd.grad((out, state), leaves, seeds)
    found = {"out": out.detach(), "new_state": state.detach()}
    found |= {f"d {name}": gradient for name, gradient in zip(INPUT_NAMES, gradients, strict=True)}
    assert max(errors(found, whole).values()) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_separate_ones(backend: str) -> None:
    lengths = [1, 30, 3, 40]
    dtype, bound = precision_of(backend)
    inputs = [tensor.to(dtype) for tensor in make_inputs(sum(lengths), (-6.0, 2.0), rows=1)]
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [0, 1, 31, 34]] = True
    *sequence, bonus, state, start_state = inputs
    packed, packed_state = wkv6_from_raw_decay(
        *sequence, bonus, state, starts=starts, start_state=start_state, backend=backend
    )
    outs, first = [], 0
    for length in lengths:
        part = [x[:, first : first + length] for x in sequence]
        out, last_state = wkv6_from_raw_decay(*part, bonus, start_state[None], backend=backend)
        outs.append(out)
        first += length
    torch.testing.assert_close(packed, torch.cat(outs, 1), rtol=bound, atol=bound)
    torch.testing.assert_close(packed_state, last_state, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_at_the_first_token_discards_any_state(backend: str) -> None:
    *sequence, bonus, state, start_state = make_inputs(40, (-6.0, 1.0))
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, 0] = True
    expected = run([*sequence, bonus, state, start_state], starts, "reference", torch.float64)
    broken = state.clone()
    broken[0] = torch.inf
    dtype, bound = precision_of(backend)
    found = run([*sequence, bonus, broken, start_state], starts, backend, dtype)
    assert max(errors(found, expected).values()) < bound
    assert not bool(found["d state"][0].any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_a_float32_state(backend: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in make_inputs(40, (-6.0, 1.0))[:5]]
    leaves = [x.requires_grad_() for x in inputs]
    state = torch.randn(2, 2, 8, 8, requires_grad=True)
    out, new_state = wkv6_from_raw_decay(*leaves, state, backend=backend)
    assert out.dtype == dtype
    assert new_state.dtype == torch.float32
    gradients = torch.autograd.grad((out.float().sum() + new_state.sum()), [*leaves, state])
    assert [g.dtype for g in gradients] == [dtype] * 5 + [torch.float32]
    # The state is not rounded on the way: computed from the same rounded inputs in float64 it is the same.
    exact = [x.detach().double() for x in leaves]
    _, exact_state = wkv6_from_raw_decay(*exact, state.detach().double(), backend="reference")
    torch.testing.assert_close(new_state.detach().double(), exact_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_recurrence(backend: str) -> None:
    inputs = [x.float() for x in make_inputs(40, (-6.0, 1.0))[:6]]
    plain = wkv6_from_raw_decay(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = wkv6_from_raw_decay(*inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_given_state_is_not_changed(backend: str) -> None:
    inputs = [x.float() for x in make_inputs(40, (-6.0, 1.0))]
    before = inputs[5].clone()
    _, new_state = wkv6_from_raw_decay(*inputs[:6], backend=backend)
    assert torch.equal(inputs[5], before)
    assert new_state.data_ptr() != inputs[5].data_ptr()


@pytest.mark.usefixtures("_as_users_run_it")
def test_wrong_arguments_say_what_was_expected() -> None:
    receptance, key, value, raw, bonus, state, start = (x.float() for x in make_inputs(5, (-6.0, 1.0)))
    good = {"receptance": receptance, "key": key, "value": value, "log_decay": -raw.exp(), "bonus": bonus}
    cases = [
        ({"receptance": receptance[:, :0]}, "T >= 1"),
        ({"key": key[:, :4]}, "key: expected shape"),
        ({"value": value.double()}, "one dtype"),
        ({"bonus": bonus[:1]}, "bonus: expected shape"),
        ({"log_decay": raw.int()}, "log_decay: expected a float dtype"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            wkv6(**(good | change), state=state)
    with pytest.raises(ValueError, match=r"state: expected torch\.float32"):
        wkv6(**good, state=state.double())
    with pytest.raises(ValueError, match="starts: expected bool"):
        wkv6(**good, state=state, starts=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="start_state: expected shape"):
        wkv6(**good, state=state, start_state=start[:1])
    with pytest.raises(BackendError, match=r"'warp' does not exist. Usable on cpu: (triton, )?cpp, torch, reference"):
        wkv6(**good, state=state, backend="warp")


def test_the_default_backend_is_the_fastest_that_can_run() -> None:
    assert choose_backend(None, device=torch.device("cpu"), head_size=64) == Backend.CPP
    assert choose_backend(None, device=torch.device("cpu"), head_size=64, dtype=torch.float64) == Backend.TORCH
    assert choose_backend(None, device=torch.device("meta"), head_size=64) == Backend.TORCH
    assert choose_backend("reference", device=torch.device("cpu"), head_size=64) == Backend.REFERENCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [0.5, float("nan")])
def test_a_log_decay_that_is_none_is_refused(backend: str, bad: float) -> None:
    receptance, key, value, _, bonus, state, _ = (x.float() for x in make_inputs(5, (0.0, 0.0)))
    log_decay = torch.full_like(key, -1.0)
    log_decay[0, 3, 1, 2] = bad
    with pytest.raises(ValueError, match=f"log_decay: expected values <= 0, got {str(bad).replace('nan', 'NaN')}"):
        wkv6(receptance, key, value, log_decay, bonus, state, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_raw_decay_of_nan_is_seen_in_the_results(backend: str) -> None:
    inputs = [x.float() for x in make_inputs(5, (0.0, 1.0))]
    inputs[3][0, 2, 1, 3] = torch.nan
    out, state = wkv6_from_raw_decay(*inputs[:6], backend=backend)
    assert bool(out[0, 3:, 1].isnan().all())
    assert bool(state[0, 1, 3].isnan().all())
    assert bool(out[1].isfinite().all())


def test_triton_is_there_for_whoever_asks() -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    # Interpreted where there is no GPU, as tests/conftest.py has it.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = [x.float().to(device) for x in make_inputs(20, (-6.0, 1.0), size=16)[:6]]
    found = wkv6_from_raw_decay(*inputs, backend="triton")
    expected = wkv6_from_raw_decay(*(x.double() for x in inputs), backend="reference")
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(BackendError, match="heads of 16, 32, 64, 128 channels, these have 8"):
        wkv6_from_raw_decay(*(x.float() for x in make_inputs(3, (-6.0, 1.0))[:6]), backend="triton")
    with pytest.raises(BackendError, match="float32, the inputs are float64"):
        wkv6_from_raw_decay(*(x.double() for x in inputs), backend="triton")


def test_triton_is_not_chosen_on_a_cpu() -> None:
    # Its interpreter is on here, and a thousand times slower than anything else.
    assert choose_backend(None, device=torch.device("cpu"), head_size=64) != Backend.TRITON


def test_a_backend_asked_for_does_not_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is asked for at every call of a run, and looking at Triton imports it.
    def looked(*_: object) -> None:
        raise AssertionError("looked at Triton")

    monkeypatch.setitem(dispatch.RUNS_ON, Backend.TRITON, looked)
    device = torch.device("cpu")
    assert choose_backend("torch", device=device, head_size=64) == Backend.TORCH
    assert choose_backend(None, device=device, head_size=64) == Backend.CPP
