"""A run folder that no run has made: a thousand steps of a mixture, measured before and after."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

EVIL = "</script></pre><img src=x onerror=alert(1)>\"'&amp;<!--"


def positions(start: float, fall: float, *, reset_after: int | None = None) -> dict[str, Any]:
    """Losses that fall with the logarithm of the position, up to 64K; from a reset on they stay."""
    edges = [0, *(16 << number for number in range(13))]
    buckets = []
    for number, (begin, end) in enumerate(pairwise(edges)):
        reach = begin if reset_after is None else min(begin, reset_after)
        loss = start - fall * math.log2(max(reach, 8))
        margin = 0.01 * (1 + number / 4)
        buckets.append(
            {"from": begin, "to": end, "loss": loss, "interval": [loss - margin, loss + margin], "weight": end - begin}
        )
    mean = sum(one["loss"] * one["weight"] for one in buckets) / edges[-1]
    return {
        "loss": mean, "interval": [mean - 0.01, mean + 0.01], "perplexity": math.exp(mean), "bits_per_byte": None,
        "documents": 12, "tokens": edges[-1] * 3, "weight": edges[-1] * 3, "positions": buckets,
    }  # fmt: skip


def measured(*, is_after: bool) -> dict[str, Any]:
    text = f"{EVIL} مرحبا 世界 the next morning " * 3
    found = {
        "schema": 1, "headline": ["model      Finch (RWKV-6), 24 layers", "trained    1,234 parameters (LoRA rank 32)"],
        "versions": {"infctx": "0.1.0", "torch": "2.13.0", "Python": "3.11.7"},
        "machine": {"system": "Linux x86_64", "device": "cpu, 2 threads"}, "total_steps": 1000,
        "documents": 12, "tokens": 180_000, "held_out_documents": 40, "held_out_tokens": 900_000, "is_cut": True,
        "seconds": 12.5, "reset_tokens": None, "carried": positions(3.2, 0.05), "reset": None, "gain": None,
        "samples": [
            {"place": place, "origin": f"{EVIL}.jsonl:{place}", "is_cut": False, "prompt": f"Chapter {place}. {text}",
             "text": text if is_after else "the the the" + "\n" * 60, "document": f"and so it went. {text}"}
            for place in range(3)
        ],
        "problems": [],
    }  # fmt: skip
    if is_after:
        found |= {
            "reset_tokens": 4096, "carried": positions(2.6, 0.09), "reset": positions(2.6, 0.09, reset_after=4096),
            "gain": {"beyond": 4096, "gain": 0.27, "interval": [0.21, 0.33], "documents": 9, "tokens": 120_000.0},
        }  # fmt: skip
    return found


def step_records(steps: int) -> list[dict[str, Any]]:
    generator = random.Random(0)
    records: list[dict[str, Any]] = []
    for step in range(steps + 1):
        loss = 2.2 + 1.3 * math.exp(-step / 150) + generator.gauss(0, 0.08)
        record: dict[str, Any] = {"step": step, "tokens": step * 16384, "loss": None}
        if step:
            record |= {
                "loss": loss * (20 if step == 700 else 1), "lr": 2e-4 * min(1, step / 50), "grad_norm": 1 + loss / 9,
                "tokens_per_second": 9000 + generator.gauss(0, 200), "chunks": 4, "chunk_tokens": 4096, "window": 4,
                "recompute_difference": 0.0, "peak_device_bytes": 0, "peak_host_bytes": 3_000_000_000 + step,
                "seconds": 1.8,
                "sets": {name: {"loss": loss + by, "tokens": 8192} for name, by in (("books", 0.3), ("<chats>", -0.3))},
            }  # fmt: skip
        if step % 100 == 0:
            record["val_loss"] = 2.3 + 1.3 * math.exp(-step / 150)
            record["val_loss_by_set"] = {"books": record["val_loss"] + 0.2, "<chats>": record["val_loss"] - 0.2}
        records.append(record)
    records[300] |= {"loss": None, "not_updated": "its gradient is not finite"}
    return records


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run folder."""

    def make(
        name: str = "a run's folder",
        *,
        steps: int = 1000,
        is_finished: bool = True,
        with_measured: bool = True,
        sections: dict[str, dict[str, Any]] | None = None,
    ) -> Path:
        folder = tmp_path / name
        (folder / "report").mkdir(parents=True)
        (folder / "adapter").mkdir()
        recipe: dict[str, dict[str, Any]] = {
            "model": {"path": "/models/finch.pth"},
            "data": {"path": "/data/docs.jsonl", "validation": 0.05},
            "adapter": {"kind": "lora", "rank": 32},
            "bptt": {"chunk_tokens": 4096, "window": 4},
            "optimizer": {"lr": 2e-4},
            "run": {"folder": str(folder), "steps": 1000},
        }
        for section, keys in (sections or {}).items():
            recipe[section] |= keys
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        lines = "".join(json.dumps(record) + "\n" for record in step_records(steps))
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        ledger = {
            "documents": 800,
            "tokens": {"in": 20_000_000, "trained": 15_000_000, "masked": 4_000_000, "dropped": 1_000_000},
            "dropped_tokens": {"cut at max_tokens": 1_000_000}, "rejected_rows": [], "duplicate_documents": 0,
            "held_out": {"documents": 40, "tokens": 900_000},
        }  # fmt: skip
        (folder / "ledger.json").write_text(json.dumps(ledger), encoding="utf-8")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text(f"step-{steps:06}\n")
        if with_measured:
            (folder / "report" / "before.json").write_text(json.dumps(measured(is_after=False)), encoding="utf-8")
            (folder / "report" / "after.json").write_text(json.dumps(measured(is_after=True)), encoding="utf-8")
        if is_finished:
            (folder / "result.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
        return folder

    return make
