"""The planned memory is the counted one: what is saved, what is stored, and the busiest moment of a step.

Oracles: the tensors themselves. autograd's saved tensors, one by one; the optimizer's state; every storage alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from infctx.adapters.peft_adapters import attach_lora
from infctx.adapters.quantized_base import quantize_
from infctx.data.chunking import Chunk
from infctx.model import cached_attention
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.planning.activations import activation_bytes_per_token
from infctx.planning.attention_memory import CachePlan
from infctx.planning.live_bytes import LiveBytes
from infctx.planning.memory import ChunkPlan, OptimizerPlan, plan_memory
from infctx.planning.spread import Spread
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx.training.optim import make_optimizer, parameter_groups
from infctx.training.precision import apply_precision_
from infctx_kernels import linear as products

ALL_MATRICES = ("receptance", "key", "value", "gate", "output")
OF_ATTENTION = ("query", "key", "value", "output")
OF_TIME_MIX = ("time_mix.receptance", "time_mix.key", "time_mix.value", "gate", "output")
CHUNKS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """targets: of a LoRA; None = full fine-tuning."""

    version: str = "6"
    targets: tuple[str, ...] | None = None
    precision: str = "fp32"
    is_recomputed: bool = False
    quantize: str | None = None
    dropout: float = 0.0

    def __str__(self) -> str:
        names = {None: "full", ALL_MATRICES: "lora", OF_ATTENTION: "lora"}
        trained = names.get(self.targets, "lora-in-time-mix")
        again = "recomputed" if self.is_recomputed else "kept"
        return "-".join(filter(None, [self.version, trained, self.precision, again, self.quantize]))


@pytest.fixture(autouse=True)
def _products_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are for GPUs, whose products keep the inputs of trained matrices only; oneDNN's keep all of them."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)


def small_model(make_finch: Callable[..., Finch], case: Case) -> Finch:
    """In the proportions of released models, but for the vocabulary."""
    sizes = {"n_layer": 4, "n_embd": 128, "head_size": 32, "dim_ffn": 448, "lerp_rank": 8, "decay_rank": 8}
    model = make_finch(case.version, vocab_size=1024, **sizes)
    if case.quantize:
        quantize_(model, case.quantize)
    if case.targets is not None:
        attach_lora(model, rank=8, alpha=16.0, targets=case.targets, dropout=case.dropout)
    apply_precision_(model, case.precision)
    model.train()
    model.recompute_layers(case.is_recomputed)
    return model


def objective_of(model: Finch, case: Case) -> Callable[..., tuple[Tensor, ...]]:
    objective = ChunkObjective(model)

    def call(*inputs: Tensor | None, **options: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.precision == "bf16"):
            return objective(*inputs, **options)

    return call


def chunk_of(model: Finch, num_tokens: int, index: int = 0) -> Chunk:
    tokens = torch.randint(0, model.config.vocab_size, (1, num_tokens))
    weight = torch.ones(1, num_tokens)
    return Chunk(tokens=tokens, targets=tokens, loss_weight=weight, starts=None, index=index, has_loss=True)


def zeros(model: Finch) -> ModelState:
    return ModelState.zeros(model.config, 1, dtype=torch.float32, device="cpu")


def optimizer_of(model: Finch, name: str = "adamw") -> torch.optim.Optimizer:
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0, decay_lr_multiplier=1.0)
    return make_optimizer(groups, name=name, lr=1e-4, betas=(0.9, 0.99), eps=1e-8, device=torch.device("cpu"))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def take_steps(model: Finch, case: Case, *, chunk_tokens: int) -> tuple[int, torch.optim.Optimizer]:
    """Two steps; the bytes alive at the busiest moment of the second."""
    objective, optimizer = objective_of(model, case), optimizer_of(model)
    chunks = [chunk_of(model, chunk_tokens, index) for index in range(CHUNKS)]
    total = float(chunk_tokens * CHUNKS)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward_through_windows(objective, chunks, zeros(model), window="document", weight_total=total)
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    with LiveBytes([*model.parameters(), *model.buffers(), *state_tensors(optimizer)]) as live:
        step()
    return live.largest, optimizer


CASES = [
    Case(),
    Case(precision="bf16", is_recomputed=True),
    Case(targets=ALL_MATRICES, precision="bf16"),
    Case(targets=ALL_MATRICES, precision="bf16", is_recomputed=True),
    Case(targets=OF_TIME_MIX, precision="bf16", is_recomputed=True, quantize="nf4"),
    Case(targets=ALL_MATRICES, quantize="int8"),
    Case(version="5.2", is_recomputed=True),
    Case(version="5.2", targets=OF_TIME_MIX, precision="bf16"),
    Case(version="6c2"),
    Case(version="6c2", targets=OF_ATTENTION[1:], precision="bf16"),
    Case(version="goldfinch"),
    Case(version="goldfinch", precision="bf16", is_recomputed=True),
    Case(version="goldfinch", targets=OF_ATTENTION, precision="bf16"),
    Case(version="gptalpha"),
    Case(version="gptalpha", targets=OF_ATTENTION, precision="bf16", is_recomputed=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_planned_peak_is_the_counted_one(
    make_finch: Callable[..., Finch], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many as a small model has channels, as in a large one.
    monkeypatch.setattr(cached_attention, "KEYS_AT_ONCE", 128)
    model, chunk_tokens = small_model(make_finch, case), 192
    counted, _ = take_steps(model, case, chunk_tokens=chunk_tokens)
    num_tokens = CHUNKS * chunk_tokens
    chunk = ChunkPlan(
        chunk_tokens=chunk_tokens,
        boundary_states=CHUNKS - 1,
        is_recomputed=case.is_recomputed,
        cache=CachePlan(window_tokens=num_tokens, kept_tokens=num_tokens),
    )
    plan = plan_memory(model, chunk, device="cpu")
    # Small states come in blocks of 16 MB, beside which every error would look small.
    block = plan.device["boundary states"]
    assert plan.tensor_bytes - block == pytest.approx(counted - block, rel=0.05)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
@pytest.mark.parametrize("targets", [ALL_MATRICES, OF_TIME_MIX], ids=["lora", "lora-in-time-mix"])
def test_onednn_keeps_the_inputs_of_frozen_matrices(
    make_finch: Callable[..., Finch], targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, chunk_tokens = Case(targets=targets), 192
    model, chunk = small_model(make_finch, case), ChunkPlan(chunk_tokens=192, boundary_states=CHUNKS - 1)
    without = plan_memory(model, chunk, device="cpu")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    plan = plan_memory(model, chunk, device="cpu")
    assert plan.device["activations"] > 1.05 * without.device["activations"]
    counted, _ = take_steps(model, case, chunk_tokens=chunk_tokens)
    block = plan.device["boundary states"]
    assert plan.tensor_bytes - block == pytest.approx(counted - block, rel=0.05)


def test_the_update_of_a_large_tensor_can_be_the_busiest_moment(make_finch: Callable[..., Finch]) -> None:
    model, chunk = make_finch(vocab_size=200_000).train(), ChunkPlan(chunk_tokens=4, boundary_states=CHUNKS - 1)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.embedding.weight)
    counted, _ = take_steps(model, Case(), chunk_tokens=4)
    plan = plan_memory(model, chunk, device="cpu")
    # The boundary states are gone by then.
    assert plan.device["update of the weights"] > 0
    assert plan.tensor_bytes == pytest.approx(counted, rel=0.05)


# Nothing is saved by a recomputed block until it is computed again.
@pytest.mark.parametrize("case", [case for case in CASES if not case.is_recomputed], ids=str)
def test_saved_tensors_are_those_of_the_formula(make_finch: Callable[..., Finch], case: Case) -> None:
    model = small_model(make_finch, case)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def saved_bytes(num_tokens: int) -> int:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        chunk, state = chunk_of(model, num_tokens), zeros(model).leaves()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = objective_of(model, case)(
                chunk.tokens, chunk.targets, chunk.loss_weight, None, *state, with_loss=True
            )
        del outputs
        return sum(saved.values())

    hidden_bytes = 2 if case.precision == "bf16" else 4
    planned = activation_bytes_per_token(model, hidden_bytes=hidden_bytes, device="cpu")
    assert saved_bytes(64) - saved_bytes(32) == 32 * planned.kept


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_weights_gradients_and_moments_are_exact(make_finch: Callable[..., Finch], name: str) -> None:
    # With a LoRA every tensor is too small for 8 bits.
    targets = ALL_MATRICES if name == "adamw" else None
    model = small_model(make_finch, Case(targets=targets, precision="bf16"))
    optimizer, trained = optimizer_of(model, name), [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plan = plan_memory(model, ChunkPlan(chunk_tokens=8), optimizer=OptimizerPlan(name=name), device="cpu").device
    assert plan.get("frozen weights", 0) == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert plan["trained weights"] == sum(p.nbytes for p in trained)
    assert plan["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    # Beside them an optimizer keeps a step count of each tensor, and bitsandbytes a table of 256 levels.
    moments = [tensor for tensor in state_tensors(optimizer) if tensor.numel() not in (1, 256)]
    assert plan["optimizer moments"] == sum(tensor.nbytes for tensor in moments)


def test_averages_and_moments_in_host_memory(make_finch: Callable[..., Finch]) -> None:
    model = small_model(make_finch, Case())
    numbers = sum(p.numel() for p in model.parameters())
    plan = plan_memory(
        model, ChunkPlan(chunk_tokens=8), optimizer=OptimizerPlan(name="adamw-offloaded", is_averaged=True)
    )
    assert plan.device["averaged weights"] == 4 * numbers
    assert "optimizer moments" not in plan.device
    # Master weights, two moments and, while it steps, gradients.
    assert plan.host["optimizer moments"] == 16 * numbers
    # On a CPU all of it is one memory, and gradients are there already.
    there = plan_memory(model, ChunkPlan(chunk_tokens=8), optimizer=OptimizerPlan(name="adamw-offloaded"), device="cpu")
    assert (there.device["optimizer moments"], there.host) == (12 * numbers, {})


STRATEGIES = {
    # strategy -> parts of trained weights, gradients and moments that one of 4 ranks holds
    "ddp": (1, 1, 1),
    "deepspeed_1": (1, 1, 4),
    "deepspeed_2": (1, 4, 4),
    "deepspeed_3": (4, 4, 4),
    "fsdp": (4, 4, 4),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_divided_among_ranks(make_finch: Callable[..., Finch], strategy: str) -> None:
    model, ranks = small_model(make_finch, Case()), 4
    whole = plan_memory(model, ChunkPlan(chunk_tokens=8)).device
    plan = plan_memory(model, ChunkPlan(chunk_tokens=8), spread=Spread(ranks=ranks, strategy=strategy)).device
    for part, divisor in zip(("trained weights", "gradients", "optimizer moments"), STRATEGIES[strategy], strict=True):
        expected = whole[part] / divisor
        if strategy.startswith("deepspeed") and part == "optimizer moments":
            # Its optimizers step on a float32 copy of their part of the weights.
            expected *= 12 / 8
        assert plan[part] == pytest.approx(expected, rel=0.02), part


def test_a_rank_of_fsdp_holds_rows(make_finch: Callable[..., Finch]) -> None:
    model, ranks = small_model(make_finch, Case()), 3
    plan = plan_memory(model, ChunkPlan(chunk_tokens=8), spread=Spread(ranks=ranks, strategy="fsdp")).device
    assert plan["trained weights"] == sum(p.detach().chunk(ranks, dim=0)[0].numel() * 4 for p in model.parameters())
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.blocks]
    others = sum(p.nbytes for p in model.parameters()) - sum(blocks)
    assert plan["gathered parameters"] == others + blocks[0] + blocks[1]


def test_ranks_that_share_a_chunk_share_its_activations(make_finch: Callable[..., Finch]) -> None:
    model = small_model(make_finch, Case(targets=ALL_MATRICES))
    shared = ChunkPlan(chunk_tokens=4096, boundary_states=4)
    apart = plan_memory(model, ChunkPlan(chunk_tokens=1024, boundary_states=4), spread=Spread(ranks=4, strategy="ddp"))
    together = plan_memory(model, shared, spread=Spread(ranks=4, strategy="ddp", time_parallel=4))
    assert together.device == apart.device


def test_offload_leaves_the_device_what_it_computes_with(make_finch: Callable[..., Finch]) -> None:
    model, chunk = small_model(make_finch, Case()), ChunkPlan(chunk_tokens=8)
    whole = plan_memory(model, chunk, spread=Spread(ranks=2, strategy="fsdp"))
    offloaded = plan_memory(model, chunk, spread=Spread(ranks=2, strategy="fsdp", offload="all"))
    moved = {"trained weights", "gradients", "optimizer moments"}
    assert offloaded.host == {part: size for part, size in whole.device.items() if part in moved}
    assert offloaded.device == {part: size for part, size in whole.device.items() if part not in moved}


def test_the_cache_is_counted_where_it_is(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("goldfinch")
    num_tokens, rows, width = 1000, 2, model.config.cache_width
    cache = CachePlan(window_tokens=num_tokens, kept_tokens=num_tokens)
    here = plan_memory(model, ChunkPlan(chunk_tokens=8, rows=rows, cache=cache))
    there = plan_memory(model, ChunkPlan(chunk_tokens=8, rows=rows, cache=replace(cache, on_host=True)))
    gradient = rows * num_tokens * 4 * width
    assert here.device["cache of the tokens"] == rows * num_tokens * 4 + gradient
    assert here.device["gradient of the cache"] >= gradient
    # With the sums of one chunk, and the copy that autograd makes of them.
    assert there.host == {
        "cache of the tokens": rows * num_tokens * 4 + gradient,
        "gradient of the cache": 3 * gradient,
    }
    assert not {"cache of the tokens", "gradient of the cache"} & there.device.keys()
    # A CPU has no other memory; a model without attention no cache.
    on_cpu = plan_memory(model, ChunkPlan(chunk_tokens=8, cache=replace(cache, on_host=True)), device="cpu")
    assert on_cpu.device["cache of the tokens"] == num_tokens * (4 + 4 * width)
    assert "cache of the tokens" not in plan_memory(make_finch("6c2"), ChunkPlan(chunk_tokens=8)).device


def test_live_bytes_counts_each_storage_once() -> None:
    first = torch.empty(1000)
    with LiveBytes([first]) as live:
        second = first * 2
        view = second.view(10, 100)
        assert live.now() == 8000
        del second
        assert live.now() == 8000
        del view
        assert live.now() == 4000
        third = torch.empty(500)
        third.untyped_storage().resize_(0)
        assert live.now() == 4000
    assert live.largest == 8000
