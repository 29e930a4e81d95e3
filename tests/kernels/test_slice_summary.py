"""Summaries of slices against the recurrence over the whole, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infctx_kernels import wkv6_from_raw_decay
from infctx_kernels.wkv6.cpp import why_not
from infctx_kernels.wkv6.slice_summary import carry, summarise_reads, summarise_writes

ROWS, HEADS, SIZE = 2, 2, 4
# From "never forgets" to "forgets everything at once"; above 20 the decay is 0 in float64 too,
# and above 709 its logarithm is infinite.
BY_TOKEN = ("receptance", "key", "value", "raw_decay", "gradient")
RAW_RANGES = [(-6.0, 1.0), (-12.0, 8.0), (15.0, 1000.0)]
# The compiled one computes in float32.
TOLERANCE = {"torch": (torch.float64, 1e-11), "cpp": (torch.float32, 1e-5)}
CUTS = {1: [1], 37: [1, 1, 9, 20, 6], 130: [64, 66]}
STARTS = {
    "none": [[], []],
    "some": [[0, 2, 3, 11, 29], [30]],
    "every token": [list(range(130)), [9, 10]],
}


def make_inputs(num_tokens: int, raw_range: tuple[float, float]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    low, high = raw_range

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    by_token = (ROWS, num_tokens, HEADS, SIZE)
    raw = torch.rand(by_token, generator=generator, dtype=torch.float64) * (high - low) + low
    inputs = {name: normal(*by_token) for name in ("receptance", "key", "value", "gradient")}
    matrices = {"state": normal(ROWS, HEADS, SIZE, SIZE), "start_state": normal(HEADS, SIZE, SIZE)}
    return inputs | {"raw_decay": raw} | matrices


def make_starts(name: str, num_tokens: int) -> Tensor | None:
    starts = torch.zeros(ROWS, num_tokens, dtype=torch.bool)
    for row, places in enumerate(STARTS[name]):
        starts[row, [place for place in places if place < num_tokens]] = True
    return starts if starts.any() else None


def skip_without(backend: str) -> None:
    reason = why_not(torch.device("cpu"), SIZE, torch.float32) if backend == "cpp" else None
    if reason is not None:
        pytest.skip(reason)


def in_slices(tensor: Tensor | None, num_tokens: int) -> list[Tensor | None]:
    lengths = CUTS[num_tokens]
    return [None] * len(lengths) if tensor is None else list(tensor.split(lengths, dim=1))


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("raw_range", RAW_RANGES)
@pytest.mark.parametrize("start_name", STARTS)
@pytest.mark.parametrize("has_start_state", [False, True])
@pytest.mark.parametrize("num_tokens", CUTS)
def test_states_and_gradients_past_slices_are_those_of_the_whole(
    num_tokens: int, has_start_state: bool, start_name: str, raw_range: tuple[float, float], backend: str
) -> None:
    skip_without(backend)
    dtype, tolerance = TOLERANCE[backend]
    # Rounding the inputs is no part of it: a raw decay of 8 has log decay 3000 ± 2e-4.
    inputs = {name: tensor.to(dtype).double() for name, tensor in make_inputs(num_tokens, raw_range).items()}
    starts = make_starts(start_name, num_tokens)
    start_state = inputs["start_state"] if has_start_state else None
    state = inputs["state"].clone().requires_grad_()
    qkv = [inputs[name] for name in ("receptance", "key", "value")]
    output, expected = wkv6_from_raw_decay(
        *qkv,
        inputs["raw_decay"],
        torch.ones(HEADS, SIZE, dtype=torch.float64),
        state,
        starts=starts,
        start_state=start_state,
        backend="reference",
    )
    behind = torch.randn(state.shape, dtype=torch.float64).to(dtype).double()
    (expected_gradient,) = torch.autograd.grad([output, expected], state, [inputs["gradient"], behind])

    options = {"dtype": dtype, "backend": backend}
    cut = {name: in_slices(tensor.to(dtype), num_tokens) for name, tensor in inputs.items() if name in BY_TOKEN}
    mine = in_slices(starts, num_tokens)
    fresh = None if start_state is None else start_state.to(dtype)
    writes = [
        summarise_writes(key, value, raw, starts=some, start_state=fresh, **options)
        for key, value, raw, some in zip(cut["key"], cut["value"], cut["raw_decay"], mine, strict=True)
    ]
    reads = [
        summarise_reads(receptance, gradient, raw, starts=some, **options)
        for receptance, gradient, raw, some in zip(
            cut["receptance"], cut["gradient"], cut["raw_decay"], mine, strict=True
        )
    ]
    found, gradient = state.detach().to(dtype), behind.to(dtype)
    for decay, written in writes:
        found = carry(found, decay, written)
    for (decay, _), read in zip(reversed(writes), reversed(reads), strict=True):
        gradient = carry(gradient, decay, read)
    for one, other in ((found, expected.detach()), (gradient, expected_gradient)):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_the_states_dtype_under_autocast_too(dtype: torch.dtype, backend: str) -> None:
    skip_without(backend)
    inputs = {name: x.to(dtype) for name, x in make_inputs(37, (-6.0, 1.0)).items()}
    options = {"dtype": torch.float32, "backend": backend}
    of_writes, of_reads = ("key", "value", "raw_decay"), ("receptance", "gradient", "raw_decay")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decay, written = summarise_writes(*(inputs[name] for name in of_writes), **options)
        read = summarise_reads(*(inputs[name] for name in of_reads), **options)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    expected = (
        *summarise_writes(*(wide[name] for name in of_writes), **options),
        summarise_reads(*(wide[name] for name in of_reads), **options),
    )
    for one, other in zip((decay, written, read), expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("spoilt", [torch.inf, torch.nan])
def test_a_state_that_is_not_finite_ends_with_its_document(spoilt: float) -> None:
    inputs, starts = make_inputs(37, (-6.0, 1.0)), make_starts("some", 37)
    arguments = [inputs[name] for name in ("key", "value", "raw_decay")]
    decay, written = summarise_writes(*arguments, dtype=torch.float64, starts=starts)
    assert carry(torch.full_like(inputs["state"], spoilt), decay, written).isfinite().all()
    decay, written = summarise_writes(*arguments, dtype=torch.float64)
    assert not carry(torch.full_like(inputs["state"], spoilt), decay, written).isfinite().any()
