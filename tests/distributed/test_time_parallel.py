"""Chunks split over ranks: real processes against one process with the whole sequence in one graph."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from infctx.model.finch import Finch
from infctx.model.state import RECURRENT_FIELDS, ModelState
from infctx.model.time_parallel import Gathering, TimeGroup, bytes_per_chunk
from infctx_kernels.wkv6.reference import wkv6_reference

WORKER = Path(__file__).with_name("time_parallel_worker.py")


def _load_cases() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "time_parallel_cases", WORKER.with_name("time_parallel_cases.py")
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up.
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


cases = _load_cases()
RIGHT = [case for case in cases.CASES if case.broken is None]
WRONG = [case for case in cases.CASES if case.broken is not None]
EXACT = [case for case in RIGHT if case.dtype != torch.bfloat16]
ROUNDED = [case for case in RIGHT if case.dtype == torch.bfloat16]
# Rounding alone: float64 has 2e-16; in float32 one rank with whole chunks is up to 5e-6 away from float64, too.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def by_ranks(chosen: list[Any]) -> list[Any]:
    """A case with each number of ranks that it runs on."""
    return [pytest.param(case, ranks, id=f"{case.name}-{ranks}") for case in chosen for ranks in case.ranks]


Found = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All cases by 2 and by 4 processes: number of ranks -> what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = subprocess.run(
        [sys.executable, str(WORKER), str(folder)], stderr=subprocess.PIPE, text=True, timeout=240, check=False
    )
    assert launch.returncode == 0, launch.stderr
    results = {ranks: [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)] for ranks in (2, 4)}
    return results.__getitem__


def whole_graph(case: Any) -> dict[str, Any]:
    """The same in one process and in float64, every window in one graph, by torch's own loss."""
    model = cases.make_model(case, dtype=torch.float64)
    model.recompute_layers(False)
    chunks = cases.make_chunks(case)
    length = len(chunks) if case.window == "document" else case.window
    state = cases.make_state(case, model)
    initial_gradients, loss_sum = None, torch.zeros((), dtype=torch.float64)
    for first in range(0, len(chunks), length):
        leaves = [tensor.detach().requires_grad_() for tensor in state]
        state, loss = _window_loss(model, chunks[first : first + length], ModelState(*leaves))
        # With the state, so that a window without a loss has a graph.
        (loss / 10.0 + sum(0.0 * tensor.sum() for tensor in state)).backward()
        initial_gradients = initial_gradients or [leaf.grad for leaf in leaves]
        loss_sum += loss.detach()
    return {
        "loss": loss_sum,
        "states": [tensor.detach() for tensor in state],
        "initial_gradients": initial_gradients,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


def _window_loss(model: Finch, chunks: list[Any], state: ModelState) -> tuple[ModelState, Tensor]:
    tokens, targets, weights = (
        torch.cat([getattr(chunk, name) for chunk in chunks], dim=1) for name in ("tokens", "targets", "loss_weight")
    )
    none = [torch.zeros_like(chunk.tokens, dtype=torch.bool) for chunk in chunks]
    starts = [chunk.starts if chunk.starts is not None else no for chunk, no in zip(chunks, none, strict=True)]
    logits, state = model(tokens, state, starts=torch.cat(starts, dim=1))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return state, (losses * weights.flatten()).sum()


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value; where nothing is expected, any difference is infinitely large."""
    difference, largest = float((found.double() - expected).abs().max()), float(expected.abs().max())
    return difference / largest if largest else math.inf if difference else 0.0


def errors_of(case: Any, ranks: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    """By name, of everything that a gradient through chunks gives."""
    mine = [rank[case.name] for rank in ranks]
    errors = {"loss": error(sum(rank["loss"] for rank in mine), expected["loss"])}
    for name, own, other in zip(RECURRENT_FIELDS, mine[0]["states"], expected["states"], strict=True):
        errors[f"{name} behind"] = error(own, other)
    pairs = zip(RECURRENT_FIELDS, mine[0]["initial_gradients"], expected["initial_gradients"], strict=True)
    errors |= {f"gradient of {name} before": error(own, other) for name, own, other in pairs}
    for name, other in expected["gradients"].items():
        errors[name] = error(sum(rank["gradients"][name] for rank in mine), other)
    return errors


@pytest.mark.parametrize(("case", "ranks"), by_ranks(EXACT))
def test_slices_together_equal_the_whole(case: Any, ranks: int, found: Found) -> None:
    errors = errors_of(case, found(ranks), whole_graph(case))
    assert len(errors) > 15
    worst = max(errors, key=errors.__getitem__)
    print(f"{case.name}, {ranks} ranks: {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= TOLERANCE[case.dtype], worst


@pytest.mark.parametrize(("case", "ranks"), by_ranks(RIGHT))
def test_every_rank_has_the_same_state_to_the_bit(case: Any, ranks: int, found: Found) -> None:
    first, *others = [rank[case.name] for rank in found(ranks)]
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name in ("states", "initial_gradients"):
        assert [tensor.dtype for tensor in first[name]] == [dtype] * 3
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first[name], other[name], strict=True))
    # Sweep 1, which skips what the state does not need, finds the states of sweep 2.
    assert [rank[case.name]["largest_difference"] for rank in found(ranks)] == [0.0] * ranks


@pytest.mark.parametrize(("case", "ranks"), by_ranks(RIGHT))
def test_bytes_are_those_of_the_formula(case: Any, ranks: int, found: Found) -> None:
    config = cases.make_model(case).config
    num_chunks = -(-case.num_tokens // case.chunk_tokens)
    length = num_chunks if case.window == "document" else case.window
    num_windows = -(-num_chunks // length)
    num_forward = (num_chunks - num_windows) + num_chunks * (2 if case.is_recomputed else 1)
    forward, backward = (
        bytes_per_chunk(config, 2, ranks, hidden_bytes=case.dtype.itemsize, is_backward=is_backward)
        for is_backward in (False, True)
    )
    for rank in found(ranks):
        received = rank[case.name]["bytes_received"]
        assert received == rank[case.name]["bytes_counted"] == num_forward * forward + num_chunks * backward > 0


@pytest.mark.parametrize(("case", "ranks"), by_ranks(ROUNDED))
def test_bf16_is_as_far_from_exact_as_one_rank_is(case: Any, ranks: int, found: Found) -> None:
    expected = whole_graph(case)
    one_rank = {case.name: cases.run_case(case, cases.make_model(case), cases.make_chunks(case))}
    sliced, whole = errors_of(case, found(ranks), expected), errors_of(case, [one_rank], expected)
    # Slices change which numbers are rounded, not how many.
    assert max(sliced.values()) <= 3 * max(whole.values())
    assert sum(sliced.values()) <= 1.5 * sum(whole.values())


@pytest.mark.parametrize(("case", "ranks"), by_ranks(WRONG))
def test_errors_in_what_crosses_are_seen(case: Any, ranks: int, found: Found) -> None:
    assert max(errors_of(case, found(ranks), whole_graph(case)).values()) > 1e-2


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", cases.OPERATOR_CASES)
def test_the_recurrence_alone(name: str, ranks: int, found: Found) -> None:
    leaves, starts, (output_gradient, state_gradient) = cases.operator_inputs(cases.OPERATOR_CASES[name])
    for leaf in leaves.values():
        leaf.requires_grad_()
    log_decay = -torch.exp(leaves["raw_decay"])
    inputs = [leaves[key] for key in ("receptance", "key", "value")]
    rest = [leaves["bonus"], leaves["state"], starts, leaves["start_state"]]
    output, state = wkv6_reference(*inputs, log_decay, *rest)
    torch.autograd.backward([output, state], [output_gradient, state_gradient])
    mine = [rank[name] for rank in found(ranks)]
    assert error(torch.cat([rank["output"] for rank in mine], dim=1), output.detach()) <= 1e-12
    for rank in mine:
        assert error(rank["state"], state.detach()) <= 1e-12
        assert error(rank["gradients"]["state"], leaves["state"].grad) <= 1e-12
    for key in cases.BY_TOKEN:
        assert error(torch.cat([rank["gradients"][key] for rank in mine], dim=1), leaves[key].grad) <= 1e-12, key
    parts = {key: [rank["gradients"][key] for rank in mine] for key in ("bonus", "start_state")}
    for key, of_ranks in parts.items():
        if leaves[key].grad is None:
            assert not any(part is not None and part.any() for part in of_ranks)
        else:
            assert error(sum(of_ranks), leaves[key].grad) <= 1e-12, key


class Alone(TimeGroup):
    """A group of one rank, which has nobody to talk to."""

    def start_gather(self, mine: Tensor) -> Gathering:
        return Gathering(mine[None].clone(), Done())


class Done(torch.distributed.Work):
    def wait(self, *_: Any) -> bool:
        return True


@pytest.mark.parametrize("name", ["finch, starts, tuned", "finch, chunks and slices without a loss", "eagle, document"])
def test_a_group_of_one_computes_the_whole(name: str) -> None:
    (case,) = [case for case in RIGHT if case.name == name]
    model = cases.make_model(case)
    group = Alone(None, rank=0, size=1)
    model.use_time_group(group)
    found = {name: cases.run_case(case, model, cases.make_chunks(case))}
    assert max(errors_of(case, [found], whole_graph(case)).values()) <= 1e-10
    assert group.bytes_received == bytes_per_chunk(model.config, 2, 1, hidden_bytes=8) == 0
    assert all(block.time_mix.time_group is group is block.channel_mix.time_group for block in model.blocks)
    model.use_time_group(None)
    assert all(block.time_mix.time_group is block.channel_mix.time_group is None for block in model.blocks)
