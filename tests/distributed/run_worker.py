"""One of several processes: runs recipes one after the other and writes what came out. Arguments: the runs as JSON, and
a file for each rank's report.

A run is {"recipe": path, "overrides": [...], "at": {"rank": 1, "step": 3, "do": "SIGTERM"}}: a rank may send itself a
signal when so many steps are done.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch

from infctx import assemble
from infctx.errors import InfctxError, MachineError
from infctx.recipe.load import load_recipe
from infctx.training import loop
from infctx.training.progress import SilentProgress
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
    settle = loop._settle

    def settle_and_act(run: Any, done: Any, *others: Any) -> None:
        owed = done.owed is not None
        settle(run, done, *others)
        if at is not None and owed and run.engine.ranks.rank == at["rank"] and done.step == at["step"]:
            os.kill(os.getpid(), getattr(signal, at["do"]))

    with mock.patch.object(loop, "_settle", settle_and_act):
        try:
            return assemble.run_recipe(load_recipe(recipe, overrides), SilentProgress())
        except StopRequested as stop:
            return {"stopped": str(stop), "is_told": stop.is_told}
        except (InfctxError, MachineError) as error:
            return {"error": f"{type(error).__name__}: {error}", "is_told": error.is_told}


if __name__ == "__main__":
    main()
