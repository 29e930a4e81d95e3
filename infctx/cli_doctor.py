"""infctx doctor: this machine, or the processes of a run on it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from infctx.cli_output import AsJson, answer, leave
from infctx.errors import InfctxError
from infctx.exit_codes import EXIT_MACHINE

_COLOURS = {"good": "green", "missing": "yellow", "bad": "red"}


def doctor(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Check instead what several processes can do together.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of --distributed; by default one for each GPU, or 2.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine can do: what is there, what is missing, and what it would bring.

    Exit code 0 unless something is missing or broken that nothing works without. With --distributed, started by
    torchrun or srun, it checks the processes that these have started, on all machines.
    """
    if distributed:
        _doctor_of_ranks(processes, as_json)
        return
    if processes is not None:
        raise InfctxError("--processes means nothing without --distributed.")
    from infctx.doctor.facts import machine_facts
    from infctx.doctor.screen import doctor_screen

    facts = machine_facts()
    if not as_json:
        is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n".join(doctor_screen(facts, style=_styled if is_coloured else lambda text, kind: text)))
    answer(facts, as_json)
    broken = [problem["of"] for problem in facts["problems"] if problem["is_core"]]
    if broken:
        leave(EXIT_MACHINE, f"infctx needs {', '.join(broken)}: missing or broken.")


def _styled(text: str, kind: str) -> str:
    return typer.style(text, bold=True) if kind == "label" else typer.style(text, fg=_COLOURS[kind])


def _doctor_of_ranks(processes: int | None, as_json: bool) -> None:
    from infctx.doctor_ranks import check_ranks, ranks_table, start_ranks
    from infctx.launch import is_launched

    if not is_launched(os.environ):
        sys.exit(start_ranks(processes, as_json=as_json))
    if processes is not None:
        raise InfctxError("--processes: this process was started as one of several already. Leave the option out.")
    found = check_ranks(os.environ)
    if found is None:
        return
    if not as_json:
        print(ranks_table(found))
    answer(found, as_json)
    if not found["is_right"]:
        leave(EXIT_MACHINE, f"Wrong values, by rank: {found['wrong']}. Train nothing with these before that is mended.")
