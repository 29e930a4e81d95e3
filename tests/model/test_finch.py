"""The model as a function of (tokens, state): chunking, documents' starts, dtypes, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infctx.model.finch import Finch
from infctx.model.state import ModelState

VERSIONS = ["6", "5.2"]


def assert_states_close(found: ModelState, expected: ModelState, tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("split", [[1] * 70, [1, 31, 38], [64, 6], [70]])
def test_chunked_equals_whole(
    make_finch: Callable[..., Finch], version: str, dtype: torch.dtype, tolerance: float, split: list[int]
) -> None:
    model = make_finch(version, dtype=dtype)
    tokens = torch.randint(0, 50, (3, 70))
    starts = torch.rand(3, 70) < 0.05
    whole, whole_state = model(tokens, starts=starts)
    state, pieces = None, []
    for part, part_starts in zip(tokens.split(split, 1), starts.split(split, 1), strict=True):
        logits, state = model(part, state, starts=part_starts)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=tolerance, atol=tolerance)
    assert_states_close(state, whole_state, tolerance)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("has_initial_state", [False, True])
def test_packed_documents_equal_separate_ones(
    make_finch: Callable[..., Finch], version: str, has_initial_state: bool
) -> None:
    model = make_finch(version, dtype=torch.float64, has_initial_state=has_initial_state)
    lengths = [5, 1, 40, 2]
    tokens = torch.randint(0, 50, (1, sum(lengths)))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [0, 5, 6, 46]] = True
    unrelated = ModelState(*(torch.randn_like(t) for t in model.fresh_state(1)))
    packed, packed_state = model(tokens, unrelated, starts=starts)
    separate = [model(part) for part in tokens.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat([logits for logits, _ in separate], 1), rtol=1e-10, atol=1e-10)
    assert_states_close(packed_state, separate[-1][1], 1e-10)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_given_state_is_not_changed_and_the_new_one_holds_no_activations(
    make_finch: Callable[..., Finch], version: str
) -> None:
    model = make_finch(version)
    _, state = model(torch.randint(0, 50, (2, 10)))
    before = [tensor.clone() for tensor in state]
    _, new_state = model(torch.randint(0, 50, (2, 10)), state)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(state, before, strict=True))
    # A view of the activations would keep all of them alive.
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in new_state)
    assert {t.data_ptr() for t in new_state}.isdisjoint(t.data_ptr() for t in state)


@pytest.mark.parametrize("version", VERSIONS)
def test_advancing_gives_the_state_of_forward_bit_for_bit(make_finch: Callable[..., Finch], version: str) -> None:
    model = make_finch(version)
    tokens = torch.randint(0, 50, (2, 37))
    starts = torch.rand(2, 37) < 0.1
    _, state = model(torch.randint(0, 50, (2, 5)))
    calls = []
    handle = model.blocks[-1].channel_mix.register_forward_hook(lambda *arguments: calls.append(1))
    advanced = model.advance(tokens, state, starts=starts)
    handle.remove()
    _, expected = model(tokens, state, starts=starts)
    assert all(torch.equal(found, other) for found, other in zip(advanced, expected, strict=True))
    assert not calls


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(make_finch: Callable[..., Finch], version: str, dtype: torch.dtype) -> None:
    model = make_finch(version, dtype=dtype)
    logits, state = model(torch.randint(0, 50, (2, 9)))
    assert logits.dtype == dtype
    assert {t.dtype for t in state} == {torch.float64 if dtype == torch.float64 else torch.float32}
    config = model.config
    assert state.wkv.shape == (config.n_layer, 2, config.n_head, config.head_size, config.head_size)
    assert state.att_shift.shape == state.ffn_shift.shape == (config.n_layer, 2, config.n_embd)


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_flow_through_both_outputs(make_finch: Callable[..., Finch], version: str) -> None:
    model = make_finch(version, dtype=torch.float64)
    state = ModelState(*(torch.randn_like(t).requires_grad_() for t in model.fresh_state(1)))

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        logits, new_state = model(tokens, ModelState(*leaves))
        return logits, *new_state

    tokens = torch.randint(0, 50, (1, 3))
    assert torch.autograd.gradcheck(function, tuple(state), fast_mode=True)


def test_state_has_the_key_axis_before_the_value_axis(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", n_layer=2, dtype=torch.float64)
    seen = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({name: output})

    time_mix = model.blocks[0].time_mix
    time_mix.key.register_forward_hook(note("key"))
    time_mix.value.register_forward_hook(note("value"))
    _, state = model(torch.tensor([[7]]))
    heads = (model.config.n_head, model.config.head_size)
    outer = torch.einsum("hi,hj->hij", seen["key"].view(heads), seen["value"].view(heads))
    torch.testing.assert_close(state.wkv[0, 0], outer)
