"""Tables of planned memory and time for the released sizes, and the plan's errors where it can be checked here.

    python benchmarks/memory_plan.py [--page docs/memory.md] [--output FILE] [--without-checks]

Memory of each of 8 ranks and the seconds of a document come from `infctx.planning`, from sizes alone. The checks: one
forward and backward pass of small models on this CPU against the time model fed with the rate of this machine's matrix
products (a rate of one shape, one thread), and every tensor alive in a step against the planned peak.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from infctx.adapters.peft_adapters import attach_lora
from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.model.state import ModelState
from infctx.planning.live_bytes import LiveBytes
from infctx.planning.memory import ChunkPlan, plan_memory
from infctx.planning.planned_model import planned_model, released_shape
from infctx.planning.spread import Spread
from infctx.planning.time_model import Machine, Work, flops_per_token, plan_time
from infctx.recipe.schema import Recipe
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx_kernels.linear import linear

SIZES = ("1.6b", "3b", "7b", "14b")
STRATEGIES = (
    ("ddp", "none"),
    ("deepspeed_1", "none"),
    ("deepspeed_2", "none"),
    ("deepspeed_2", "optimizer"),
    ("deepspeed_3", "none"),
    ("deepspeed_3", "all"),
    ("fsdp", "none"),
    ("fsdp", "all"),
)
RANKS, CHUNK, DOCUMENT = 8, 4096, 131_072
TARGETS = ["receptance", "key", "value", "gate", "output"]


def model_of(size: str, kind: str) -> Finch:
    """A released size on the meta device, trained whole or by LoRA of rank 32."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": "none.pth"},
            "data": {"path": "none.txt"},
            "adapter": {"kind": kind},
            "optimizer": {"lr": 1e-5},
            "run": {"folder": "none", "steps": 1},
        }
    )
    return planned_model(recipe.resolved(), released_shape(size), precision="bf16")


def memory_table() -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        for kind in ("full", "lora"):
            model = model_of(size, kind)
            for strategy, offload in STRATEGIES:
                chunk = ChunkPlan(chunk_tokens=CHUNK, boundary_states=DOCUMENT // CHUNK, is_recomputed=True)
                spread = Spread(ranks=RANKS, strategy=strategy, offload=offload)
                plan = plan_memory(model, chunk, spread=spread)
                rows.append(
                    {
                        "size": size,
                        "kind": kind,
                        "strategy": strategy,
                        "offload": offload,
                        "device_bytes": plan.device_bytes,
                        "host_bytes": plan.host_bytes,
                        "parts": plan.device,
                    }
                )
    return rows


def time_table(machine: Machine) -> list[dict[str, Any]]:
    rows = []
    for size in ("7b", "14b"):
        model = model_of(size, "full")
        for ranks in (1, 8, 64):
            for shared in sorted({1, min(8, ranks), ranks}):
                for document in (65_536, 1_048_576, 10_485_760):
                    spread = Spread(ranks=ranks, strategy="single" if ranks == 1 else "fsdp", time_parallel=shared)
                    # Slices of 16k tokens, or what there is of the document.
                    chunk = min(16_384 * shared, document)
                    work = Work(document_tokens=document, chunk_tokens=chunk, is_recomputed=True)
                    found = plan_time(model, work, spread=spread, machine=machine)
                    rows.append(
                        {
                            "size": size,
                            "ranks": ranks,
                            "time_parallel": shared,
                            "document_tokens": document,
                            "seconds": found.seconds,
                            "documents": found.documents,
                            "efficiency": found.efficiency,
                            "received_bytes": found.received_bytes,
                        }
                    )
    return rows


def small_model(channels: int, kind: str) -> Finch:
    torch.manual_seed(0)
    model = Finch(new_config(version="6", n_layer=4, n_embd=channels, vocab_size=2048))
    initialise_(model, seed=0)
    if kind == "lora":
        attach_lora(model, rank=8, alpha=16.0, targets=TARGETS)
    return model.train()


def check_times() -> dict[str, Any]:
    """Predicted against measured processor seconds of steps with sweep 1, on one thread of this machine.

    The rate of the matrix products is taken before and after each step: others may share the machine.
    """
    torch.set_num_threads(1)
    rows, tokens = [], 512
    for channels in (256, 512, 768):
        x, weight = torch.randn(tokens, channels), torch.randn(int(3.5 * channels), channels)

        def product(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            linear(x, weight)

        for kind in ("full", "lora"):
            model = small_model(channels, kind)
            gradient(model, tokens, 2)
            found = []
            for _ in range(3):
                before = seconds(product, 30)
                step = seconds(lambda m=model: gradient(m, tokens, 4), 1)
                after = seconds(product, 30)
                found.append((step, 2 * x.shape[0] * weight.numel() / ((before + after) / 2)))
            measured, rate = min(found)
            work = Work(document_tokens=4 * tokens, chunk_tokens=tokens)
            predicted = plan_time(model, work, spread=Spread(), machine=Machine(flops_per_second=rate)).seconds
            rows.append(
                {
                    "channels": channels,
                    "kind": kind,
                    "gemm_flops_per_second": rate,
                    "predicted_seconds": predicted,
                    "measured_seconds": measured,
                    "share_of_gemm_rate": predicted / measured,
                }
            )
    shares = [row["share_of_gemm_rate"] for row in rows]
    middle = statistics.median(shares)
    return {
        "rows": rows,
        "median_share_of_gemm_rate": middle,
        "largest_error_with_that_share": max(abs(share / middle - 1) for share in shares),
    }


def check_memory() -> list[dict[str, Any]]:
    """Planned against counted bytes at the busiest moment of a gradient, weights and activations."""
    rows, tokens = [], 256
    for kind in ("full", "lora"):
        for again in (False, True):
            model = small_model(256, kind)
            model.recompute_layers(again)
            gradient(model, tokens, 1)
            model.zero_grad()
            with LiveBytes(model.parameters()) as live:
                gradient(model, tokens, 3)
            plan = plan_memory(
                model, ChunkPlan(chunk_tokens=tokens, boundary_states=2, is_recomputed=again), device="cpu"
            )
            # There is no optimizer here, and small states are kept in blocks of 16 MB.
            blocks = plan.device["boundary states"]
            counted = live.largest - blocks
            planned = plan.tensor_bytes - plan.device["optimizer moments"] - blocks
            rows.append({"kind": kind, "is_recomputed": again, "planned": planned, "counted": counted})
    return rows


def gradient(model: Finch, tokens: int, num_chunks: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    weight = torch.ones(1, tokens)
    chunks = [
        Chunk(tokens=ids, targets=ids, loss_weight=weight, starts=None, index=index, has_loss=True)
        for index in range(num_chunks)
    ]
    state = ModelState.zeros(model.config, 1, dtype=torch.float32, device="cpu")
    backward_through_windows(
        ChunkObjective(model), chunks, state, window="document", weight_total=float(tokens * num_chunks)
    )


def seconds(call: Any, times: int) -> float:
    """Processor seconds of one of some calls."""
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def page(memory: list[dict[str, Any]], times: list[dict[str, Any]], machine: Machine) -> str:
    """Both tables in Markdown."""
    columns = [f"{strategy}{'' if offload == 'none' else f', offload {offload}'}" for strategy, offload in STRATEGIES]
    lines = [
        "# Memory and time, as planned",
        "",
        "Written by `python benchmarks/memory_plan.py`; nothing here was measured on a GPU. `infctx plan` gives",
        "the same for a recipe, by part.",
        "",
        f"GB on each of {RANKS} GPUs: chunk {CHUNK:,}, exact gradient over {DOCUMENT:,} tokens, bf16 compute, trained",
        "weights, gradients and moments in float32, layers recomputed, every rank its own document. LoRA of rank 32.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for size in SIZES:
        for kind in ("full", "lora"):
            found = [row for row in memory if (row["size"], row["kind"]) == (size, kind)]
            cells = [f"{row['device_bytes'] / 1e9:.1f}" for row in found]
            lines.append(f"| {size} {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        "Seconds of a step of full fine-tuning with the exact gradient, FSDP2, layers recomputed, slices of 16,384",
        f"tokens; assumed {machine.flops_per_second / 1e12:g} TFLOP/s of a GPU, "
        f"{machine.in_node_bytes_per_second / 1e9:g} GB/s in a machine of 8 and "
        f"{machine.between_nodes_bytes_per_second / 1e9:g} GB/s between machines.",
        "",
        "| model | GPUs | share a chunk | document | seconds | documents of the step | efficiency |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in times:
        lines.append(
            f"| {row['size']} | {row['ranks']} | {row['time_parallel']} | {row['document_tokens']:,} | "
            f"{row['seconds']:,.1f} | {row['documents']} | {row['efficiency']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/memory.md"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory_plan.json"))
    parser.add_argument("--without-checks", action="store_true")
    arguments = parser.parse_args()
    machine = Machine()
    memory, times = memory_table(), time_table(machine)
    found: dict[str, Any] = {"memory": memory, "time": times, "assumed": machine.assumptions()}
    found["flops_per_token"] = {size: flops_per_token(model_of(size, "full")).model for size in SIZES}
    if not arguments.without_checks:
        found["checks"] = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "time": check_times(),
            "memory": check_memory(),
        }
        print(json.dumps(found["checks"], indent=1))
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    arguments.page.write_text(page(memory, times, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
