"""What a side has to prove before a ratio with it is printed: outputs and all gradients against float64.

The reference is the recurrence in float64 on the same rounded inputs. An error is the largest difference of a tensor,
relative to its largest value. What is allowed:

- float32: 5e-6; 1e-4 for the decay's gradient where decays are extreme, for it is a small difference there.
- bf16: 2^-8 for a tensor returned in bf16, which is one rounding; 5e-6 for one returned in float32 (on a GPU 2^-10, one
  rounding to TF32). 2^-6 for everything of a side that rounds to bf16 on the way too.

The usual decays decide. What a side does with extreme ones is told beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infctx.bench.wkv6_sides import (
    EXTREME_DECAYS,
    USUAL_DECAYS,
    Case,
    Inputs,
    Side,
    backend_side,
    forward_results,
    make_inputs,
    training_results,
)

LONGEST, HEADS, MOST_ROWS = 256, 2, 2
# The blocks and chunks of all sides divide it: a case's remainder is that of its gate.
WHOLE_BLOCKS = 128

FP32_BOUND = 5e-6
EXTREME_DECAY_BOUND = 1e-4
BF16_ROUNDING = 2.0**-8
BF16_ON_THE_WAY = 2.0**-6
TF32_ROUNDING = 2.0**-10

Reference = tuple[Inputs, dict[str, Tensor]]


@dataclass(kw_only=True, slots=True)
class Gate:
    """What came of a side in a dtype. errors, bounds: of each tensor; reason: why it has not passed, or None."""

    side: str
    dtype: str
    tokens: int
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    extreme_reason: str | None = None
    extreme_errors: dict[str, float] = field(default_factory=dict)
    extreme_bounds: dict[str, float] = field(default_factory=dict)

    @property
    def is_passed(self) -> bool:
        """Whether it may be timed against another."""
        return self.reason is None


class GateKeeper:
    """Opens gates, each once. The expected results are kept from one side to the next."""

    def __init__(self) -> None:
        self._expected: dict[Case, Reference] = {}
        self._gates: dict[tuple[str, Case], Gate] = {}

    @property
    def gates(self) -> list[Gate]:
        """All that were asked for so far."""
        return list(self._gates.values())

    def gate(self, side: Side, timed: Case) -> Gate:
        """Try a side on a small case like the one that is to be timed."""
        case = small_case(timed)
        key = (side.name, case)
        if key not in self._gates:
            self._gates[key] = self._open(side, case)
        return self._gates[key]

    def _open(self, side: Side, case: Case) -> Gate:
        gate = Gate(side=side.name, dtype=case.dtype, tokens=case.tokens, reason=side.refusal(case))
        if gate.reason is not None:
            return gate
        gate.errors, gate.bounds, gate.reason = self._try(side, case)
        if gate.reason is None or gate.errors:
            extreme = case.replaced(raw_decays=EXTREME_DECAYS)
            gate.extreme_errors, gate.extreme_bounds, gate.extreme_reason = self._try(side, extreme)
        return gate

    def _try(self, side: Side, case: Case) -> tuple[dict[str, float], dict[str, float], str | None]:
        if case not in self._expected:
            inputs = make_inputs(case)
            self._expected[case] = inputs, training_results(backend_side("reference"), inputs.in_float64())
        inputs, expected = self._expected[case]
        try:
            found = training_results(side, inputs)
            alone = forward_results(side, inputs)
        except Exception as error:
            # Somebody else's code may raise anything; what it says stands in the report.
            return {}, {}, raised(error)
        bounds = {name: bound(side, case, name, tensor) for name, tensor in found.items()}
        errors = {name: relative_error(tensor, expected[name]) for name, tensor in found.items()}
        for name, tensor in alone.items():
            bounds[f"{name} without autograd"] = bound(side, case, name, tensor)
            errors[f"{name} without autograd"] = relative_error(tensor, expected[name])
        return errors, bounds, verdict(errors, bounds)


def small_case(timed: Case) -> Case:
    """The case of the gate: two heads, at most 256 tokens, and blocks as full as in the case that is timed."""
    tokens = timed.tokens
    if tokens > LONGEST:
        tokens = LONGEST - WHOLE_BLOCKS + (tokens - 1) % WHOLE_BLOCKS + 1
    return timed.replaced(tokens=tokens, heads=HEADS, rows=min(timed.rows, MOST_ROWS), raw_decays=USUAL_DECAYS)


def bound(side: Side, case: Case, name: str, found: Tensor) -> float:
    """The largest error that is allowed of a tensor that a side returned."""
    if case.dtype == "bf16" and side.rounds_inside:
        return BF16_ON_THE_WAY
    in_float32 = TF32_ROUNDING if case.dtype == "bf16" and case.device.type == "cuda" else FP32_BOUND
    if found.dtype == torch.bfloat16:
        return BF16_ROUNDING + in_float32
    if name == "d raw_decay" and case.raw_decays != USUAL_DECAYS:
        return max(in_float32, EXTREME_DECAY_BOUND)
    return in_float32


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite if the shape is another one."""
    if found.shape != expected.shape:
        return math.inf
    largest = expected.double().abs().max()
    return float((found.double() - expected.double()).abs().max() / largest.clamp(min=torch.finfo(torch.float64).tiny))


def verdict(errors: dict[str, float], bounds: dict[str, float]) -> str | None:
    """Which tensor is furthest beyond its bound, in words; None if none is. NaN is beyond every bound."""
    beyond = [name for name, error in errors.items() if not error <= bounds[name]]
    if not beyond:
        return None
    worst = max(beyond, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / bounds[name])
    others = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
    return f"{worst} is off by {errors[worst]:.1e} of its largest value, allowed {bounds[worst]:.1e}{others}"


def raised(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
