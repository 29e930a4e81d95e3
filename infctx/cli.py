"""The command line: one short function a command. What a command needs is imported inside it, so that help is quick.

People's output goes to stderr, except for what a command was asked to print; with --json stdout holds one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from infctx.cli_adapter import adapter_app
from infctx.cli_chat import chat
from infctx.cli_check import check
from infctx.cli_doctor import doctor
from infctx.cli_eval import EPILOG as EVAL_EPILOG
from infctx.cli_eval import evaluate
from infctx.cli_export import convert, export
from infctx.cli_generate import generate
from infctx.cli_output import AsJson, Left, answer, leave, say, warnings_for_people
from infctx.cli_plan import plan
from infctx.cli_report import report
from infctx.cli_surgery import model_app
from infctx.errors import InfctxError, MachineError, machine_fault
from infctx.exit_codes import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_MACHINE, EXIT_STOPPED, EXIT_USER

app = typer.Typer(
    name="infctx",
    help="Fine-tune RWKV-6 Finch and RWKV-5 Eagle models on documents of any length.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(model_app, name="model")
app.add_typer(adapter_app, name="adapter")
bench_app = typer.Typer(
    help="Measure against others, each result proved right first.",
    epilog="Example: infctx bench kernels --quick",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys set differently, as optimizer.lr=1e-5.")
]


@app.command(epilog="Example: infctx train recipes/debug_cpu.yaml run.steps=20")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Leave a used run folder alone and begin beside it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe; started again in its run folder, continue it."""
    loaded = _load_recipe(recipe, overrides)
    from infctx.assemble import run_recipe
    from infctx.launch import is_launched, launch
    from infctx.spread import check_spread, is_spread, num_processes
    from infctx.training.progress import make_progress

    if is_spread(loaded) and not is_launched(os.environ):
        check_spread(loaded)
        options = ["--fresh"] * fresh + ["--json"] * as_json
        command = [sys.executable, "-m", "infctx.cli", "train", str(recipe), *(overrides or []), *options]
        sys.exit(launch(command, processes=num_processes(loaded), num_nodes=loaded.run.num_nodes))
    result = run_recipe(loaded, make_progress(sys.stderr), fresh=fresh)
    if not result.pop("speaks"):
        return
    if result.pop("already_finished"):
        say(f"This run is finished: {result['folder']}. Nothing was done; --fresh starts another beside it.")
    before, after = result["first_val_loss"], result["val_loss"]
    if after is not None and before is not None:
        say(f"Validation loss: {before:.4f} before, {after:.4f} after {result['steps']:,} steps.")
    elif result["train_loss"] is not None:
        say(f"Training loss of the last step: {result['train_loss']:.4f}.")
    say(f"Run folder: {result['folder']}")
    answer(result, as_json)


@app.command(epilog="Example: infctx data recipes/instruct_quick.yaml --html data.html")
def data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="Documents shown, of each set in turn.")] = 2,
    html: Annotated[Path | None, typer.Option(help="Write it as a page of its own, too.")] = None,
    binidx: Annotated[
        Path | None, typer.Option(help="Write the training documents as PREFIX.bin and PREFIX.idx, for other trainers.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the model will see: documents, masks in colour, lengths, the first step, and where every token goes.

    Large inputs are prepared as for training.
    """
    loaded = _load_recipe(recipe, overrides).resolved()
    from infctx.checkpoint.model_file import read_model_file
    from infctx.data_view import account_with_facts, check_page, measure, show_data, write_page
    from infctx.data_view.from_recipe import view_of
    from infctx.run_data import check_binidx, open_data, write_as_binidx

    if html is not None:
        check_page(html, force=force)
    if binidx is not None:
        check_binidx(binidx, force=force)
    opened = open_data(loaded, model_file=read_model_file(loaded.model.path, dtype=None), say=say)
    facts = measure(view_of(loaded, opened), show=show)
    if not as_json:
        show_data(facts, file=sys.stdout)
    if html is not None:
        write_page(facts, html, title=recipe.name, force=force)
        say(f"Wrote {html}.")
    if binidx is not None:
        say(write_as_binidx(opened, binidx))
    answer(account_with_facts(facts), as_json)


app.command(epilog="Example: infctx check recipes/debug_cpu.yaml --trace-token 0:37")(check)
app.command(epilog="Example: infctx doctor --distributed --processes 2")(doctor)
app.command(epilog="Example: infctx plan recipes/finch_1b6_lora_exact.yaml --shape 1.6b --device rtx-3090")(plan)
app.command("eval", epilog=EVAL_EPILOG)(evaluate)
app.command(epilog="Example: infctx report runs/quickstart")(report)
app.command(epilog="Example: infctx export runs/quickstart --output finch-mine.pth")(export)
app.command(epilog='Example: infctx generate runs/quickstart --prompt "The for statement" --max-tokens 100')(generate)
app.command(epilog="Example: infctx chat runs/mine --temperature 0.8")(chat)
model_app.command("convert", epilog="Example: infctx model convert model.pth --format hf --output model-hf")(convert)


@bench_app.command("kernels", epilog="Example: infctx bench kernels --threads 1 --output benchmarks/results")
def bench_kernels(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Length; again for more. 1024 and 4096.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads; 12 by default.")] = None,
    head_size: Annotated[int, typer.Option(min=1, help="Channels of one head.")] = 64,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; again for more. Both by default.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="One of ours, as infctx doctor lists them; again for more.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="infctx-trainer=PATH of a checkout, or fla (CUDA).")] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compare with torch.compile of our torch backend, which takes minutes. By default where no peer is at "
            "hand, except with --quick.",
        ),
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs of each row; 15 by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    seconds_per_case: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds of timing after which a row takes no more pairs.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for kernels_DEVICE.json; none is written without.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="256 tokens, fp32, 2 heads and 3 pairs where nothing else is given.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time the WKV6 backends against each other and against peers, forward and with the backward pass.

    Every side is first compared with float64; a side that is wrong gets no ratio. The tables go to stderr.
    """
    from rich.console import Console

    from infctx.bench.kernels import bench_kernels, make_settings

    settings = make_settings(
        device=device,
        is_quick=quick,
        tokens=tokens,
        rows=rows,
        heads=heads,
        head_size=head_size,
        dtypes=dtype,
        pairs=pairs,
        backends=backend,
        threads=threads,
        seconds_per_case=seconds_per_case,
    )
    # What is no terminal has no width of its own.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140, highlight=False)
    found = bench_kernels(
        settings,
        peers=peer or [],
        with_compiled=False if compile is None and quick else compile,
        output=output,
        console=console,
    )
    answer(found, as_json)
    if not found["is_complete"]:
        leave(EXIT_STOPPED, "Stopped by SIGINT before everything was measured.")
    if not any(row["pairs"] for row in found["rows"]):
        leave(EXIT_BUG, "Nothing could be measured; the lines above say why.")


@app.command("recipe-schema", epilog="Example: infctx recipe-schema > recipe.schema.json")
def recipe_schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of tables for people instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the JSON schema of a recipe, for editors."""
    from infctx.recipe.load import recipe_json_schema
    from infctx.recipe.reference import recipe_reference

    if markdown and as_json:
        raise InfctxError("--markdown and --json exclude each other: the page is no JSON. Give one of them.")
    if markdown:
        print(recipe_reference(), end="")
        return
    print(json.dumps(recipe_json_schema(), indent=None if as_json else 2))


@app.command("recipe-from-infctx", epilog="Example: infctx recipe-from-infctx config.yaml --output my.yaml")
def recipe_from_infctx(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A config of RWKV-infctx-trainer, or a datapack.")],
    output: Annotated[Path | None, typer.Option(help="The recipe to write; without, it is printed.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Translate a config of RWKV-infctx-trainer into a recipe, and say what became of each of its keys."""
    from infctx.recipe.from_infctx import translate_config, write_translation

    translation = translate_config(config)
    if output is not None:
        write_translation(translation, output, config=config, force=force)
        say(f"Wrote {output}.")
    elif not as_json:
        print(translation.text, end="")
    say("\n".join(translation.account).strip())
    path = None if output is None else str(output)
    answer({"path": path, "recipe": translation.text, **translation.to_json()}, as_json)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and leave with its code: 0 done, 1 our bug, 2 yours, 3 stopped by a signal, 4 the machine's."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign shows another; it does not end a run.
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="replace")
    try:
        with warnings_for_people():
            app(args=arguments)
    except InfctxError as error:
        leave(EXIT_USER, "" if error.is_told else f"Error: {error}")
    except SystemExit as done:
        if done.code == EXIT_INTERRUPTED and not isinstance(done, Left):
            leave(EXIT_INTERRUPTED, "Interrupted; nothing since the last checkpoint was saved.")
        raise
    except Exception as error:
        leave(*_judge(error))
    finally:
        _flush_or_forget()
    sys.exit(EXIT_DONE)


def _judge(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that is not a plain mistake of the user."""
    from infctx.training.signals import StopRequested

    if isinstance(error, StopRequested):
        told = f"Stopped by {error}; a checkpoint is written. The same command continues the run."
        return EXIT_STOPPED, "" if error.is_told else told
    if isinstance(error, MachineError) and error.is_told:
        return EXIT_MACHINE, ""
    if isinstance(error, MachineError) or machine_fault(error) is not None:
        return EXIT_MACHINE, f"Error: {machine_fault(error) or error}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return EXIT_USER, f"Error: {error.filename}: {error.strerror}."
    traceback.print_exception(error)
    return EXIT_BUG, "This is a bug of infctx, not yours. Please report it with the lines above and the recipe."


def _flush_or_forget() -> None:
    """What nobody reads any more must not turn into another exit code when Python flushes it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _load_recipe(path: Path, overrides: list[str] | None) -> Any:
    from infctx.recipe.load import load_recipe

    return load_recipe(path, overrides or [])


if __name__ == "__main__":
    main()
