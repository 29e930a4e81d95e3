"""Summaries of slices against the recurrence over the whole, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infctx_kernels import wkv6_from_raw_decay
from infctx_kernels.wkv6.slice_summary import carry, summarise_reads, summarise_writes

ROWS, HEADS, SIZE = 2, 2, 4
# From "never forgets" to "forgets everything at once"; above 20 the decay is 0 in float64 too.
RAW_RANGES = [(-6.0, 1.0), (-12.0, 8.0), (15.0, 100.0)]
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


def in_slices(tensor: Tensor | None, num_tokens: int) -> list[Tensor | None]:
    lengths = CUTS[num_tokens]
    return [None] * len(lengths) if tensor is None else list(tensor.split(lengths, dim=1))


@pytest.mark.parametrize("raw_range", RAW_RANGES)
@pytest.mark.parametrize("start_name", STARTS)
@pytest.mark.parametrize("has_start_state", [False, True])
@pytest.mark.parametrize("num_tokens", CUTS)
def test_states_and_gradients_past_slices_are_those_of_the_whole(
    num_tokens: int, has_start_state: bool, start_name: str, raw_range: tuple[float, float]
) -> None:
    inputs, starts = make_inputs(num_tokens, raw_range), make_starts(start_name, num_tokens)
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
    behind = torch.randn(state.shape, dtype=torch.float64)
    (expected_gradient,) = torch.autograd.grad([output, expected], state, [inputs["gradient"], behind])

    cut = {
        name: in_slices(inputs[name], num_tokens) for name in ("receptance", "key", "value", "raw_decay", "gradient")
    }
    found, decays = state.detach(), []
    for key, value, raw, mine in zip(
        cut["key"], cut["value"], cut["raw_decay"], in_slices(starts, num_tokens), strict=True
    ):
        decay, written = summarise_writes(key, value, raw, dtype=torch.float64, starts=mine, start_state=start_state)
        decays.append(decay)
        found = carry(found, decay, written)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-12)

    reads = [
        summarise_reads(receptance, gradient, raw, dtype=torch.float64, starts=mine)
        for receptance, gradient, raw, mine in zip(
            cut["receptance"], cut["gradient"], cut["raw_decay"], in_slices(starts, num_tokens), strict=True
        )
    ]
    gradient = behind
    for decay, read in zip(reversed(decays), reversed(reads), strict=True):
        gradient = carry(gradient, decay, read)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_the_states_dtype_under_autocast_too(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in make_inputs(37, (-6.0, 1.0)).items()}
    arguments = [inputs[name] for name in ("key", "value", "raw_decay")]
    widened = [tensor.float() for tensor in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = summarise_writes(*arguments, dtype=torch.float32)
        read = summarise_reads(inputs["receptance"], inputs["gradient"], inputs["raw_decay"], dtype=torch.float32)
    for one, other in zip(found, summarise_writes(*widened, dtype=torch.float32), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    reads = [inputs[name].float() for name in ("receptance", "gradient", "raw_decay")]
    assert torch.equal(read, summarise_reads(*reads, dtype=torch.float32))


@pytest.mark.parametrize("spoilt", [torch.inf, torch.nan])
def test_a_state_that_is_not_finite_ends_with_its_document(spoilt: float) -> None:
    inputs, starts = make_inputs(37, (-6.0, 1.0)), make_starts("some", 37)
    arguments = [inputs[name] for name in ("key", "value", "raw_decay")]
    decay, written = summarise_writes(*arguments, dtype=torch.float64, starts=starts)
    assert carry(torch.full_like(inputs["state"], spoilt), decay, written).isfinite().all()
    decay, written = summarise_writes(*arguments, dtype=torch.float64)
    assert not carry(torch.full_like(inputs["state"], spoilt), decay, written).isfinite().any()
