"""Whether a model finds a key again: at depth d of a text of T tokens, for some of both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from infctx.data.tokenizer import Tokenizer
from infctx.errors import InfctxError
from infctx.evaluation.recall_text import RecallForm
from infctx.evaluation.row_states import as_floats, read_on
from infctx.model.finch import Finch
from infctx.model.state import ModelState


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallMap:
    """What came out.

    Attributes:
        form: name of the texts' form.
        lengths: T, tokens of a text up to and with the question.
        depths: 0 = the key near the beginning, 1 = near the question.
        trials: texts in each cell, with fillers and values of their own.
        chance: of guessing.
        right: [depths][lengths], the share of texts in which every token of the value is the most probable one.
        log_probabilities: [depths][lengths], mean log-probability of the value, nats.
    """

    form: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    chance: float
    right: tuple[tuple[float, ...], ...]
    log_probabilities: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, a row for each cell."""
        return {
            "form": self.form,
            "trials": self.trials,
            "chance": self.chance,
            "cells": [
                {
                    "tokens": length,
                    "depth": depth,
                    "right": self.right[row][column],
                    "log_probability": self.log_probabilities[row][column],
                }
                for row, depth in enumerate(self.depths)
                for column, length in enumerate(self.lengths)
            ],
        }


class RecallTexts(NamedTuple):
    """The texts of one cell. place: of the needle, up to which they are filler alone. tokens: [trials, T]. answers:
    [trials, A], 0 behind the end. is_answer: [trials, A], where the end is not reached."""

    place: int
    tokens: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]
    is_answer: npt.NDArray[np.bool_]


@torch.no_grad()
def measure_recall(
    model: Finch,
    tokenizer: Tokenizer,
    form: RecallForm,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    chunk_tokens: int = 2048,
    seed: int = 0,
) -> RecallMap:
    """Ask for the value in every cell. The filler is read once: each cell goes on from the state before its needle.

    Args:
        model: in evaluation mode.
        lengths: tokens of the texts.
        depths: from 0 to 1.
        trials: texts in each cell, read side by side.
    Raises:
        InfctxError: a text of so few tokens cannot hold needle and question.
    """
    fillers = np.stack(
        [
            form.draw_filler(random.Random(f"{seed} filler {trial}"), tokenizer, num_tokens=max(lengths))
            for trial in range(trials)
        ]
    )
    cells = [
        (make_texts(form, tokenizer, fillers, length=length, depth=depth, seed=seed), row, column)
        for row, depth in enumerate(depths)
        for column, length in enumerate(lengths)
    ]
    right, log_probabilities = np.zeros((2, len(depths), len(lengths)))
    device = model.embedding.weight.device
    filler = torch.from_numpy(fillers).to(device)
    state, place = model.fresh_state(trials), 0
    for texts, row, column in sorted(cells, key=lambda cell: cell[0].place):
        state = read_on(model, filler[:, place : texts.place], state, chunk_tokens=chunk_tokens)
        place = texts.place
        is_right, found = _ask(model, texts, state, chunk_tokens=chunk_tokens)
        right[row, column], log_probabilities[row, column] = is_right.mean(), found.mean()
    return RecallMap(
        form=form.name,
        lengths=tuple(lengths),
        depths=tuple(depths),
        trials=trials,
        chance=form.chance,
        right=tuple(map(tuple, right.tolist())),
        log_probabilities=tuple(map(tuple, log_probabilities.tolist())),
    )


def make_texts(
    form: RecallForm, tokenizer: Tokenizer, fillers: npt.NDArray[np.int64], *, length: int, depth: float, seed: int
) -> RecallTexts:
    """The texts of a cell, one for each row of the fillers; the same whatever other cells there are.

    Raises: InfctxError: see `measure_recall`.
    """
    source = random.Random(f"{seed} values {length} {depth}")
    values = [form.draw(source) for _ in fillers]
    needles = [tokenizer.encode(form.needle.format(value=value)) for value in values]
    answers = [tokenizer.encode(form.answer.format(value=value)) for value in values]
    question = tokenizer.encode(form.question)
    room = length - len(question) - max(map(len, needles)) - 2 * form.margin_tokens
    if room < 0:
        raise InfctxError(
            f"--recall-tokens {length}: a text of the form {form.name} needs at least {length - room} tokens."
        )
    place = form.margin_tokens + round(depth * room)
    tokens = np.stack(
        [
            # Needles may be of different lengths; the texts are not.
            np.concatenate([filler[:place], needle, filler[place : length - len(needle) - len(question)], question])
            for filler, needle in zip(fillers, needles, strict=True)
        ]
    )
    ids = np.zeros((len(values), max(map(len, answers))), dtype=np.int64)
    is_answer = np.zeros(ids.shape, dtype=np.bool_)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)], is_answer[row, : len(answer)] = answer, True
    return RecallTexts(place, tokens.astype(np.int64), ids, is_answer)


def _ask(
    model: Finch, texts: RecallTexts, state: ModelState, *, chunk_tokens: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Of each text, whether the value is what the model would say, and its log-probability."""
    tokens = torch.from_numpy(np.concatenate([texts.tokens, texts.answers[:, :-1]], axis=1)).to(state.wkv.device)
    length = texts.tokens.shape[1]
    state = read_on(model, tokens[:, texts.place : length - 1], state, chunk_tokens=chunk_tokens)
    logits = as_floats(model(tokens[:, length - 1 :], state)[0])
    answers = torch.from_numpy(texts.answers).to(logits.device)
    chosen = (logits.gather(-1, answers[..., None])[..., 0] - logits.logsumexp(-1)).double().cpu().numpy()
    is_top = (logits.argmax(-1) == answers).cpu().numpy()
    return (is_top | ~texts.is_answer).all(axis=1), np.where(texts.is_answer, chosen, 0.0).sum(axis=1)
