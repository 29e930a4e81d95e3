"""The Triton kernels against the float64 recurrence: outputs, carried state and every gradient.

On a GPU the kernels are compiled, elsewhere Triton interprets them: the same tests in both. The interpreter multiplies
in full float32, so that only a GPU shows what its matrix units round away.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infctx_kernels.wkv6.reference import wkv6_reference

triton_op = pytest.importorskip("infctx_kernels.wkv6.triton_op", reason="needs Triton", exc_type=ImportError)
LaunchPlan, Tiles = triton_op.LaunchPlan, triton_op.Tiles
choose_tiles, plan_launch, wkv6_triton = triton_op.choose_tiles, triton_op.plan_launch, triton_op.wkv6_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INPUT_NAMES = ("receptance", "key", "value", "decay", "bonus", "state", "start_state")

# One program walks through the whole sequence, or a segment each; with the state saved in front of every block, or
# every second; with its gradient kept behind every block or more.
FUSED = LaunchPlan(segment_tokens=256, checkpoint_tokens=64, span_tokens=256)
TINY = LaunchPlan(segment_tokens=16, checkpoint_tokens=16, span_tokens=16)
SHORT = LaunchPlan(segment_tokens=32, checkpoint_tokens=32, span_tokens=16)

# From "never forgets" to "forgets everything at once", and all of it in one channel.
USUAL, NEVER, FAST, MIXED, AT_ONCE = (-6.0, 1.0), (-20.0, -10.0), (1.0, 3.0), (-8.0, 8.5), (3.0, 8.0)
# At a row's first token, mid-block, next to each other, at a block's first and last token, with whole blocks between.
STARTS = (0, 5, 6, 16, 31, 37, 64)
CASES = {
    "one token": (1, USUAL, (), FUSED),
    "one token that starts": (1, USUAL, (0,), TINY),
    "less than a block": (15, MIXED, (3,), FUSED),
    "one block": (16, FAST, (), TINY),
    "a block and a token": (17, NEVER, (16,), SHORT),
    "no start": (37, USUAL, (), FUSED),
    "no start, segments": (65, USUAL, (), TINY),
    "no start, longer segments": (65, MIXED, (), SHORT),
    "never forgets": (37, NEVER, STARTS[1:5], FUSED),
    "never forgets, segments": (65, NEVER, (7,), TINY),
    "forgets fast": (37, FAST, STARTS[:5], SHORT),
    "forgets fast, segments": (37, FAST, (33,), TINY),
    "mixed": (65, MIXED, STARTS, FUSED),
    "mixed, segments": (65, MIXED, STARTS, TINY),
    "forgets at once": (37, AT_ONCE, STARTS[:5], FUSED),
    "forgets at once, segments": (37, AT_ONCE, (), TINY),
    "many starts": (65, USUAL, STARTS, FUSED),
    "many starts, segments": (65, USUAL, STARTS, TINY),
    "many starts, longer segments": (65, USUAL, STARTS[1:], SHORT),
}


def make_inputs(
    num_tokens: int, raw_range: tuple[float, float], *, rows: int = 1, heads: int = 1, size: int = 16
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    low, high = raw_range

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sequence = (rows, num_tokens, heads, size)
    inputs = {name: normal(*sequence) for name in ("receptance", "key", "value")}
    inputs["decay"] = torch.rand(sequence, generator=generator) * (high - low) + low
    inputs |= {"bonus": normal(heads, size), "state": normal(rows, heads, size, size)}
    inputs["start_state"] = normal(heads, size, size)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def make_starts(num_tokens: int, *places: tuple[int, ...]) -> Tensor:
    starts = torch.zeros(len(places), num_tokens, dtype=torch.bool)
    for row, of_row in enumerate(places):
        starts[row, list(of_row)] = True
    return starts.to(DEVICE)


def run(
    function: Callable[[list[Tensor]], tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Both outputs, and the gradient of a fixed functional of both with respect to every input."""
    leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs.values()]
    output, new_state = function(leaves)
    generator = torch.Generator().manual_seed(9)
    # Rounded to bfloat16, so that a seed is the same number in every dtype.
    seeds = [torch.randn(x.shape, generator=generator).bfloat16().to(DEVICE, x.dtype) for x in (output, new_state)]
    gradients = torch.autograd.grad((output, new_state), leaves, seeds, materialize_grads=True)
    results = {"output": output.detach(), "new_state": new_state.detach()}
    return results | {f"d {name}": x for name, x in zip(inputs, gradients, strict=True)}


def run_triton(
    inputs: dict[str, Tensor], starts: Tensor | None, plan: LaunchPlan, *, is_raw: bool = True
) -> dict[str, Tensor]:
    return run(lambda x: wkv6_triton(*x[:6], starts, *(x[6:] or [None]), decay_is_raw=is_raw, plan=plan), inputs)


def run_reference(inputs: dict[str, Tensor], starts: Tensor | None, *, is_raw: bool = True) -> dict[str, Tensor]:
    def reference(x: list[Tensor]) -> tuple[Tensor, Tensor]:
        log_decay = -torch.exp(x[3]) if is_raw else x[3]
        return wkv6_reference(*x[:3], log_decay, *x[4:6], starts, *(x[6:] or [None]))

    return run(reference, inputs, torch.float64)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference of each, relative to the largest expected value; NaN is never close."""
    errors = {
        name: float((found[name].double() - exact).abs().max() / exact.abs().max().clamp(min=1e-6))
        for name, exact in expected.items()
    }
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize(("num_tokens", "raw_range", "places", "plan"), CASES.values(), ids=CASES.keys())
def test_equals_the_reference(
    num_tokens: int, raw_range: tuple[float, float], places: tuple[int, ...], plan: LaunchPlan
) -> None:
    inputs = make_inputs(num_tokens, raw_range)
    starts = make_starts(num_tokens, places) if places else None
    expected = run_reference(inputs, starts)
    # 3e-7 in the interpreter; three tf32 products for one of float32 leave a digit less.
    assert_close(run_triton(inputs, starts, plan), expected, 1e-5)


@pytest.mark.parametrize("plan", [FUSED, TINY])
def test_takes_the_log_decay_too(plan: LaunchPlan) -> None:
    inputs = make_inputs(37, MIXED)
    inputs["decay"] = -torch.exp(inputs["decay"])
    starts = make_starts(37, STARTS[1:4])
    expected = run_reference(inputs, starts, is_raw=False)
    assert_close(run_triton(inputs, starts, plan, is_raw=False), expected, 1e-5)


@pytest.mark.parametrize("plan", [FUSED, TINY])
def test_documents_without_a_start_state_begin_from_zero(plan: LaunchPlan) -> None:
    inputs = make_inputs(37, USUAL)
    del inputs["start_state"]
    starts = make_starts(37, (5, 6, 32))
    assert_close(run_triton(inputs, starts, plan), run_reference(inputs, starts), 1e-5)


@pytest.mark.parametrize(("size", "plan"), [(32, TINY), (64, FUSED), (128, TINY)])
def test_rows_heads_and_head_sizes(size: int, plan: LaunchPlan) -> None:
    rows, heads = (2, 2) if size == 32 else (1, 1)
    inputs = make_inputs(19, USUAL, rows=rows, heads=heads, size=size)
    starts = make_starts(19, (3, 18), (0,)) if rows == 2 else None
    assert_close(run_triton(inputs, starts, plan), run_reference(inputs, starts), 1e-5)


# The rounding of a result, 2^-8 or 2^-11 of it, and the products in tf32, 1e-3.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4.9e-3), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize(("raw_range", "plan"), [(USUAL, FUSED), (MIXED, TINY)])
def test_half_precision_inputs(
    dtype: torch.dtype, tolerance: float, raw_range: tuple[float, float], plan: LaunchPlan
) -> None:
    inputs = make_inputs(37, raw_range)
    inputs = {name: x if name == "state" else x.to(dtype) for name, x in inputs.items()}
    starts = make_starts(37, (7, 20))
    found = run_triton(inputs, starts, plan)
    assert {name: found[f"d {name}"].dtype for name in inputs} == {name: x.dtype for name, x in inputs.items()}
    assert found["output"].dtype == dtype
    assert found["new_state"].dtype == torch.float32
    assert_close(found, run_reference(inputs, starts), tolerance)


def test_decay_bonus_and_start_state_may_have_dtypes_of_their_own() -> None:
    inputs = make_inputs(20, USUAL)
    dtypes = {
        "receptance": torch.bfloat16,
        "key": torch.bfloat16,
        "value": torch.bfloat16,
        "start_state": torch.float16,
    }
    inputs = {name: x.to(dtypes.get(name, torch.float32)) for name, x in inputs.items()}
    starts = make_starts(20, (4,))
    found = run_triton(inputs, starts, FUSED)
    assert {name: found[f"d {name}"].dtype for name in inputs} == {name: x.dtype for name, x in inputs.items()}
    assert_close(found, run_reference(inputs, starts), 4.9e-3)


@pytest.mark.parametrize("plan", [FUSED, TINY])
@pytest.mark.parametrize(("is_raw", "bad"), [(True, float("nan")), (False, float("nan")), (False, 0.5)])
def test_a_decay_that_is_none_is_seen_in_all_that_follows(is_raw: bool, bad: float, plan: LaunchPlan) -> None:
    inputs = make_inputs(37, (-2.0, -1.0), heads=2)
    inputs["decay"][0, 20, 1, 2] = bad
    found = run_triton(inputs, None, plan, is_raw=is_raw)
    assert bool(found["output"][0, 21:, 1].isnan().all())
    assert bool(found["new_state"][0, 1, 2].isnan().all())
    assert bool(found["d decay"][0, 20, 1, 2].isnan())
    assert bool(found["d state"][0, 1, 2].isnan().all())
    assert all(bool(found[name][:, :, 0].isfinite().all()) for name in ("output", "d key", "d decay"))


# numpy, which the interpreter computes with, warns of what is tested here.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("raw", [-100.0, 8.5, 30.0, 100.0])
def test_extreme_decays_give_finite_gradients(raw: float) -> None:
    inputs = make_inputs(20, (raw, raw))
    found = run_triton(inputs, make_starts(20, (9,)), TINY)
    assert all(bool(x.isfinite().all()) for x in found.values())


def test_a_log_decay_of_minus_infinity_forgets() -> None:
    inputs = make_inputs(20, (0.0, 0.0))
    inputs["decay"] = torch.full_like(inputs["decay"], -torch.inf)
    found = run_triton(inputs, None, TINY, is_raw=False)
    expected = inputs["key"][:, -1, :, :, None] * inputs["value"][:, -1, :, None, :]
    torch.testing.assert_close(found["new_state"], expected, rtol=1e-5, atol=1e-5)
    assert all(bool(x.isfinite().all()) for x in found.values())


def test_any_strides() -> None:
    """Eagle's decay is one number per channel, expanded; attention layouts are transposed views."""
    inputs = make_inputs(20, USUAL, rows=2, heads=2)
    inputs["decay"] = inputs["decay"][:1, :1].expand(2, 20, -1, -1)
    plain = {name: x.contiguous() for name, x in inputs.items()}

    def triton_with_views(x: list[Tensor]) -> tuple[Tensor, Tensor]:
        receptance, key = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in x[:2])
        decay = x[3][:1, :1].expand_as(x[3])
        state = x[5].transpose(-1, -2).contiguous().transpose(-1, -2)
        return wkv6_triton(receptance, key, x[2], decay, x[4], state, None, None, decay_is_raw=True, plan=TINY)

    def reference(x: list[Tensor]) -> tuple[Tensor, Tensor]:
        decay = x[3][:1, :1].expand_as(x[3])
        return wkv6_reference(*x[:3], -torch.exp(decay), *x[4:6], None, None)

    assert_close(run(triton_with_views, plain), run(reference, plain, torch.float64), 1e-5)
    assert_close(run_triton(inputs, None, TINY), run_reference(plain, None), 1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("place", "has_start_state", "plan"),
    [(0, True, FUSED), (0, False, TINY), (20, True, TINY), (20, False, FUSED), (32, True, FUSED), (32, False, TINY)],
)
def test_a_state_that_is_not_finite_ends_with_its_document(place: int, has_start_state: bool, plan: LaunchPlan) -> None:
    inputs = make_inputs(37, USUAL)
    if not has_start_state:
        del inputs["start_state"]
    starts = make_starts(37, (place,))
    expected = run_reference(inputs, starts)
    inputs["state"][0, 0, 3] = torch.inf
    inputs["state"][0, 0, 4] = torch.nan
    found = run_triton(inputs, starts, plan)
    of_new_document = {name: found[name][:, place:] for name in ("output", "d receptance", "d key", "d value")}
    exact = {name: expected[name][:, place:] for name in of_new_document}
    # Sums over a block mix the decay's gradients within that block.
    next_block = -(-place // 16) * 16
    of_new_document["d decay"], exact["d decay"] = (x["d decay"][:, next_block:] for x in (found, expected))
    for name in {"new_state", "d start_state"} & found.keys():
        of_new_document[name], exact[name] = found[name], expected[name]
    assert_close(of_new_document, exact, 1e-5)
    assert not bool(found["output"][:, :place].isfinite().any())


def test_the_inputs_are_not_changed() -> None:
    inputs = make_inputs(20, USUAL)
    before = {name: x.clone() for name, x in inputs.items()}
    leaves = [x.requires_grad_() for x in inputs.values()]
    starts = make_starts(20, (4, 16))
    output, new_state = wkv6_triton(*leaves[:6], starts, leaves[6], decay_is_raw=True, plan=TINY)
    (output.sum() + new_state.sum()).backward()
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert new_state.data_ptr() != inputs["state"].data_ptr()


def test_without_gradients_no_states_are_kept() -> None:
    inputs = make_inputs(20, USUAL)
    leaves = [x.requires_grad_() for x in inputs.values()]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.no_grad():
            alone = wkv6_triton(*leaves[:6], None, None, decay_is_raw=True, plan=TINY)
        assert not kept
        together = wkv6_triton(*leaves[:6], None, None, decay_is_raw=True, plan=TINY)
    assert kept
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output_only(which: int) -> None:
    inputs = make_inputs(20, USUAL)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: x.to(dtype).clone().requires_grad_() for name, x in inputs.items()}
        found = torch.autograd.grad(function(leaves)[which].sum(), leaves.values(), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    found = gradients(
        lambda x: wkv6_triton(*list(x.values())[:6], None, None, decay_is_raw=True, plan=TINY), torch.float32
    )
    expected = gradients(
        lambda x: wkv6_reference(*[-y.exp() if n == "decay" else y for n, y in x.items()][:6], None, None),
        torch.float64,
    )
    assert_close(found, expected, 1e-5)


def test_the_plan_depends_on_sizes_only() -> None:
    def segments(rows: int, num_tokens: int, heads: int = 32) -> int:
        plan = plan_launch(programs=rows * heads, num_tokens=num_tokens, num_multiprocessors=132)
        assert plan.segment_tokens % plan.span_tokens == 0
        return -(-num_tokens // plan.segment_tokens)

    assert segments(8, 4096) == 1
    assert segments(1, 1) == 1
    assert segments(1, 4096) > 4
    assert segments(1, 131072) > 4
    inputs = make_inputs(20, USUAL)
    by_default = run(lambda x: wkv6_triton(*x[:6], None, None, decay_is_raw=True), inputs)
    assert_close(by_default, run_reference(inputs, None), 1e-5)


@pytest.mark.parametrize(
    ("values", "keys", "channels", "levels", "splits_keys"), [(64, 64, 32, 1, False), (16, 16, 64, 4, True)]
)
def test_any_tiles(values: int, keys: int, channels: int, levels: int, splits_keys: bool) -> None:
    sizes = Tiles(
        values=values, keys=keys, channels=channels, levels=levels, walk_warps=4, key_warps=4,
        splits_keys=splits_keys, precision="tf32x3",
    )  # fmt: skip
    inputs = make_inputs(19, USUAL, size=64)
    starts = make_starts(19, (3, 18))
    found = run(lambda x: wkv6_triton(*x[:6], starts, x[6], decay_is_raw=True, plan=TINY, tiles=sizes), inputs)
    assert_close(found, run_reference(inputs, starts), 1e-5)


# In tf32 a block's scores come from one product where its decays allow it: in no block, in some, in all.
@pytest.mark.parametrize("raw_range", [USUAL, NEVER, FAST, MIXED, AT_ONCE, (0.9, 1.0), (1.0, 1.1)])
@pytest.mark.parametrize("places", [(), (5, 40)])
def test_mild_blocks_give_the_same(raw_range: tuple[float, float], places: tuple[int, ...]) -> None:
    inputs = make_inputs(65, raw_range)
    # The first block is mild whatever the others are.
    inputs["decay"][:, :16] = inputs["decay"][:, :16].clamp(max=0.0)
    starts = make_starts(65, places) if places else None
    tiles = choose_tiles(head_size=16, dtype=torch.bfloat16, has_starts=bool(places), compute_capability=0)
    found = run(lambda x: wkv6_triton(*x[:6], starts, x[6], decay_is_raw=True, plan=FUSED, tiles=tiles), inputs)
    # The interpreter rounds to tf32 nowhere; the factor that corrects that rounding is 3.5e-4 each time.
    assert_close(found, run_reference(inputs, starts), 3e-3)


@pytest.mark.gpu
def test_more_elements_than_32_bits_can_count() -> None:
    num_tokens, heads, size = 540_000, 64, 64
    sequence = (1, num_tokens, heads, size)
    assert num_tokens * heads * size > 2**31
    make = lambda: torch.randn(sequence, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    receptance, key, value, raw = make(), make(), make(), make().abs_()
    bonus, state = torch.randn(heads, size, device=DEVICE), torch.zeros(1, heads, size, size, device=DEVICE)
    with torch.no_grad():
        output, new_state = wkv6_triton(receptance, key, value, raw, bonus, state, None, None, decay_is_raw=True)
        # e^-1 or less for each token: 256 tokens back nothing is left.
        last = [x[:, -512:] for x in (receptance, key, value, raw)]
        expected, expected_state = wkv6_triton(*last, bonus, state, None, None, decay_is_raw=True)
    torch.testing.assert_close(output[:, -256:], expected[:, -256:], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(new_state, expected_state, rtol=1e-3, atol=1e-3)
