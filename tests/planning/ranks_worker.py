"""One of two processes: what a step holds and sends, under DDP and FSDP2. Argument: the file for what was found."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from infctx.adapters.peft_adapters import attach_lora
from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.planning import memory
from infctx.planning.live_bytes import LiveBytes
from infctx.planning.memory import ChunkPlan, plan_memory
from infctx.planning.spread import Spread, Strategy
from infctx.planning.traffic import chunk_messages
from infctx.training import deepspeed_config
from infctx.training.bptt import ChunkObjective
from infctx.training.engine import Engine
from infctx.training.fabric_run import DeepSpeedEngine, open_engine
from infctx_kernels import linear as products
from tests.conftest import random_finch

TOKENS, CHUNKS, VOCAB_SIZE = 32, 2, 512
STEP_TOKENS = TOKENS * CHUNKS


class Counted(LiveBytes):
    """Counts what this rank receives, too."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__(existing)
        self.received = {"_allgather_base_": 0, "_reduce_scatter_base_": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func).removeprefix("c10d.").removesuffix(".default")
        if name in self.received:
            self.received[name] += abs(args[0].nbytes - args[1].nbytes)
        return super().__torch_dispatch__(func, types, args, kwargs)


def main() -> None:
    # What oneDNN makes for itself is seen by nobody.
    products.onednn_is_faster = lambda: False
    # Buckets beside which a small model can be seen.
    deepspeed_config.BUCKET_ELEMENTS = memory.BUCKET_ELEMENTS = 200_000
    found = [
        measure(strategy, is_lora=is_lora, is_recomputed=is_recomputed)
        for strategy in ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
        for is_lora in (False, True)
        for is_recomputed in (False, True)
        # What recomputing saves is the same whoever keeps the weights.
        if not (is_recomputed and (is_lora or strategy.startswith("deepspeed")))
    ]
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))


def measure(strategy: Strategy, *, is_lora: bool, is_recomputed: bool) -> dict[str, int | str]:
    of_others = _tensors()
    model = random_finch(
        n_layer=6, n_embd=128, head_size=32, dim_ffn=448, lerp_rank=8, decay_rank=8, vocab_size=VOCAB_SIZE
    )
    if is_lora:
        attach_lora(model, rank=8, alpha=16.0, targets=["receptance", "key", "value", "gate", "output"])
    model.train().recompute_layers(is_recomputed)
    spread = Spread(ranks=2, strategy=strategy)
    chunk = ChunkPlan(chunk_tokens=TOKENS, boundary_states=CHUNKS - 1, is_recomputed=is_recomputed)
    model.compute_dtype = torch.float32
    plan = plan_memory(model, chunk, spread=spread, device="cpu")
    messages = chunk_messages(
        model, spread, rows=1, chunks=CHUNKS, sweep_1_chunks=CHUNKS - 1, is_recomputed=is_recomputed
    )
    engine = open_engine(devices=2, strategy=strategy, precision="fp32", hang_seconds=120.0)
    objective = engine.setup(
        ChunkObjective(model),
        lambda: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=False),
    )
    between: list[int] = []
    step(model, objective, engine, None, between)
    engine.forget_gradient()
    between.clear()
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    existing = [_local(tensor) for tensor in [*model.parameters(), *moments, *gradients]]
    if strategy.startswith("deepspeed"):
        # It keeps pieces of its own, which only the interpreter knows all of.
        existing = [tensor for tensor in _tensors() if not any(tensor is other for other in of_others)]
    kept = sum(_local(gradient).nbytes for gradient in gradients)
    with Counted(existing) as live:
        before = live.now()
        step(model, objective, engine, live, between)
    engine.ranks.close()
    boundaries = plan.device["boundary states"]
    own = sum(_local(p).nbytes for p in model.parameters() if p.requires_grad)
    return {
        "strategy": strategy,
        # A block of boundary states is far larger than all else here.
        "planned": plan.tensor_bytes - boundaries,
        "measured": live.largest - boundaries,
        "gathered": live.received["_allgather_base_"],
        "planned gathered": _planned(messages, "parameters"),
        "reduced": live.received["_reduce_scatter_base_"],
        "planned reduced": _planned(messages, "gradients"),
        # Beside what was there, the gradient and the states; the graph of the chunk is gone.
        "between chunks": max(between) - before - boundaries + kept,
        "own gradient": own,
        "states": plan.device["states of the chunk"],
    }


def _planned(messages: list, what: str) -> int:  # type: ignore[type-arg]
    return sum(message.received_bytes * message.count for message in messages if message.what == what)


def _tensors() -> list[Tensor]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, Tensor)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def step(model: Finch, objective: torch.nn.Module, engine: Engine, live: LiveBytes | None, between: list[int]) -> None:
    """A document of two chunks, exactly, and the update."""
    from infctx.training.bptt import backward_through_windows

    tokens = torch.randint(0, VOCAB_SIZE, (1, STEP_TOKENS))
    chunks = [
        Chunk(
            tokens=tokens[:, at : at + TOKENS],
            targets=tokens[:, at : at + TOKENS],
            loss_weight=torch.ones(1, TOKENS),
            starts=None,
            index=at // TOKENS,
            has_loss=True,
        )
        for at in range(0, STEP_TOKENS, TOKENS)
    ]

    def backward(scalar: Tensor) -> None:
        engine.backward(scalar)
        # What only a cycle of references keeps.
        gc.collect()
        between.append(live.now() if live is not None else 0)

    state = ModelState.zeros(model.config, 1, dtype=torch.float32, device="cpu")
    backward_through_windows(
        objective,
        chunks,
        state,
        window="document",
        weight_total=float(STEP_TOKENS),
        backward=backward,
        expect=(lambda is_last: engine.expect(is_last=is_last)) if isinstance(engine, DeepSpeedEngine) else None,
    )
    engine.update(1.0)


if __name__ == "__main__":
    main()
