"""A probe step in a process of its own: the plan is within a tenth of what is measured."""

from __future__ import annotations

import sys

import pytest
import torch

from infctx.errors import InfctxError, MachineError
from infctx.planning import probe as probes
from infctx.planning.from_recipe import Planner
from infctx.planning.probe import Probe, probe
from infctx.planning.recipe_plan import Target
from tests.planning.planned_recipes import recipe_of, small_config


def probed(**sections: dict[str, object]) -> Probe:
    recipe = recipe_of(**sections)
    plan = Planner(recipe, small_config(), Target(kind="cpu", ranks=1)).plan(4096)
    return probe(recipe, plan, has_own_weights=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the probe takes the GPU")
def test_plan_is_within_a_tenth_of_what_a_step_holds() -> None:
    found = probed(bptt={"chunk_tokens": 512, "activations": "keep", "boundaries": "device"}, run={"rows": 2})
    assert found.planned_bytes == pytest.approx(found.live_bytes, rel=0.1)
    assert found.resident_bytes > 0 or not sys.platform.startswith("linux")
    assert found.device == "cpu"
    assert not found.has_own_weights
    assert found.as_json()["errors"]["live"] == found.planned_bytes / found.live_bytes - 1
    assert found.tokens_per_second == pytest.approx(3 * 512 * 2 / found.seconds)


def test_what_the_step_says_and_how_it_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(model={"path": "missing.pth"})
    plan = Planner(recipe, small_config(), Target(kind="cpu", ranks=1)).plan(4096)
    with pytest.raises(InfctxError, match=r"--measure: .*missing\.pth"):
        probe(recipe, plan, has_own_weights=True)
    # `false` takes any arguments and ends with 1, having said nothing.
    monkeypatch.setattr(probes.sys, "executable", "false")
    with pytest.raises(MachineError, match="ended with code 1: it said nothing"):
        probe(recipe, plan, has_own_weights=True)
