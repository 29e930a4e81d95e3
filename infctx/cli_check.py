"""infctx check: a recipe with its model and data, how exact its gradient is, and one token on its way."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infctx.cli_output import AsJson, answer, leave, say
from infctx.errors import InfctxError
from infctx.exit_codes import EXIT_BUG

if TYPE_CHECKING:
    from infctx.recipe.schema import Recipe
    from infctx.training.gradient_check import GradientCheck


def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys set differently, as optimizer.lr=1e-5.")
    ] = None,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Measure the chunked gradient against the unchunked one.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(min=32, help="Tokens of the longest document to measure on; twice the window.")
    ] = None,
    trace_token: Annotated[
        str | None,
        typer.Option(
            metavar="ROW:T",
            help="Follow token T of a row of the first step, both from 0, from its file to the optimizer.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a recipe with its model and data, and say what a run of it would do.

    With --gradient, exit code 0 means that the chunked gradient is within the stated bound. Nothing is written.
    """
    if trace_token is not None and (gradient or tokens is not None):
        raise InfctxError("--trace-token: expected without --gradient and --tokens, got both. Ask one after the other.")
    place = None if trace_token is None else _row_and_token(trace_token)
    from infctx.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if place is not None:
        _trace(loaded, *place, name=recipe.name, as_json=as_json)
        return
    from infctx.assemble import check_recipe

    lines, measured = check_recipe(loaded, with_gradient=gradient, gradient_tokens=tokens, say=say)
    if not as_json:
        print("\n".join([*lines, "The recipe is valid: nothing was trained or written."]))
    if measured is None:
        answer({"valid": True, "summary": lines}, as_json)
        return
    if not as_json:
        print(_gradient_table(measured))
    window_bias = measured.window_bias or dict.fromkeys(measured.relative_error, 0.0)
    answer(
        {
            "relative_error": measured.relative_error,
            "window_bias": window_bias,
            "bound": measured.bound,
            "tokens": measured.num_tokens,
        },
        as_json,
    )
    if not measured.is_within_bound:
        leave(EXIT_BUG, f"The chunked gradient is further than {measured.bound:g} from the unchunked one.")


def _row_and_token(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text.strip())
    if found is None:
        raise InfctxError(
            f"--trace-token {text}: expected ROW:T, a row of the first step and a token in it, both from 0, as 0:37."
        )
    return int(found[1]), int(found[2])


def _trace(recipe: Recipe, row: int, token: int, *, name: str, as_json: bool) -> None:
    from infctx.assemble import trace_recipe
    from infctx.token_trace import stops_as_json, stops_in_words

    stops = trace_recipe(recipe, row, token, say=say)
    if as_json:
        answer(stops_as_json(stops), as_json)
        return
    from rich.console import Console
    from rich.text import Text

    # What is no terminal has no width of its own; a narrow one breaks the lines itself.
    console = Console(file=sys.stdout, highlight=False)
    print(f"Token {row}:{token} of the first step of {name}. Nothing was trained or written.")
    for title, place, lines in stops_in_words(stops):
        heading = Text.assemble((f"{title:<27}", "bold"), (place, "dim"))
        console.print(heading, soft_wrap=True)
        for line in lines:
            console.print(Text(line), soft_wrap=True)


def _gradient_table(measured: GradientCheck) -> str:
    """One line for each group of parameters, the worst last."""
    bias = measured.window_bias
    lines = [f"Gradient of the first {measured.num_tokens:,} tokens of the longest document, norm of the difference:"]
    lines.append(f"{'':32} {'chunked / unchunked':>20} {'window / exact':>16}")
    for group, error in sorted(measured.relative_error.items(), key=lambda item: item[1]):
        if group in measured.without_gradient:
            lines.append(f"{group:32} {'no gradient yet':>20}")
        else:
            lines.append(f"{group:32} {error:>20.1e} {'exact' if bias is None else format(bias[group], '.1%'):>16}")
    verdict = "within" if measured.is_within_bound else "NOT within"
    lines.append(f"Every error is {verdict} the bound of {measured.bound:g}.")
    return "\n".join(lines)
