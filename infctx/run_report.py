"""The report of a run that is being trained: what is measured for it, when, and by which rank; it never ends a run."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import infctx
from infctx.checkpoint.atomic import write_file_atomically
from infctx.data.tokenizer import tokenizer_by_name
from infctx.recipe.schema import Recipe
from infctx.report.facts import AFTER_FILE, BEFORE_FILE, MEASURED_SCHEMA, State, read_measured
from infctx.report.page import write_report
from infctx.run_data import RunData
from infctx.run_measures import (
    Chosen,
    as_it_is,
    choose_documents,
    measure_losses,
    reset_length,
    write_samples,
)
from infctx.training.run import Run
from infctx.training.signals import StopSignals

# Of one pass over the held-out documents; a run has three.
MOST_TOKENS = 200_000
SHARE_OF_RUN = 0.05
PASSES = 3
# As many as a validation reads in any case, where there are so few.
FEWEST_TOKENS = 1_000
# Of a sample; a text of bytes has twice as many.
SAMPLE_TOKENS = 60
FEWEST_SAMPLE_TOKENS = 8
BYTE_IDS = 257
# For so many tokens of the run, one of a sample.
TOKENS_FOR_ONE = 500
# Where one waits for it.
WORTH_A_WORD = 20_000


class RunReport:
    """Measures before the first step and after the last, and writes report.html.

    Every rank calls the same methods in the same order; one of them works, and the others wait for it. Whatever goes
    wrong here is a line, and a report without that part.

    Args:
        engine_divides: no rank can run the model on its own.
        headline: what the run said of itself when it started.
    """

    def __init__(
        self, recipe: Recipe, run: Run, data: RunData, *, engine_divides: bool, headline: Sequence[str]
    ) -> None:
        self._run, self._data, self._folder = run, data, run.folder
        self._is_wanted = recipe.run.report
        self._rows, self._chunk_tokens = recipe.run.rows, recipe.bptt.chunk_tokens
        self._planned_tokens = planned_tokens(recipe, data, data_ranks=run.engine.ranks.data_size)
        self._engine_divides, self._headline = engine_divides, headline

    def before(self) -> None:
        """Measure the model as it begins, unless an earlier process of this run has."""
        if not self._is_wanted:
            return
        path = self._folder / BEFORE_FILE
        is_there = self._run.engine.ranks.is_first and read_measured(path) is not None
        with self._run.engine.ranks.patient("measuring for the report"):
            if self._run.engine.ranks.is_first and not is_there:
                self._or_a_line(lambda: self._store(path, self._measured(with_reset=False, should_stop=lambda: False)))
            self._run.engine.ranks.wait()

    def after(self) -> None:
        """Measure the model as it ended, and write the report; a signal cuts the measuring short."""
        if not self._is_wanted:
            return
        ranks, averaged = self._run.engine.ranks, self._run.averaged
        path = self._folder / AFTER_FILE
        with StopSignals() as signals, ranks.patient("measuring for the report"):
            if ranks.is_first:
                # What export and generate take.
                with averaged.in_place() if averaged is not None and not self._engine_divides else nullcontext():
                    self._or_a_line(
                        lambda: self._store(
                            path, self._measured(with_reset=True, should_stop=lambda: signals.number > 0)
                        )
                    )
            ranks.wait()
        self.write("finished")

    def write(self, state: State) -> None:
        """Write the page from what the folder holds."""
        if self._is_wanted and self._run.engine.ranks.is_first:
            self._or_a_line(lambda: self._write(state))

    def _write(self, state: State) -> None:
        path = write_report(self._folder, state=state)
        self._run.progress.message(f"report     {path}")

    def _or_a_line(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            self._run.progress.message(f"the report goes without a part: {type(error).__name__}: {reason}")

    def _measured(self, *, with_reset: bool, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """All of a measurement, as JSON has it; what could not be measured is among its problems."""
        held_out = self._data.validation
        found: dict[str, Any] = {
            "schema": MEASURED_SCHEMA,
            "headline": list(self._headline),
            "versions": {"infctx": infctx.__version__, "torch": torch.__version__, "Python": platform.python_version()},
            "machine": {"system": f"{platform.system()} {platform.machine()}", "device": _device(self._run.device)},
            "total_steps": self._run.source.total_steps,
            "documents": 0,
            "tokens": 0,
            "held_out_documents": len(held_out) if held_out else 0,
            "held_out_tokens": held_out.num_tokens if held_out else 0,
            "is_cut": False,
            "seconds": 0.0,
            "reset_tokens": None,
            "carried": None,
            "reset": None,
            "gain": None,
            "samples": [],
            "problems": [],
        }
        problem = self._why_not()
        if problem is not None:
            found["problems"] = [problem]
            return found
        assert held_out is not None
        chosen = choose_documents(held_out, most_tokens=most_measured(self._planned_tokens))
        if chosen.num_tokens >= WORTH_A_WORD:
            self._run.progress.message(f"measuring {chosen.num_tokens:,} held-out tokens for the report")
        found |= {"documents": len(chosen.documents), "tokens": chosen.num_tokens, "is_cut": chosen.is_cut}
        with as_it_is(self._run.model, self._run.device):
            self._add_losses(found, chosen, with_reset=with_reset)
            if should_stop():
                found["problems"].append("A signal cut the measuring short: no samples were taken.")
            else:
                self._add(found, lambda: {"samples": self._samples(chosen, should_stop)})
        return found

    def _why_not(self) -> str | None:
        if self._engine_divides:
            return (
                f"Loss by position and samples were left out: with run.strategy {self._run.strategy}"
                f"{' and run.time_parallel' if self._run.engine.ranks.time_size > 1 else ''} no process can run the "
                "model on its own. infctx eval measures the result on one device."
            )
        if not self._data.validation:
            return "Loss by position and samples need held-out documents: set data.validation."
        return None

    def _add_losses(self, found: dict[str, Any], chosen: Chosen, *, with_reset: bool) -> None:
        reset_tokens = reset_length(chosen.documents, chunk_tokens=self._chunk_tokens)
        if with_reset and reset_tokens is None:
            found["problems"].append(
                "The documents that were measured are too short to tell whether the model uses a long context."
            )

        def losses() -> dict[str, Any]:
            measured, seconds = measure_losses(
                self._run.model,
                chosen.documents,
                rows=self._rows,
                reset_tokens=reset_tokens if with_reset else None,
            )
            return {**measured, "seconds": seconds, "reset_tokens": reset_tokens if with_reset else None}

        self._add(found, losses)

    def _samples(self, chosen: Chosen, should_stop: Callable[[], bool]) -> list[dict[str, Any]]:
        tokenizer = tokenizer_by_name(self._data.tokenizer)
        most = SAMPLE_TOKENS * (1 if tokenizer.vocab_size > BYTE_IDS else 2)
        # One token at a time takes as long as hundreds at once.
        most = max(FEWEST_SAMPLE_TOKENS, min(most, int(self._planned_tokens) // TOKENS_FOR_ONE))
        return write_samples(self._run.model, chosen, tokenizer, max_tokens=most, should_stop=should_stop)

    def _add(self, found: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """One part does not take the other with it."""
        try:
            found |= measure()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            found["problems"].append(f"Something could not be measured: {type(error).__name__}: {reason}")
            self._run.progress.message(f"the report goes without a part: {type(error).__name__}: {reason}")

    def _store(self, path: Path, found: dict[str, Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n"
        write_file_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def most_measured(run_tokens: float) -> int:
    """Held-out tokens of one pass. run_tokens: what the run reads in all."""
    return max(FEWEST_TOKENS, min(MOST_TOKENS, int(run_tokens * SHARE_OF_RUN / PASSES)))


def planned_tokens(recipe: Recipe, data: RunData, *, data_ranks: int) -> float:
    """About how many tokens the run reads in all."""
    run, bptt = recipe.run, recipe.bptt
    if run.epochs is not None:
        return run.epochs * data.order.epoch_tokens
    assert run.steps is not None
    rows = run.steps * run.rows * run.accumulate * data_ranks
    if recipe.data.mode == "stream":
        assert isinstance(bptt.window, int)
        return rows * bptt.window * bptt.chunk_tokens
    return rows * (recipe.data.pack_tokens or data.training.num_tokens / len(data.training))


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
