"""A probe step: what is planned beside what one step takes, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from infctx.errors import InfctxError, MachineError
from infctx.model.config import FinchConfig
from infctx.planning.from_recipe import Planner
from infctx.planning.recipe_plan import RecipePlan, Target
from infctx.planning.settings import with_settings
from infctx.recipe.schema import Recipe

# Enough for a chunk between two others: the first and the last of a window hold less.
PROBE_CHUNKS = 3
# Read by glibc: it maps what is larger by itself, and gives it back when it is freed; mallopt(3).
SMALLEST_MAPPED_BYTES = 65_536
# What libraries take beside all tensors once a step runs, for threads and matrix products: 10 to 44 MB with 14 small
# models (benchmarks/results/plan_measured.json); with so much all of them are within a tenth.
LIBRARY_WORK_BYTES = 15_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What was measured, beside the plan of just this step on one device.

    device: cpu, or a GPU's name. has_own_weights: of model.path; else random ones. planned_bytes: of tensors.
    planned_resident_bytes: of those that are written to, and what libraries take at work. device_bytes: the most that
    torch had allocated on a GPU, 0 on a CPU. live_bytes: all tensors alive at the busiest moment, 0 on a GPU.
    resident_bytes: the most memory of the process beyond what it had before it opened the model, 0 on a GPU and where
    the system does not tell. seconds: of the step.
    """

    device: str
    has_own_weights: bool
    chunk_tokens: int
    rows: int
    num_chunks: int
    planned_bytes: int
    planned_resident_bytes: int
    device_bytes: int
    live_bytes: int
    resident_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the step."""
        return self.rows * self.num_chunks * self.chunk_tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Its fields, and the plan's errors."""
        pairs = (
            ("device", self.planned_bytes, self.device_bytes),
            ("live", self.planned_bytes, self.live_bytes),
            ("resident", self.planned_resident_bytes, self.resident_bytes),
        )
        errors = {name: planned / measured - 1 for name, planned, measured in pairs if measured}
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "errors": errors}


def probe(recipe: Recipe, plan: RecipePlan, *, has_own_weights: bool) -> Probe:
    """Take a step of a few chunks of random tokens as a run would, and measure it.

    Ranks are not measured: the step is that of one process with whole weights.

    Args:
        plan: of the recipe on this machine; its choices are taken over.
        has_own_weights: of model.path; else random ones of the plan's sizes.
    Raises:
        MachineError: the process was ended, as by a system out of memory. InfctxError: what the step itself said.
    """
    pinned = with_settings(
        recipe,
        {
            "bptt.activations": "recompute" if plan.chunk.is_recomputed else "keep",
            "bptt.boundaries": plan.chunk.boundaries,
            "bptt.chunk_tokens": plan.chunk.chunk_tokens,
            "run.devices": 1,
            "run.num_nodes": 1,
            "run.strategy": "single",
            "run.offload": "none",
            "run.deepspeed": {},
            "run.time_parallel": 1,
        },
    )
    tokens = PROBE_CHUNKS * plan.chunk.chunk_tokens
    planned = Planner(pinned, plan.config, Target(kind=plan.target.kind, ranks=1)).plan(tokens)
    measured = _in_a_process(
        {
            "recipe": pinned.to_mapping(),
            "config": None if has_own_weights else _as_plain(plan.config),
            "tokens": tokens,
        }
    )
    memory = planned.memory
    return Probe(
        has_own_weights=has_own_weights,
        chunk_tokens=plan.chunk.chunk_tokens,
        rows=plan.chunk.rows,
        num_chunks=PROBE_CHUNKS,
        planned_bytes=memory.tensor_bytes,
        planned_resident_bytes=memory.tensor_bytes - memory.untouched + LIBRARY_WORK_BYTES,
        **measured,
    )


def _as_plain(config: FinchConfig) -> dict[str, Any]:
    return asdict(config)


def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "infctx.planning.probe_step"],
        # Every tensor is mapped by itself: the heap's holes, which no two runs have alike, are not what is needed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(SMALLEST_MAPPED_BYTES)},
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0 or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MachineError(
            f"--measure: the probe step ended with code {done.returncode}: {last} If the memory ran out, plan with a "
            "shorter bptt.chunk_tokens, or without --measure."
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in found:
        raise InfctxError(f"--measure: {found['error']}")
    return found
