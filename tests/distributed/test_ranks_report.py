"""The report of a run over several ranks: measured by one of them, or with a word on why it could not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infctx.report.facts import AFTER_FILE, BEFORE_FILE
from tests.distributed.test_elastic import recipe, spread

__all__ = ["recipe"]
DIVIDED = "no process can run the model on its own"


@pytest.mark.timeout(300)
def test_every_way_to_spread_a_run_leaves_a_report(recipe: Path, tmp_path: Path) -> None:
    ways = {
        "ddp": ["run.rows=2", "run.strategy=ddp"],
        "time_parallel": ["run.rows=4", "run.strategy=ddp", "run.time_parallel=2"],
        "fsdp": ["run.rows=2", "run.strategy=fsdp"],
        "deepspeed_3": ["run.rows=2", "run.strategy=deepspeed_3"],
    }
    alike = ["run.devices=2", "run.report=true", "run.steps=2", "bptt.window=document", "run.validate_every=1"]
    runs = [
        {"recipe": str(recipe), "overrides": [*alike, *way, f"run.folder={tmp_path}/{name}"]}
        for name, way in ways.items()
    ]
    for of_ranks in spread(recipe, runs, ranks=2):
        assert [told.get("steps") for told in of_ranks] == [2, 2], of_ranks
    for name in ways:
        page = (tmp_path / name / "report.html").read_text()
        assert "</html>" in page
        before, after = (json.loads((tmp_path / name / file).read_text()) for file in (BEFORE_FILE, AFTER_FILE))
        is_measured = name == "ddp"
        assert (DIVIDED in page) == (not is_measured), name
        assert bool(after["carried"]) == bool(before["carried"]) == is_measured, name
        assert bool(after["samples"]) == is_measured
