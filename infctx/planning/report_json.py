"""A plan as one JSON object: bytes and seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from infctx.planning.recipe_plan import RecipePlan, short_of
from infctx.planning.report import Report, command
from infctx.planning.settings import ORDER
from infctx.training.cache_place import cache_bytes


def report_as_json(report: Report) -> dict[str, Any]:
    """Everything the report holds."""
    plan, fitting = report.plan, report.fitting
    return {
        "fits": plan.fits,
        "short_of": short_of(plan.needs, plan.target.room),
        "device": {**asdict(report.device), "room": asdict(plan.target.room)},
        "device_bytes": plan.memory.device_bytes,
        "device_memory": plan.target.room.device,
        "parts": plan.memory.device,
        "host_bytes": plan.memory.host_bytes,
        "host_parts": plan.memory.host,
        "disk_bytes": sum(plan.disk.values()),
        "disk_parts": plan.disk,
        "largest_part": plan.memory.largest,
        "ranks": plan.spread.ranks,
        "strategy": plan.spread.strategy,
        "time_parallel": plan.spread.time_parallel,
        "precision": plan.precision,
        "chunk_tokens": plan.chunk.chunk_tokens,
        "activations": "recompute" if plan.chunk.is_recomputed else "keep",
        "boundaries": plan.chunk.boundaries,
        "boundary_states": plan.chunk.boundary_states,
        "boundary_state_bytes": plan.memory.one_state,
        "cache": _cache(plan),
        "device_bytes_if_recomputed": plan.memory_if_recomputed.device_bytes if plan.memory_if_recomputed else None,
        "parameters": plan.num_parameters,
        "trained": plan.num_trained,
        "document_tokens": plan.document_tokens,
        "step_seconds": plan.step_time.seconds,
        "run_seconds": plan.run_seconds,
        "order": list(ORDER),
        "settings": None
        if fitting is None
        else {
            "overrides": fitting.overrides,
            "command": command(report.recipe, fitting),
            "device_bytes": fitting.plan.memory.device_bytes,
        },
        "lengths": [
            {
                "document_tokens": row.tokens,
                "fits": None if plan.fits is None else not row.short_of,
                "short_of": list(row.short_of),
                **{f"{place}_bytes": size for place, size in asdict(row.plan.needs).items()},
                "boundaries": row.plan.chunk.boundaries,
                "seconds": row.seconds,
            }
            for row in report.lengths
        ],
        "longest_document": asdict(report.longest),
        "times": _times(plan),
        "assumed": plan.target.machine.assumptions(),
        "measured_on_a_gpu": report.probe is not None and report.probe.device != "cpu",
        "measured": None if report.probe is None else report.probe.as_json(),
    }


def _cache(plan: RecipePlan) -> dict[str, Any] | None:
    """Of layers with attention; None where there are none."""
    config, chunk = plan.config, plan.chunk
    if not config.n_attention:
        return None
    return {
        "tokens": chunk.cache.window_tokens,
        "bytes_per_token": cache_bytes(config, rows=1, num_tokens=1),
        "bytes": chunk.cache.vectors(config, chunk.rows),
        "place": "host" if chunk.cache.on_host else "device",
        "attention_share_of_time": plan.step_time.attention_share,
    }


def _times(plan: RecipePlan) -> list[dict[str, Any]]:
    return [
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
    ]
