"""The cases that test_time_parallel.py and the ranks it starts both make."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infctx.adapters.peft_adapters import attach_lora
from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.model.time_parallel import SlicedWkv6, TimeGroup
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx.training.precision import apply_precision_


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, two rows of tokens, and how they are cut. starts: of each row. unweighted: tokens without a loss."""

    name: str
    version: str = "6"
    dtype: torch.dtype = torch.float64
    num_tokens: int = 37
    chunk_tokens: int = 13
    window: int | str = "document"
    starts: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    is_tuned: bool = False
    is_lora: bool = False
    is_recomputed: bool = False
    has_extreme_decays: bool = False
    unweighted: range = range(0)
    broken: str | None = None
    ranks: tuple[int, ...] = (2, 4)


# Chunks of 8: [0, 8), [8, 16), .. Over 2 ranks slices of 4, over 4 ranks of 2.
MANY_STARTS = ((0, 9, 10, 11, 20), (4, 6, 12, 23, 39))
SPREAD = {"num_tokens": 40, "chunk_tokens": 8, "starts": MANY_STARTS}
# In chunks of 16, the starts of one slice of 8 are 3, in one row; others are at its first and last token.
FEW = {"num_tokens": 32, "chunk_tokens": 16, "starts": ((1, 3, 6, 24), (8, 15))}
CASES = (
    Case(name="finch, document"),
    Case(name="eagle, document", version="5.2"),
    Case(name="finch, one ragged chunk", chunk_tokens=37, window=1),
    Case(name="eagle, window 1", version="5.2", window=1, ranks=(2,)),
    Case(name="finch, one token a rank", num_tokens=8, chunk_tokens=4),
    Case(name="finch, starts, window 3", window=3, **SPREAD),
    Case(name="eagle, starts, window 3", version="5.2", window=3, ranks=(2,), **SPREAD),
    Case(name="finch, starts, tuned", is_tuned=True, **SPREAD),
    Case(name="eagle, starts, tuned", version="5.2", is_tuned=True, **FEW),
    Case(name="finch, starts, tuned, recomputed", is_tuned=True, is_recomputed=True, **FEW),
    Case(name="finch, chunks and slices without a loss", unweighted=range(20), is_tuned=True, **FEW),
    Case(name="finch, recomputed", is_recomputed=True, ranks=(2,)),
    Case(name="finch, extreme decays", has_extreme_decays=True, is_tuned=True, **FEW),
    Case(name="finch, LoRA", is_lora=True, ranks=(2,), **FEW),
    Case(name="finch, float32", dtype=torch.float32, ranks=(2,)),
    Case(name="finch, float32, starts, tuned", dtype=torch.float32, is_tuned=True, **SPREAD),
    Case(name="eagle, float32, starts, tuned", dtype=torch.float32, version="5.2", is_tuned=True, **FEW),
    Case(
        name="finch, float32, extreme decays",
        dtype=torch.float32,
        has_extreme_decays=True,
        is_tuned=True,
        **FEW,
        ranks=(2,),
    ),
    Case(name="finch, bf16", dtype=torch.bfloat16, is_tuned=True, ranks=(2,), **FEW),
    Case(name="eagle, bf16, recomputed", dtype=torch.bfloat16, version="5.2", is_recomputed=True),
    # The checks have to see these.
    Case(name="wrong: every rank takes the gradient of the state behind", broken="taken_by_all", ranks=(2,)),
    Case(name="wrong: every slice begins with nothing", broken="forgets", ranks=(2,)),
    Case(name="wrong: no gradient crosses the slices", broken="cut_gradient", ranks=(2,)),
)


def make_model(case: Case, *, dtype: torch.dtype | None = None) -> Finch:
    """The case's model, in its dtype or another; the same weights in every process."""
    specification = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
    assert specification is not None
    assert specification.loader is not None
    fixtures = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fixtures)
    model = fixtures.random_finch(
        case.version, n_layer=2, n_embd=16, vocab_size=30, dim_ffn=20,
        has_initial_state=case.is_tuned, has_initial_shifts=case.is_tuned, dtype=torch.float64,
    )  # fmt: skip
    if case.has_extreme_decays:
        with torch.no_grad():
            for block in model.blocks:
                decay = block.time_mix.decay_base
                decay.copy_(torch.linspace(-12, 8, decay.numel(), dtype=decay.dtype).view_as(decay))
    if case.is_lora:
        attach_lora(model, rank=2, alpha=4.0, targets=["receptance", "key", "value", "gate", "output"])
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(generator=generator)
        model.to(torch.float64)
    dtype = dtype or case.dtype
    if dtype == torch.bfloat16:
        model.float()
        apply_precision_(model, "bf16")
    else:
        model.to(dtype)
    model.recompute_layers(case.is_recomputed)
    return model


def make_chunks(case: Case) -> list[Chunk]:
    """The chunks of two rows of random tokens and weights."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, case.num_tokens)
    tokens = torch.randint(0, 30, shape, generator=generator)
    targets = torch.randint(0, 30, shape, generator=generator)
    weights = torch.rand(shape, generator=generator)
    weights[:, list(case.unweighted)] = 0.0
    starts = torch.zeros(shape, dtype=torch.bool)
    for row, places in enumerate(case.starts):
        starts[row, list(places)] = True
    chunks = []
    for index, begin in enumerate(range(0, case.num_tokens, case.chunk_tokens)):
        place = (slice(None), slice(begin, begin + case.chunk_tokens))
        chunks.append(
            Chunk(
                tokens=tokens[place],
                targets=targets[place],
                loss_weight=weights[place],
                starts=starts[place] if starts[place].any() else None,
                index=index,
                has_loss=bool(weights[place].any()),
            )
        )
    return chunks


def make_state(case: Case, model: Finch) -> ModelState:
    """A random state before the first chunk."""
    generator = torch.Generator().manual_seed(7)
    zeros = ModelState.zeros(model.config, 2, dtype=torch.float64, device="cpu")
    return ModelState(*(torch.randn(t.shape, generator=generator, dtype=t.dtype).to(model.state_dtype) for t in zeros))


def run_case(case: Case, model: Finch, chunks: list[Chunk]) -> dict[str, Any]:
    """The gradient of a case by `backward_through_windows`: everything it gives, by name."""
    objective = ChunkObjective(model)

    def call(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        # As an engine does.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.dtype == torch.bfloat16):
            return objective(*arguments, **options)

    result = backward_through_windows(call, chunks, make_state(case, model), window=case.window, weight_total=10.0)
    return {
        "loss": result.loss_sum,
        "states": list(result.state),
        "initial_gradients": list(result.initial_state_gradient),
        "largest_difference": float(result.largest_difference),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


# The recurrence alone

OPERATOR_CASES = {
    "no starts": ((), ()),
    "starts": ((1, 2, 17, 30), (9,)),
    "starts at borders": ((0, 9, 36), (18, 27)),
}
OPERATOR_TOKENS = 37


def operator_inputs(starts: tuple[tuple[int, ...], ...]) -> tuple[dict[str, Tensor], Tensor | None, list[Tensor]]:
    """Leaves by name, starts, and the gradients of output and state; decays from exp(-exp(-12)) to exp(-exp(8))."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    by_token, heads = (2, OPERATOR_TOKENS, 2, 4), (2, 4)
    leaves = {
        "receptance": normal(*by_token),
        "key": normal(*by_token),
        "value": normal(*by_token),
        "raw_decay": torch.rand(by_token, generator=generator, dtype=torch.float64) * 20 - 12,
        "bonus": normal(*heads),
        "state": normal(2, *heads, 4),
        "start_state": normal(*heads, 4),
    }
    # A channel that keeps what it has.
    leaves["raw_decay"][..., 0] = -12
    where = torch.zeros(2, OPERATOR_TOKENS, dtype=torch.bool)
    for row, places in enumerate(starts):
        where[row, list(places)] = True
    return leaves, where if where.any() else None, [normal(*by_token), normal(2, *heads, 4)]


BY_TOKEN = ("receptance", "key", "value", "raw_decay")


def run_operator(group: TimeGroup, starts: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Outputs and gradients of this rank's slice."""
    leaves, where, (output_gradient, state_gradient) = operator_inputs(starts)
    place = slice(OPERATOR_TOKENS * group.rank // group.size, OPERATOR_TOKENS * (group.rank + 1) // group.size)
    mine = {name: (leaf[:, place] if name in BY_TOKEN else leaf).clone() for name, leaf in leaves.items()}
    for leaf in mine.values():
        leaf.requires_grad_()
    sliced = SlicedWkv6(
        group,
        mine["key"],
        mine["value"],
        mine["raw_decay"],
        mine["state"],
        starts=None if where is None else where[:, place],
        start_state=mine["start_state"],
        backend=None,
    )
    output, state = sliced.run(mine["receptance"], mine["bonus"])
    torch.autograd.backward([output, state], [output_gradient[:, place], state_gradient])
    gradients = {name: leaf.grad for name, leaf in mine.items()}
    return {"output": output.detach(), "state": state.detach(), "gradients": gradients}
