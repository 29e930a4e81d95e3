"""infctx plan: what a run of a recipe needs, before it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from infctx.cli_output import AsJson, answer
from infctx.errors import InfctxError

_UNITS = {"": 1, "b": 1, "mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys set differently, as optimizer.lr=1e-5.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Sizes of a released model, not of model.path: 1.6b, 3b, 7b, 14b, eagle-7b."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Devices in all, in place of the recipe's; 8 to a machine.")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a device, as 24GB or 80GiB.")
    ] = None,
    document_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest document; data.pack_tokens or 131072.")
    ] = None,
    tflops: Annotated[float, typer.Option(min=0.001, help="TFLOP/s of a device in training, for the time.")] = 350.0,
    as_json: AsJson = False,
) -> None:
    """Predict memory by part and time of a run on GPUs, from sizes alone: no weights and no data are read.

    Exit code 0 also where it does not fit; then it says what to change, and JSON has "fits": false.
    """
    from infctx.planning.from_recipe import config_for, plan_recipe
    from infctx.planning.report import plan_as_json, plan_in_words
    from infctx.planning.time_model import Machine
    from infctx.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    planned = plan_recipe(
        loaded,
        config_for(loaded, shape=shape),
        ranks=ranks,
        device_memory=None if device_memory is None else _bytes_of(device_memory),
        document_tokens=document_tokens,
        machine=Machine(flops_per_second=tflops * 1e12),
    )
    if not as_json:
        print("\n".join(plan_in_words(planned)))
    answer(plan_as_json(planned), as_json)


def _bytes_of(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise InfctxError(f"--device-memory {text}: expected a size as 24GB, 80GiB or 24000MB.")
    return round(float(found[1]) * _UNITS[found[2]])
