"""The command line: one short function a command. What a command needs is imported inside it, so that help is quick.

People's output goes to stderr, except for what a command was asked to print; with --json stdout holds one JSON object.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from infctx.cli_adapter import adapter_app
from infctx.cli_export import convert, export
from infctx.cli_output import LARGEST_SEED, AsJson, answer, leave, say, shown
from infctx.cli_plan import plan
from infctx.cli_surgery import model_app
from infctx.errors import CheckpointError, InfctxError, MachineError, machine_fault
from infctx.exit_codes import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_MACHINE, EXIT_STOPPED, EXIT_USER

if TYPE_CHECKING:
    from infctx.trained import TrainedModel
    from infctx.training.gradient_check import GradientCheck

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


@app.command(epilog="Example: infctx check recipes/quickstart.yaml --gradient")
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Measure the chunked gradient against the unchunked one.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(min=32, help="Tokens of the longest document to measure on; twice the window.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a recipe with its model and data, and say what a run of it would do.

    With --gradient, exit code 0 means that the chunked gradient is within the stated bound.
    """
    loaded = _load_recipe(recipe, overrides)
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


app.command(epilog="Example: infctx plan recipes/finch_1b6_lora_exact.yaml --shape 1.6b --device rtx-3090")(plan)
app.command(epilog="Example: infctx export runs/quickstart --output finch-mine.pth")(export)
model_app.command("convert", epilog="Example: infctx model convert model.pth --format hf --output model-hf")(convert)


@app.command(epilog='Example: infctx generate runs/quickstart --prompt "The for statement" --max-tokens 100')
def generate(
    source: Annotated[Path, typer.Argument(metavar="MODEL_OR_RUN", help="A model file or a run folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = always the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the tokens that make up this much.")] = 0.7,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="The same seed gives the same text.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="world, bytes or a tokenizer JSON, where the model does not say.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    from infctx.data.tokenizer import StreamDecoder, tokenizer_by_name, tokenizer_for_vocab
    from infctx.model.sampling import sample_tokens

    trained = _open(source)
    name = tokenizer or trained.tokenizer or tokenizer_for_vocab(trained.model.config.vocab_size)
    chosen = tokenizer_by_name(name)
    # An empty prompt is a new document: what comes before one is the end of another.
    ids = chosen.encode(prompt).tolist() or [0]
    if max(ids) >= trained.model.config.vocab_size:
        size = trained.model.config.vocab_size
        raise InfctxError(f"--tokenizer {name}: id {max(ids)} is beyond the model's vocabulary of {size:,} ids.")
    decoder = StreamDecoder(chosen)
    tokens = sample_tokens(
        trained.model,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        usable_ids=chosen.vocab_size,
    )
    pieces = []
    try:
        for piece in itertools.chain((decoder.push(token) for token in tokens), [decoder.flush()]):
            if not as_json:
                print(piece if pieces else prompt + piece, end="", flush=True)
            pieces.append(piece)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if not as_json:
        print()
    answer({"prompt": prompt, "text": "".join(pieces)}, as_json)


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


@app.command(epilog="Example: infctx doctor --distributed --processes 2")
def doctor(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Check instead what several processes can do together.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of --distributed; by default one for each GPU, or 2.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine can do: devices, WKV6 backends, versions.

    With --distributed, started by torchrun or srun, it checks the processes that these have started, on all machines.
    """
    if distributed:
        _doctor_of_ranks(processes, as_json)
        return
    if processes is not None:
        raise InfctxError("--processes means nothing without --distributed.")
    from infctx.doctor import machine_facts

    facts = machine_facts()
    if not as_json:
        for section, entries in facts.items():
            print(section)
            for name, value in entries.items():
                print(f"  {name:<18} {shown(value)}")
    answer(facts, as_json)


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
        app(args=arguments)
    except InfctxError as error:
        leave(EXIT_USER, "" if error.is_told else f"Error: {error}")
    except SystemExit as done:
        if done.code == EXIT_INTERRUPTED:
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


def _open(source: Path) -> TrainedModel:
    from infctx.trained import open_trained

    trained = open_trained(source)
    for note in trained.notes:
        say(note)
    return trained


def _load_recipe(path: Path, overrides: list[str] | None) -> Any:
    from infctx.recipe.load import load_recipe

    return load_recipe(path, overrides or [])


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


if __name__ == "__main__":
    main()
