"""The kernel benchmark: gates for every side, then each of our backends in pairs with every other side.

A row whose ratio of ours / ours (see pairs.py) lies outside of QUIET is marked as noisy. Its ratio is shown all the
same, for its interval says how far to trust it, but it is nothing to quote.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from infctx.bench.gates import GateKeeper, bound, raised, relative_error, verdict
from infctx.bench.pairs import PairTimes, Timer, time_pairs
from infctx.bench.wkv6_sides import (
    DTYPES,
    PASSES,
    Case,
    Inputs,
    Side,
    backend_refusal,
    backend_side,
    make_call,
    make_inputs,
)
from infctx.errors import InfctxError
from infctx_kernels import Backend, choose_backend

QUIET = (0.97, 1.03)
# Shorter samples would measure the clock and the scheduler.
SAMPLE_SECONDS = 0.005
# Inputs are taken in turn so that a GPU does not find them in its cache, as it would not in training.
ROTATED_BYTES, MOST_SETS = 256 * 2**20, 8
# Errors grow a little with the length, and the two sides may err in opposite directions.
AGREEMENT_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to measure.

    backends: ours, by name; none = the one that is chosen by itself. threads: of torch; None = as they are.
    seconds_per_case: after which a row takes no more pairs; None = it takes all of them.
    """

    device: str
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    rows: int
    heads: int
    head_size: int
    pairs: int
    backends: tuple[str, ...] = ()
    threads: int | None = None
    seconds_per_case: float | None = None

    def cases(self) -> list[Case]:
        """Every dtype with every length."""
        return [
            Case(
                device=torch.device(self.device),
                dtype=dtype,
                rows=self.rows,
                tokens=tokens,
                heads=self.heads,
                head_size=self.head_size,
            )
            for dtype in self.dtypes
            for tokens in self.tokens
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a row is to tell. which: a name of PASSES; other: None = ours is timed alone."""

    case: Case
    which: str
    ours: Side
    other: Side | None

    @property
    def sides(self) -> tuple[Side, ...]:
        """Ours first."""
        return (self.ours,) if self.other is None else (self.ours, self.other)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What came of a comparison: times, or the reason why there are none."""

    comparison: Comparison
    reason: str | None = None
    times: PairTimes | None = None

    @property
    def is_noisy(self) -> bool:
        """Whether ours / ours was not 1."""
        return self.times is not None and not QUIET[0] <= median(self.times.ratios_of_ours) <= QUIET[1]


def check_backends(settings: Settings) -> None:
    """Refuse names of backends that do not exist, and backends that can run none of the cases.

    Raises: InfctxError.
    """
    for name in settings.backends:
        refusals = [backend_refusal(name, case) for case in settings.cases()]
        if name not in set(Backend) or all(refusals):
            raise InfctxError(f"--backend {name}: {refusals[0]}")


def plan(settings: Settings, others: Sequence[Side]) -> list[Comparison]:
    """Every comparison, case by case: each of our backends against our torch backend and against the others."""
    return [
        Comparison(case=case, which=which, ours=ours, other=other)
        for case in settings.cases()
        for which in PASSES
        for ours, other in _pairings(case, settings.backends, others)
    ]


def _pairings(case: Case, backends: Sequence[str], others: Sequence[Side]) -> Iterator[tuple[Side, Side | None]]:
    chosen = choose_backend(None, device=case.device, head_size=case.head_size, dtype=DTYPES[case.dtype])
    for name in backends or [str(chosen)]:
        against: list[Side | None] = [*([] if name == Backend.TORCH else [backend_side(Backend.TORCH)]), *others]
        for other in against or [None]:
            yield backend_side(name), other


def open_gates(comparisons: Iterable[Comparison], keeper: GateKeeper) -> None:
    """Try every side on a small case of each kind."""
    for comparison in comparisons:
        for side in comparison.sides:
            keeper.gate(side, comparison.case)


def time_rows(
    comparisons: Iterable[Comparison], keeper: GateKeeper, timer: Timer, *, pairs: int, seconds_per_case: float | None
) -> Iterator[Row]:
    """Time one comparison after the other. A side whose gate is shut, or that fails, is a row with a reason."""
    inputs: dict[Case, list[Inputs]] = {}
    for comparison in comparisons:
        case = comparison.case
        reason = _why_not(comparison, keeper)
        if reason is not None:
            yield Row(comparison=comparison, reason=reason)
            continue
        try:
            if case not in inputs:
                inputs.clear()
                inputs[case] = _input_sets(case)
            reason = disagreement(comparison, inputs[case][0])
            if reason is not None:
                yield Row(comparison=comparison, reason=reason)
                continue
            calls = [make_call(side, inputs[case], comparison.which) for side in comparison.sides]
            times = time_pairs(
                calls[0],
                calls[1] if len(calls) > 1 else None,
                timer,
                num_pairs=pairs,
                sample_seconds=SAMPLE_SECONDS,
                seconds_limit=seconds_per_case,
            )
        except Exception as error:
            yield Row(comparison=comparison, reason=raised(error))
            continue
        yield Row(comparison=comparison, times=times)


def _why_not(comparison: Comparison, keeper: GateKeeper) -> str | None:
    """Why a comparison is not timed, or None. What cannot run a case has not been tried on a small one either."""
    for side in comparison.sides:
        reason = side.refusal(comparison.case) or keeper.gate(side, comparison.case).reason
        if reason is not None:
            return f"{side.name}, {comparison.case.dtype}: {reason}"
    return None


def disagreement(comparison: Comparison, inputs: Inputs) -> str | None:
    """How two sides' results on the inputs that are timed differ by more than both bounds allow, in words, or None.

    The gates are small, and a kernel may take another path at the size that is timed.
    """
    found = [PASSES[comparison.which](side, inputs) for side in comparison.sides]
    if comparison.other is None:
        return None
    allowed: dict[str, float] = dict.fromkeys(found[0], 0.0)
    for side, results in zip(comparison.sides, found, strict=True):
        for name, tensor in results.items():
            allowed[name] += AGREEMENT_FACTOR * bound(side, comparison.case, name, tensor)
    differences = {name: relative_error(found[1][name], tensor) for name, tensor in found[0].items()}
    reason = verdict(differences, allowed)
    names = f"{comparison.ours.name} and {comparison.other.name}"
    return reason and f"{names} differ at {comparison.case.tokens:,} tokens: {reason}"


def _input_sets(case: Case) -> list[Inputs]:
    first = make_inputs(case)
    if case.device.type == "cpu":
        return [first]
    size = sum(tensor.numel() * tensor.element_size() for tensor in first.tensors)
    num_sets = min(max(math.ceil(ROTATED_BYTES / size), 1), MOST_SETS)
    return [first, *(make_inputs(case, seed=seed) for seed in range(1, num_sets))]
