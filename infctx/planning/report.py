"""A plan in words, and as one JSON object."""

from __future__ import annotations

from typing import Any

from infctx.planning.from_recipe import RecipePlan
from infctx.surgery.info import released_name

_ACTIVATION_ADVICE = "a shorter bptt.chunk_tokens, fewer run.rows, or run.time_parallel over more devices"
_WEIGHT_ADVICE = "run.strategy: fsdp or deepspeed_3 on more devices"
_TRAINED_ADVICE = "adapter.kind: lora, run.strategy: fsdp or deepspeed_3 on more devices, or run.offload: all"
# What to change, by the part that takes most.
_ADVICE = {
    "frozen weights": f"model.quantize: nf4 (one device, ddp), {_WEIGHT_ADVICE}",
    "trained weights": _TRAINED_ADVICE,
    "averaged weights": "no optimizer.ema_decay",
    "gradients": _TRAINED_ADVICE,
    "optimizer moments": f"optimizer.name: adamw-8bit or adamw-offloaded on one device; {_TRAINED_ADVICE}",
    "gathered parameters": "run.strategy: fsdp, which holds two blocks at a time, or a model of fewer layers at once",
    "activations": _ACTIVATION_ADVICE,
    "weights in compute precision": "adapter.kind: lora",
    "working memory": _ACTIVATION_ADVICE,
    "communication buckets": "run.strategy: fsdp, or for DeepSpeed a smaller reduce_bucket_size in run.deepspeed",
    "states of the chunk": "fewer run.rows",
    "boundary states": "bptt.boundaries: host, or bptt.thin_boundaries: true",
    "runtime": "a device with more memory",
}


def plan_as_json(plan: RecipePlan) -> dict[str, Any]:
    """Everything the plan holds, in bytes and seconds."""
    return {
        "fits": plan.fits,
        "device_bytes": plan.memory.device_bytes,
        "device_memory": plan.device_memory,
        "parts": plan.memory.device,
        "host_bytes": plan.memory.host_bytes,
        "host_parts": plan.memory.host,
        "largest_part": plan.memory.largest,
        "advice": advice(plan),
        "ranks": plan.spread.ranks,
        "strategy": plan.spread.strategy,
        "time_parallel": plan.spread.time_parallel,
        "activations": "recompute" if plan.chunk.is_recomputed else "keep",
        "device_bytes_if_recomputed": plan.memory_if_recomputed.device_bytes if plan.memory_if_recomputed else None,
        "parameters": plan.num_parameters,
        "trained": plan.num_trained,
        "document_tokens": plan.document_tokens,
        "times": [
            {
                "document_tokens": tokens,
                "seconds": time.seconds,
                "waiting_seconds": time.waiting_seconds,
                "documents": time.documents,
                "tokens_per_second": time.tokens_per_second,
                "efficiency": time.efficiency,
                "received_bytes": time.received_bytes,
            }
            for tokens, time in plan.times.items()
        ],
        "assumed": plan.machine.assumptions(),
    }


def plan_in_words(plan: RecipePlan) -> list[str]:
    """The same as lines for people."""
    spread, config = plan.spread, plan.config
    name = released_name(config) or {"6": "Finch", "5.2": "Eagle"}[config.version]
    shared = f", {spread.time_parallel} share each chunk" if spread.time_parallel > 1 else ""
    offload = f", offload {spread.offload}" if spread.offload != "none" else ""
    machines = f" on {spread.num_nodes} machines" if spread.num_nodes > 1 else ""
    lines = [
        f"model      {name}, {plan.num_parameters:,} parameters, {plan.num_trained:,} trained, {plan.precision}",
        f"ranks      {spread.ranks}{machines}, {spread.strategy}{offload}{shared}",
        f"chunk      {plan.chunk.tokens_at_once(spread):,} tokens on each rank, activations "
        f"{'recomputed layer by layer' if plan.chunk.is_recomputed else 'kept'}; documents of "
        f"{plan.document_tokens:,} tokens",
        "",
        "Memory of the rank that needs most:",
        *_part_lines(plan.memory.device),
        f"  {'together':<30}{_gigabytes(plan.memory.device_bytes):>12}",
    ]
    if plan.memory.host:
        lines += ["Host memory for each rank:", *_part_lines(plan.memory.host)]
    if plan.memory_if_recomputed is not None:
        again = _gigabytes(plan.memory_if_recomputed.device_bytes).strip()
        lines.append(f"With bptt.activations: recompute it would be {again}.")
    lines += [*_verdict(plan), "", *_time_lines(plan)]
    return lines


def advice(plan: RecipePlan) -> str | None:
    """What to change where the device has no room; None where it has, or was not told."""
    if plan.fits is not False:
        return None
    largest = plan.memory.largest
    if plan.memory_if_recomputed is not None and largest == "activations":
        return f"bptt.activations: recompute, {_ADVICE[largest]}"
    return _ADVICE[largest]


def _part_lines(parts: dict[str, int]) -> list[str]:
    return [f"  {part:<30}{_gigabytes(size):>12}" for part, size in sorted(parts.items(), key=lambda part: -part[1])]


def _verdict(plan: RecipePlan) -> list[str]:
    if plan.device_memory is None:
        return ["Whether it fits: give --device-memory, as 24GB."]
    room = _gigabytes(plan.device_memory).strip()
    if plan.fits:
        return [f"It fits a device of {room}. Gaps between tensors are not counted: leave some of it."]
    return [f"It does NOT fit a device of {room}. The largest part is {plan.memory.largest}; try {advice(plan)}."]


def _time_lines(plan: RecipePlan) -> list[str]:
    machine = plan.machine
    lines = [
        f"Time of a step by a model, not measured on a GPU. Assumed: {machine.flops_per_second / 1e12:g} TFLOP/s of a "
        f"device in training, links of {machine.in_node_bytes_per_second / 1e9:g} GB/s in a machine and "
        f"{machine.between_nodes_bytes_per_second / 1e9:g} GB/s between machines.",
        f"  {'document tokens':>16}{'documents':>11}{'seconds':>12}{'tokens/s':>13}{'efficiency':>12}",
    ]
    for tokens, time in plan.times.items():
        lines.append(
            f"  {tokens:>16,}{time.documents:>11,}{time.seconds:>12,.1f}{time.tokens_per_second:>13,.0f}"
            f"{time.efficiency:>12.0%}"
        )
    return lines


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
