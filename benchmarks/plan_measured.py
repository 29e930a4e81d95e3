"""The plan's memory beside what a step takes, for small models on this machine's device.

    python benchmarks/plan_measured.py [--output benchmarks/results/plan_measured.json] [--only NAME]

Each case is a process of its own that takes three steps of random tokens with random weights (`infctx plan --measure`).
Compared are all tensors alive at the busiest moment, counted one by one, and the most memory of the process beyond what
it had before it opened the model, with every tensor mapped by itself: the heap keeps more than is needed, and no two
runs keep the same. On a GPU it is what torch had allocated.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infctx.model.config import FinchConfig
from infctx.model.init import new_config
from infctx.planning.from_recipe import Planner
from infctx.planning.probe import Probe, probe
from infctx.planning.recipe_plan import Target
from infctx.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the table. channels: of 6 layers; head size 64."""

    kind: str = "full"
    precision: str = "fp32"
    chunk_tokens: int = 512
    activations: str = "keep"
    channels: int = 512
    vocab_size: int = 8192
    version: str = "6"
    quantize: str = "none"
    optimizer: str = "adamw"
    rows: int = 1

    def config(self) -> FinchConfig:
        return new_config(version=self.version, n_layer=6, n_embd=self.channels, vocab_size=self.vocab_size)

    def recipe(self) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {"path": "none.pth", "quantize": self.quantize},
                "data": {"path": "none.txt"},
                "adapter": {"kind": self.kind},
                "bptt": {"chunk_tokens": self.chunk_tokens, "activations": self.activations, "boundaries": "device"},
                "optimizer": {"lr": 1e-5, "name": self.optimizer},
                "run": {"folder": "none", "steps": 1, "precision": self.precision, "rows": self.rows},
            }
        )

    def name(self) -> str:
        others = [self.quantize] if self.quantize != "none" else []
        others += [self.optimizer] if self.optimizer != "adamw" else []
        others += ["Eagle"] if self.version != "6" else []
        others += [f"{self.rows} rows"] if self.rows > 1 else []
        others += [f"{self.vocab_size} ids"] if self.vocab_size != 8192 else []
        words = [self.kind, self.precision, str(self.channels), str(self.chunk_tokens), self.activations, *others]
        return " ".join(words)


CASES = [
    Case(),
    Case(chunk_tokens=1024, activations="recompute"),
    Case(precision="bf16"),
    Case(channels=256, rows=4, chunk_tokens=256),
    Case(vocab_size=65536, channels=256, chunk_tokens=64),
    Case(kind="lora"),
    Case(kind="lora", chunk_tokens=1024, activations="recompute"),
    Case(kind="lora", precision="bf16", chunk_tokens=1024),
    Case(kind="lora", chunk_tokens=1024, quantize="int8"),
    Case(kind="lora", precision="bf16", quantize="nf4", activations="recompute"),
    Case(kind="state"),
    Case(kind="state", precision="bf16", chunk_tokens=1024),
    Case(optimizer="adamw-8bit"),
    Case(version="5.2", kind="lora"),
]


def measured(case: Case) -> Probe:
    """Plan and probe a case."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    plan = Planner(case.recipe(), case.config(), Target(kind=kind, ranks=1)).plan(3 * case.chunk_tokens)
    return probe(case.recipe(), plan, has_own_weights=False)


def row_of(case: Case, found: Probe) -> dict[str, Any]:
    """What is kept of it."""
    return {"case": case.name(), **found.as_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plan_measured.json"))
    parser.add_argument("--only", help="cases whose names contain this; nothing is written")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        if arguments.only is not None and arguments.only not in case.name():
            continue
        row = row_of(case, measured(case))
        rows.append(row)
        errors = ", ".join(f"{name} {error:+.1%}" for name, error in row["errors"].items())
        print(f"{row['case']:<44} planned {row['planned_bytes'] / 1e6:8,.1f} MB  {errors}", flush=True)
    if arguments.only is not None:
        return
    largest = {
        name: max(abs(row["errors"][name]) for row in rows if name in row["errors"]) for name in rows[0]["errors"]
    }
    found = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "measured_on_a_gpu": torch.cuda.is_available(),
        "largest_errors": largest,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(largest)


if __name__ == "__main__":
    main()
