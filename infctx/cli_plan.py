"""infctx plan: what a run of a recipe needs, before it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infctx.cli_output import AsJson, answer
from infctx.errors import InfctxError

if TYPE_CHECKING:
    from infctx.planning.devices import DeviceSpec, Room
    from infctx.planning.recipe_plan import Target
    from infctx.recipe.schema import Recipe

_UNITS = {"": 1, "b": 1, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SMALLEST_SIZE = 10**6
_NAMED = "rtx-3060, rtx-3090, rtx-4090, l40s, a100-40gb, a100-80gb, h100, h200, cpu"


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys set differently, as optimizer.lr=1e-5.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a GPU, as 24GB or 80GiB; with --device cpu, of it.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{_NAMED}; without this and --memory, the device here.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest document; data.pack_tokens or 131072.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Sizes of a released model, not of model.path: 1.6b, 3b, 7b, 14b, eagle-7b.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Devices in all, in place of the recipe's; 8 to a machine.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a machine beside its GPUs; free here now.")
    ] = None,
    disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the run folder's disk; free here now.")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s of a device in training; 35 % of its data sheet.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take one step here, of a few chunks, and show it beside the plan.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict device, host and disk memory by part, time, and the settings that fit, from sizes alone.

    No weights and no data are read, but for --measure. Exit code 0 also where it does not fit; then it says what would,
    and JSON has "fits": false.
    """
    from infctx.planning.from_recipe import Planner, config_for
    from infctx.planning.lengths import longest_document, plans_by_length
    from infctx.planning.probe import probe
    from infctx.planning.report import Report, report_in_words
    from infctx.planning.report_json import report_as_json
    from infctx.planning.settings import settings_that_fit
    from infctx.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    spec = _device(device, memory)
    if measure and not spec.is_here:
        raise InfctxError(f"--measure: a step can be taken on this machine's device only, not on {spec.name}.")
    room = _room(loaded, spec, host_memory, disk)
    target = _target(spec, room, ranks=ranks, tflops=tflops)
    planner = Planner(loaded, config_for(loaded, shape=shape), target)
    planned = planner.plan(tokens)
    if measure and planned.fits is False:
        raise InfctxError("--measure: the plan does not fit this machine. Look at it without --measure first.")
    has_room = target.room.device is not None
    report = Report(
        recipe=" ".join([str(recipe), *(overrides or [])]),
        plan=planned,
        device=spec,
        lengths=plans_by_length(planner),
        longest=longest_document(planner, planned),
        fitting=settings_that_fit(loaded, planner.config, target, document_tokens=tokens) if has_room else None,
        probe=probe(loaded, planned, has_own_weights=shape is None) if measure else None,
    )
    if not as_json:
        print("\n".join(report_in_words(report)))
    answer(report_as_json(report), as_json)


def _device(name: str | None, memory: str | None) -> DeviceSpec:
    from dataclasses import replace

    from infctx.planning.devices import DeviceSpec, device_here, device_named

    if name is None and memory is not None:
        return DeviceSpec(name="a GPU", kind="cuda", memory_bytes=_bytes_of("--memory", memory))
    spec = device_here() if name is None else device_named(name)
    return spec if memory is None else replace(spec, memory_bytes=_bytes_of("--memory", memory))


def _room(recipe: Recipe, spec: DeviceSpec, host_memory: str | None, disk: str | None) -> Room:
    from infctx.free_memory import free_host_bytes
    from infctx.planning.devices import Room, free_disk_bytes

    host = free_host_bytes() if host_memory is None else _bytes_of("--host-memory", host_memory)
    if spec.kind == "cpu" and host_memory is not None:
        raise InfctxError("--host-memory: a CPU has no other memory than its own; give --memory.")
    return Room(
        device=spec.memory_bytes,
        host=None if spec.kind == "cpu" else host,
        disk=free_disk_bytes(Path(recipe.run.folder)) if disk is None else _bytes_of("--disk", disk),
    )


def _target(spec: DeviceSpec, room: Room, *, ranks: int | None, tflops: float | None) -> Target:
    from infctx.planning.devices import CPU_SHARE_OF_PRODUCT, SHARE_OF_PEAK, cpu_flops_per_second
    from infctx.planning.recipe_plan import Target
    from infctx.planning.time_model import Machine

    usual = Machine()
    if tflops is not None:
        rate = tflops * 1e12
    elif spec.kind == "cpu":
        rate = CPU_SHARE_OF_PRODUCT * cpu_flops_per_second()
    else:
        rate = usual.flops_per_second if spec.flops_per_second is None else SHARE_OF_PEAK * spec.flops_per_second
    machine = Machine(flops_per_second=rate, memory_bytes_per_second=spec.bytes_per_second)
    return Target(kind=spec.kind, room=room, ranks=ranks, machine=machine)


def _bytes_of(option: str, text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", text.strip().lower())
    size = round(float(found[1]) * _UNITS[found[2]]) if found is not None and found[2] in _UNITS else 0
    # A number alone would be bytes: nobody means 24 of them.
    if size < SMALLEST_SIZE:
        raise InfctxError(f"{option} {text}: expected a size as 24GB, 80GiB or 24000MB.")
    return size
