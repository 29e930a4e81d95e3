"""Everything that `infctx eval` measures in one call, one part after another."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infctx.data.tokenizer import BytesTokenizer, Tokenizer
from infctx.errors import InfctxError
from infctx.evaluation.held_out import Source, documents_of_files, documents_of_run
from infctx.evaluation.loss_report import Reading, check_same_tokens, report_forgetting, report_losses
from infctx.evaluation.recall import measure_recall
from infctx.evaluation.recall_picture import draw_map, map_in_words
from infctx.evaluation.recall_text import RECALL_FORMS, RecallForm
from infctx.run_data import Say


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWanted:
    """Loss by position. data: files; empty = what the run held out. distances: also by distance. The rest as in
    `report_losses`."""

    data: tuple[str, ...] = ()
    template: str | None = None
    reset_tokens: int | None = None
    distances: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgettingWanted:
    """data: files of other documents. template: theirs."""

    data: tuple[str, ...]
    template: str = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallWanted:
    """form: a name in RECALL_FORMS, or auto. lengths: empty = the form's. depths: 0 to 1."""

    form: str = "auto"
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksWanted:
    """See `run_tasks`."""

    names: tuple[str, ...]
    folder: Path | None = None
    shots: int | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What to measure; None = not. tokenizer: its name, or auto. compares: the loss with that of the model before."""

    reading: Reading
    tokenizer: str = "auto"
    loss: LossWanted | None = None
    compares: bool = False
    forgetting: ForgettingWanted | None = None
    recall: RecallWanted | None = None
    tasks: TasksWanted | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """figures: as JSON has them. lines: for people. picture: the recall map as SVG."""

    figures: dict[str, Any]
    lines: list[str]
    picture: str | None


def check_harness() -> None:
    """Refuse tasks where nothing can run them, before any work is done.

    Raises: InfctxError with the command that installs it.
    """
    try:
        importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise InfctxError("--tasks needs lm-evaluation-harness. Run: pip install 'infctx[eval]'") from error


def run_suite(
    source: Source, wanted: Wanted, *, before: Source | None = None, say: Say = lambda line: None
) -> Measured:
    """Measure what is wanted of a model.

    Args:
        before: what it is compared with; of forgetting, the model that it was.
    Raises:
        InfctxError and its kinds: documents, tasks or texts that cannot be measured, and why.
    """
    tokenizer = source.choose_tokenizer(wanted.tokenizer)
    figures: dict[str, Any] = {"model": source.label, "tokenizer": tokenizer.name}
    lines: list[str] = []
    picture = None
    if before is not None:
        check_same_tokens(source, before, tokenizer)
    if wanted.loss is not None:
        _measure_loss(source, wanted, tokenizer, figures, lines, before=before if wanted.compares else None, say=say)
    if wanted.forgetting is not None:
        assert before is not None, "forgetting needs a model before"
        documents = documents_of_files(
            wanted.forgetting.data,
            source,
            tokenizer=tokenizer,
            template=wanted.forgetting.template,
            option="--forgetting",
        )
        report = report_forgetting(source, before, documents, tokenizer=tokenizer, reading=wanted.reading)
        figures["forgetting"] = report.figures
        _append(lines, report.lines)
    if wanted.recall is not None:
        picture = _measure_recall(source, wanted.recall, tokenizer, figures, lines, reading=wanted.reading)
    if wanted.tasks is not None:
        _run_tasks(source, wanted.tasks, tokenizer, figures, lines, reading=wanted.reading)
    return Measured(figures=figures, lines=lines, picture=picture)


def _measure_loss(
    source: Source,
    wanted: Wanted,
    tokenizer: Tokenizer,
    figures: dict[str, Any],
    lines: list[str],
    *,
    before: Source | None,
    say: Say,
) -> None:
    loss = wanted.loss
    assert loss is not None
    if loss.data:
        documents = documents_of_files(loss.data, source, tokenizer=tokenizer, template=loss.template)
    elif loss.template is not None:
        raise InfctxError("--template means nothing without --data: what a run held out has the run's template.")
    else:
        documents = documents_of_run(source, say=say)
    report = report_losses(
        source,
        documents,
        tokenizer=tokenizer,
        reading=wanted.reading,
        against=before,
        reset_tokens=loss.reset_tokens,
        distances=loss.distances,
    )
    figures |= report.figures
    _append(lines, report.lines)


def _measure_recall(
    source: Source,
    wanted: RecallWanted,
    tokenizer: Tokenizer,
    figures: dict[str, Any],
    lines: list[str],
    *,
    reading: Reading,
) -> str:
    form = _recall_form(wanted.form, tokenizer)
    found = measure_recall(
        source.model,
        tokenizer,
        form,
        lengths=wanted.lengths or form.lengths,
        depths=wanted.depths,
        trials=wanted.trials,
        chunk_tokens=reading.chunk_tokens,
    )
    figures["recall"] = found.to_json()
    _append(lines, map_in_words(found))
    return draw_map(found, title=f"Recall of {Path(source.label).name}")


def _recall_form(name: str, tokenizer: Tokenizer) -> RecallForm:
    if name == "auto":
        name = "marker" if tokenizer.name == BytesTokenizer.name else "sentence"
    if name not in RECALL_FORMS:
        raise InfctxError(f"--recall-form {name}: expected auto, {' or '.join(RECALL_FORMS)}.")
    return RECALL_FORMS[name]


def _run_tasks(
    source: Source,
    wanted: TasksWanted,
    tokenizer: Tokenizer,
    figures: dict[str, Any],
    lines: list[str],
    *,
    reading: Reading,
) -> None:
    check_harness()
    # Here, for it is an extra, and takes seconds.
    from infctx.evaluation.harness import HarnessModel, run_tasks

    model = HarnessModel(source.model, tokenizer, rows=reading.rows, chunk_tokens=reading.chunk_tokens)
    # What the harness prints is for people; stdout is for programs.
    with contextlib.redirect_stdout(sys.stderr):
        found = run_tasks(model, wanted.names, folder=wanted.folder, shots=wanted.shots, limit=wanted.limit)
    figures["tasks"] = found
    told = [f"{'task':<32} {'figure':<24} {'value':>9}"]
    for task, of_task in found.items():
        for name, value in of_task.items():
            if "_stderr" not in name and name not in ("sample_len",):
                error = of_task.get(_stderr_of(name))
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                told.append(f"{task[:32]:<32} {name[:24]:<24} {value:9.4f}{spread}")
    _append(lines, told)


def _stderr_of(name: str) -> str:
    metric, comma, chosen = name.partition(",")
    return f"{metric}_stderr{comma}{chosen}"


def _append(lines: list[str], more: list[str]) -> None:
    lines += ["", *more] if lines else more
