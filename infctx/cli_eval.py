"""infctx eval: what a model is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infctx.cli_output import AsJson, answer, say
from infctx.errors import InfctxError

if TYPE_CHECKING:
    from infctx.evaluation.held_out import Source

EPILOG = """Example: infctx eval runs/quickstart --against datasets/byte_finch/model.safetensors

By position: the mean loss of the tokens that have so many tokens of their document before them, the state carried from
its beginning. Intervals are 95 %, by bootstrap over documents; with few documents they are too narrow.

By distance d: of tokens that see only their last d to 2d tokens (the state is set back every 2d), beside the same
tokens with all that is before them.

Tasks: lm-evaluation-harness reads their data from the hub unless their YAML names local files. Without a network, set
HF_DATASETS_OFFLINE=1.
"""
DEPTHS = "0,25,50,75,100"


def evaluate(
    source: Annotated[Path, typer.Argument(metavar="MODEL_OR_RUN", help="A model file or a run folder.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Documents: a file, glob or URL that training reads, too; again for more. By default those "
            "that the run held out."
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="text, completion, instruct, question or chat; by default the run's, or text.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL_OR_RUN", help="The model before, compared on the same documents.")
    ] = None,
    forgetting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Other documents: is the model worse on them than it was? Before is --against, "
            "or the model that the run began with.",
        ),
    ] = None,
    forgetting_template: Annotated[str, typer.Option(help="Their template.")] = "text",
    reset_tokens: Annotated[
        int | None, typer.Option(min=1, help="Also with the state set back every so many tokens.")
    ] = None,
    distances: Annotated[
        str | None, typer.Option(metavar="TOKENS,...", help="Also by distance, as 64,512,4096; see below.")
    ] = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Hide a key in texts and ask for it: a heat map by length and depth.")
    ] = False,
    recall_form: Annotated[
        str, typer.Option(help="sentence, or marker: that of datasets/recall, where a vocabulary of bytes has it.")
    ] = "auto",
    recall_tokens: Annotated[
        str | None, typer.Option(metavar="TOKENS,...", help="Lengths of the texts, as 1024,4096.")
    ] = None,
    recall_depths: Annotated[
        str, typer.Option(metavar="PERCENT,...", help="Where the key is: 0 = at the beginning.")
    ] = DEPTHS,
    recall_trials: Annotated[int, typer.Option(min=1, help="Texts of each length and depth.")] = 16,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,...", help="Tasks of lm-evaluation-harness, or YAML files.")
    ] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="YAML files of your own tasks.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question of a task.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="world, bytes or a tokenizer JSON, where the model does not say.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: cuda where there is one.")] = "auto",
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at once; changes no result.")] = 2048,
    rows: Annotated[int, typer.Option(min=1, help="Documents, or questions of tasks, side by side.")] = 1,
    output: Annotated[
        list[Path] | None, typer.Option(help="Write the figures (.json) or the heat map (.svg), too; again for both.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace outputs that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure loss by position, perplexity and bits per byte on held-out documents; forgetting; recall; tasks."""
    outputs = output or []
    _check_outputs(outputs, has_map=recall, force=force)
    lengths = () if recall_tokens is None else _numbers("--recall-tokens", recall_tokens, low=1)
    depths = _numbers("--recall-depths", recall_depths, low=0, high=100)
    far = () if distances is None else _numbers("--distances", distances, low=1)
    if tasks is None and (tasks_folder is not None or shots is not None or limit is not None):
        raise InfctxError("--tasks-folder, --shots and --limit mean nothing without --tasks.")
    from infctx.evaluation.loss_report import Reading
    from infctx.evaluation.suite import (
        ForgettingWanted,
        LossWanted,
        RecallWanted,
        TasksWanted,
        Wanted,
        check_harness,
        run_suite,
    )

    if tasks is not None:
        check_harness()
    is_loss_asked = data is not None or against is not None or template is not None or reset_tokens is not None or far
    loss = LossWanted(data=tuple(data or ()), template=template, reset_tokens=reset_tokens, distances=far)
    wanted = Wanted(
        reading=Reading(chunk_tokens=chunk_tokens, rows=rows),
        tokenizer=tokenizer,
        loss=loss if is_loss_asked or not (forgetting or recall or tasks) else None,
        compares=against is not None,
        forgetting=ForgettingWanted(data=tuple(forgetting), template=forgetting_template) if forgetting else None,
        recall=RecallWanted(
            form=recall_form, lengths=lengths, depths=tuple(share / 100 for share in depths), trials=recall_trials
        )
        if recall
        else None,
        tasks=TasksWanted(names=tuple(tasks.split(",")), folder=tasks_folder, shots=shots, limit=limit)
        if tasks is not None
        else None,
    )
    model = _open(source, device)
    before = _before(model, against, device, is_needed=bool(forgetting))
    measured = run_suite(model, wanted, before=before, say=say)
    if not as_json:
        print("\n".join(measured.lines))
    for path in outputs:
        text = measured.picture if path.suffix == ".svg" else json.dumps(measured.figures, indent=1, allow_nan=False)
        assert text is not None, "checked before"
        _write(path, text.rstrip("\n") + "\n")
    answer(measured.figures, as_json)


def _open(path: Path, device: str) -> Source:
    import torch

    from infctx.evaluation.held_out import Source, recipe_of
    from infctx.trained import open_trained

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise InfctxError(f"--device {device}: expected auto, cpu, or cuda where there is a GPU.")
    trained = open_trained(path)
    for note in trained.notes:
        say(note)
    model = trained.model.to(device).eval()
    return Source(label=str(path), model=model, tokenizer=trained.tokenizer, recipe=recipe_of(path))


def _before(model: Source, against: Path | None, device: str, *, is_needed: bool) -> Source | None:
    """What the model is compared with: what --against names, else, for forgetting, what the run began with."""
    if against is not None:
        return _open(against, device)
    if not is_needed:
        return None
    if model.recipe is None:
        raise InfctxError(
            f"--forgetting: {model.label} is a model and no run: give the model that it was before with --against."
        )
    return _open(Path(model.recipe.model.path), device)


def _numbers(option: str, text: str, *, low: int, high: int = 2**40) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part.strip()) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(low <= number <= high for number in numbers):
        bounds = f"from {low} to {high}" if high < 2**40 else f"from {low}"
        raise InfctxError(f"{option} {text}: expected whole numbers {bounds} with commas between them.")
    return tuple(sorted(set(numbers)))


def _check_outputs(paths: Sequence[Path], *, has_map: bool, force: bool) -> None:
    """Refuse what cannot be written, before any work is done."""
    for path in paths:
        if path.suffix not in (".json", ".svg"):
            raise InfctxError(f"--output {path}: expected a name that ends in .json or .svg.")
        if path.suffix == ".svg" and not has_map:
            raise InfctxError(f"--output {path}: only the heat map of --recall is a picture. Add --recall.")
        if path.is_dir() or (path.exists() and not force):
            raise InfctxError(f"--output {path}: exists. Give another path, or --force to replace a file.")
        if not path.parent.is_dir():
            raise InfctxError(f"--output {path}: the folder {path.parent} does not exist. Create it first.")


def _write(path: Path, text: str) -> None:
    from infctx.checkpoint.atomic import write_file_atomically

    def write(unfinished: Path) -> None:
        unfinished.write_text(text, encoding="utf-8")

    write_file_atomically(path, write)
    say(f"Wrote {path}.")
