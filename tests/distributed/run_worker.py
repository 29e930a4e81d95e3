"""One of several processes: runs recipes one after the other and writes what came out. Arguments: the runs as JSON, and
a file for each rank's report.

A run is {"recipe": path, "overrides": [...], "at": {"rank": 1, "step": 3, "do": "SIGTERM"}}. `at` says what a rank does
to itself, and where: with "step" when so many steps are done, with "chunk" before the so manieth chunk of the run. It
sends itself a signal, or lets its gradient be infinite ("poison", in the step after), or dies while it writes a
checkpoint ("die_in_save"), or sleeps ("sleep").
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch

from infctx import assemble
from infctx.checkpoint import run_state
from infctx.errors import InfctxError, MachineError
from infctx.recipe.load import load_recipe
from infctx.training import loop
from infctx.training.fabric_run import DeepSpeedEngine, FabricEngine
from infctx.training.progress import SilentProgress
from infctx.training.ranks import Ranks
from infctx.training.signals import StopRequested


def main() -> None:
    torch.use_deterministic_algorithms(True)
    runs, report = json.loads(sys.argv[1]), sys.argv[2]
    told = [run_one(**run) for run in runs]
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    with open(f"{report}.{rank}", "w") as file:
        json.dump(told, file)


def run_one(recipe: str, overrides: list[str], at: Mapping[str, Any] | None = None) -> dict[str, object]:
    """The result of a run, or what ended it."""
    act = _Act(at) if at is not None else None
    with contextlib.ExitStack() as patches:
        if act is not None:
            for patch in act.patches():
                patches.enter_context(patch)
        try:
            return assemble.run_recipe(load_recipe(recipe, overrides), SilentProgress())
        except StopRequested as stop:
            return {"stopped": str(stop), "is_told": stop.is_told}
        except (InfctxError, MachineError) as error:
            return {"error": f"{type(error).__name__}: {error}", "is_told": error.is_told}


class _Act:
    """Does what `at` says, once."""

    def __init__(self, at: Mapping[str, Any]) -> None:
        self._at, self._chunks, self._is_poisoned = at, 0, False

    def patches(self) -> list[Any]:
        settle, most = loop._settle, Ranks.most

        def settle_and_act(run: Any, done: Any, *others: Any) -> None:
            owed = done.owed is not None
            settle(run, done, *others)
            if owed and run.engine.ranks.rank == self._at["rank"] and done.step == self._at.get("step"):
                self._do()

        def most_and_act(ranks: Ranks, *numbers: int) -> tuple[int, ...]:
            if len(numbers) == 2:
                self._chunks += 1
                if ranks.rank == self._at["rank"] and self._chunks == self._at.get("chunk"):
                    self._do()
            return most(ranks, *numbers)

        def poisoned(kind: type[FabricEngine]) -> Any:
            backward = kind.backward

            def backward_or_poison(engine: FabricEngine, scalar: torch.Tensor) -> None:
                backward(engine, scalar * float("inf") if self._is_poisoned else scalar)
                self._is_poisoned = False

            return mock.patch.object(kind, "backward", backward_or_poison)

        return [
            mock.patch.object(loop, "_settle", settle_and_act),
            mock.patch.object(Ranks, "most", most_and_act),
            poisoned(FabricEngine),
            poisoned(DeepSpeedEngine),
        ]

    def _do(self) -> None:
        what = self._at["do"]
        if what == "poison":
            self._is_poisoned = True
        elif what == "sleep":
            time.sleep(600)
        elif what == "die_in_save":
            run_state.write_groups = lambda *arguments, **keywords: os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), getattr(signal, what))


if __name__ == "__main__":
    main()
