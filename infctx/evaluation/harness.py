"""A model handed to lm-evaluation-harness; nothing else imports it, and this only where tasks are asked for."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from infctx.data.tokenizer import END_OF_TEXT, Tokenizer
from infctx.errors import InfctxError
from infctx.evaluation.greedy import continue_greedily
from infctx.evaluation.row_states import TokenRow
from infctx.evaluation.scoring import score_continuations
from infctx.evaluation.text_losses import text_log_probabilities
from infctx.model.finch import Finch

# What the harness itself takes where a task does not say.
DEFAULT_MAX_TOKENS = 256
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """What the harness may ask of a model, answered with recurrent states."""

    def __init__(self, model: Finch, tokenizer: Tokenizer, *, rows: int, chunk_tokens: int) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._rows = rows
        self._chunk_tokens = chunk_tokens
        self._device = model.embedding.weight.device

    @property
    def tokenizer_name(self) -> str:
        """Of the vocabulary, for the harness's caches."""
        return self._tokenizer.name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of a continuation, and whether it is what the model would say."""
        pairs = [split_pair(self._tokenizer, *request.args) for request in requests]
        scores = score_continuations(self._model, pairs, rows=self._rows, chunk_tokens=self._chunk_tokens)
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of a whole text of any length, in one piece: no window cuts it."""
        texts = [request.args[0] for request in requests]
        return text_log_probabilities(
            self._model, self._tokenizer, texts, rows=self._rows, chunk_tokens=self._chunk_tokens
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The most probable text behind each prompt.

        Raises: InfctxError: a task asks for drawn tokens.
        """
        answers = [""] * len(requests)
        by_settings: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(_settings(request), []).append(number)
        for (max_tokens, stops), numbers in by_settings.items():
            texts = continue_greedily(
                self._model,
                [_ids(self._tokenizer, requests[number].args[0]) or (END_OF_TEXT,) for number in numbers],
                tokenizer=self._tokenizer,
                max_tokens=max_tokens,
                stops=stops,
                rows=self._rows,
                chunk_tokens=self._chunk_tokens,
            )
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness, or of files of one's own.

    Args:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        folder: of YAML files with tasks.
        shots: examples before each question; None = as the task says.
        limit: documents of each task, at most.
    Returns:
        Of each task and group its figures by name, "acc", "acc_stderr", …; with filters other than none, "acc,name".
    Raises: InfctxError: no such task.
    """
    # It tells a person at length what it does.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        task_manager=_manager(tasks, folder),
    )
    assert found is not None, "one process has the results"
    named = {**found.get("groups", {}), **found["results"]}
    return {task: _figures(figures) for task, figures in named.items()}


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[TokenRow, TokenRow]:
    """Tokenise a context with its continuation as one text, and cut behind the last token that is all context.

    A token that holds the end of the context and the beginning of the continuation belongs to the continuation, as do
    spaces at the context's end. An empty context is an end of text.
    """
    bare = context.rstrip()
    text = context + continuation
    ids = tokenizer.encode(text)
    ends = tokenizer.token_ends([text], ids, np.array([len(ids)], dtype=np.int64))
    cut = int((ends <= len(bare.encode("utf-8"))).sum())
    row = tuple(ids.tolist())
    if not row[cut:]:
        raise InfctxError(f"a task asks for the probability of an empty continuation of {context[-60:]!r}.")
    return row[:cut] or (END_OF_TEXT,), row[cut:]


def _ids(tokenizer: Tokenizer, text: str) -> TokenRow:
    return tuple(tokenizer.encode(text).tolist())


def _settings(request: Instance) -> tuple[int, tuple[str, ...]]:
    """Tokens at most, and the stop strings, of a request to generate."""
    settings = request.args[1]
    if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
        raise InfctxError(
            f"--tasks: {request.task_name} draws tokens (do_sample); expected the most probable ones, do_sample: false."
        )
    until = settings.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    given = [settings[key] for key in _MAX_TOKENS_KEYS if settings.get(key) is not None]
    return int(given[0]) if given else DEFAULT_MAX_TOKENS, stops


def _manager(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """What knows all the tasks. The harness's own ones are looked through, for seconds, only where they are needed."""
    if folder is not None and not folder.is_dir():
        raise InfctxError(f"--tasks-folder {folder}: expected a folder with YAML files of tasks.")
    include = None if folder is None else str(folder)
    missing = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_path=include, include_defaults=False)
    if not any(task not in manager.all_tasks for task in missing):
        return manager
    manager = TaskManager(include_path=include)
    for task in missing:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            advice = f" Near: {', '.join(near)}." if near else ""
            raise InfctxError(
                f"--tasks {task}: no task, group or tag of that name, and no such file.{advice} Your own YAML files "
                "are found with --tasks-folder."
            )
    return manager


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name; the filter is named where there is one."""
    named = {}
    for key, value in figures.items():
        if isinstance(value, (int, float)):
            named[key.removesuffix(",none")] = value
    return named
