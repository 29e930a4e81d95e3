"""Planned memory and traffic of ranks, held to what two of them hold and send."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.processes import run_ranks


@pytest.mark.timeout(400)
def test_ranks_hold_and_send_what_is_planned(tmp_path: Path) -> None:
    run_ranks([str(Path(__file__).with_name("ranks_worker.py")), str(tmp_path / "found")], ranks=2, seconds=300)
    for found in json.loads((tmp_path / "found").read_text()):
        print(found)
        assert found["planned"] == pytest.approx(found["measured"], rel=0.05)
        if found["strategy"].startswith("deepspeed"):
            continue
        assert found["planned gathered"] == found["gathered"]
        assert found["planned reduced"] == found["reduced"]
        # The gradient piles up in parts: nowhere between two chunks is there a whole one.
        assert found["between chunks"] <= found["own gradient"] + 1.01 * found["states"]
