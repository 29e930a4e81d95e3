"""infctx report: the page of a run, written again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infctx.cli_output import AsJson, answer, say
from infctx.errors import InfctxError


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: finished, stopped or under way.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; report.html in the run folder.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write report.html of a run again from its folder; nothing is measured and the run is left alone."""
    from infctx.report import read_facts, write_report

    if output is not None and (output.is_dir() or (output.exists() and not force)):
        raise InfctxError(f"--output {output}: exists. Give another path, or --force to replace a file.")
    if output is not None and not output.parent.is_dir():
        raise InfctxError(f"--output {output}: the folder {output.parent} does not exist. Create it first.")
    facts = read_facts(run)
    path = write_report(run, output=output, state=facts.state)
    say(f"Wrote {path}: the run is {facts.state}, at step {facts.last_step:,}.")
    answer({"path": str(path), "state": facts.state, "steps": facts.last_step}, as_json)
