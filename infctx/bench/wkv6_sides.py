"""What is compared: implementations of the WKV6 recurrence behind one signature, and the inputs that they all get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from infctx_kernels import Backend, BackendError, choose_backend, wkv6_from_raw_decay
from infctx_kernels.wkv6.op import RUNNERS

INPUT_NAMES = ("receptance", "key", "value", "raw_decay", "bonus", "state")
RESULT_NAMES = ("output", "new_state", *(f"d {name}" for name in INPUT_NAMES))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Decays of trained models; and those that no form with a difference of long sums, or with a clamp, gets right.
USUAL_DECAYS, EXTREME_DECAYS = (-6.0, 1.0), (-8.0, 8.5)
# Passes and ranges of each length and dtype.
MOST_COMPILED_CASES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """The sizes of one call. dtype: a name of DTYPES; raw_decays: the range that they are drawn from."""

    device: torch.device
    dtype: str
    rows: int
    tokens: int
    heads: int
    head_size: int
    raw_decays: tuple[float, float] = USUAL_DECAYS

    def replaced(self, **changes: Any) -> Case:
        """The same case with other sizes."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Tensors in the order of INPUT_NAMES, and the gradients that are fed back through output and new state."""

    tensors: tuple[Tensor, ...]
    output_seed: Tensor
    state_seed: Tensor

    def in_float64(self) -> Inputs:
        """The same values."""
        tensors = tuple(tensor.double() for tensor in self.tensors)
        return Inputs(tensors=tensors, output_seed=self.output_seed.double(), state_seed=self.state_seed.double())


# (receptance, key, value, raw decay, bonus, state) -> (output, new state), shapes as in infctx_kernels.wkv6.
Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One implementation.

    refusal: why it cannot run a case, or None. rounds_inside: with bf16 inputs it rounds what it computes on the way,
    the state included, and not only what it returns.
    """

    name: str
    run: Operator
    refusal: Callable[[Case], str | None]
    rounds_inside: bool = False


def backend_side(name: str) -> Side:
    """One of our backends."""

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return wkv6_from_raw_decay(*tensors, backend=name)

    return Side(name=name, run=run, refusal=lambda case: backend_refusal(name, case))


def backend_refusal(name: str, case: Case) -> str | None:
    """Why a backend of ours cannot run a case; None if it can."""
    try:
        choose_backend(name, device=case.device, head_size=case.head_size, dtype=DTYPES[case.dtype])
    except BackendError as error:
        return str(error)
    return None


def compiled_side() -> Side:
    """Our torch backend through torch.compile, which compiles it for each shape, dtype and pass."""
    import torch._dynamo  # It takes a second that only this side should cost.

    def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        # Without the choice of a backend, which looks at files and compilers: nothing that torch could compile.
        return RUNNERS[Backend.TORCH](*tensors, None, None, decay_is_raw=True)

    # Beyond its usual limit it would refuse one case more.
    torch._dynamo.config.recompile_limit = MOST_COMPILED_CASES
    run = torch.compile(plain, fullgraph=True, dynamic=False)
    return Side(name="torch-compiled", run=run, refusal=lambda case: backend_refusal("torch", case))


def make_inputs(case: Case, *, seed: int = 0) -> Inputs:
    """Random inputs: normal, the decay evenly from the case's range.

    With bf16 the values of every tensor but the decay are rounded to bf16, those kept in float32 too: what a side makes
    of rounding them itself is then nothing.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device).to(dtype)

    sequence = (case.rows, case.tokens, case.heads, case.head_size)
    per_head = (case.heads, case.head_size)
    state = (case.rows, case.heads, case.head_size, case.head_size)
    low, high = case.raw_decays
    raw_decay = torch.rand(sequence, generator=generator, device=case.device) * (high - low) + low
    tensors = (normal(*sequence), normal(*sequence), normal(*sequence), raw_decay, normal(*per_head).float(),
               normal(*state).float())  # fmt: skip
    return Inputs(tensors=tensors, output_seed=normal(*sequence), state_seed=normal(*state).float())


def forward_results(side: Side, inputs: Inputs) -> dict[str, Tensor]:
    """Output and new state, without autograd."""
    with torch.no_grad():
        return dict(zip(RESULT_NAMES, side.run(*inputs.tensors), strict=False))


def training_results(side: Side, inputs: Inputs) -> dict[str, Tensor]:
    """Output, new state, and the gradient of each input, fed back through both. A gradient that is missing is zeros."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs.tensors)
    output, new_state = side.run(*leaves)
    # As they are for nearly every side; casting a state is nothing beside the rest.
    seeds = inputs.output_seed.to(output.dtype), inputs.state_seed.to(new_state.dtype)
    gradients = torch.autograd.grad((output, new_state), leaves, seeds, allow_unused=True)
    filled = (torch.zeros_like(leaf) if d is None else d for d, leaf in zip(gradients, leaves, strict=True))
    return dict(zip(RESULT_NAMES, (output.detach(), new_state.detach(), *filled), strict=True))


PASSES = {"forward": forward_results, "forward+backward": training_results}


def make_call(side: Side, sets: list[Inputs], which: str) -> Callable[[], object]:
    """A call to be timed, on one set of inputs after the other. which: a name of PASSES."""
    numbers, run = count(), PASSES[which]
    return lambda: run(side, sets[next(numbers) % len(sets)])
