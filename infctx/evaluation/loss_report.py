"""What is measured of one model, or of two, on documents: as figures and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infctx.data.document_set import DocumentSet
from infctx.data.tokenizer import Tokenizer
from infctx.errors import InfctxError
from infctx.evaluation.by_distance import measure_by_distance
from infctx.evaluation.by_position import PositionLosses, compare, measure_by_position
from infctx.evaluation.held_out import Source
from infctx.evaluation.words import (
    difference_in_words,
    distances_in_words,
    forgetting_in_words,
    loss_in_words,
    reset_in_words,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How documents are read; changes no result. chunk_tokens: at once. rows: documents side by side."""

    chunk_tokens: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """figures: as JSON has them. lines: for people."""

    figures: dict[str, Any]
    lines: list[str]


def measure(source: Source, documents: DocumentSet, *, tokenizer: Tokenizer, reading: Reading) -> PositionLosses:
    """Loss by position of one model."""
    return measure_by_position(
        source.model,
        documents,
        chunk_tokens=reading.chunk_tokens,
        rows=reading.rows,
        count_bytes=tokenizer.byte_lengths,
    )


def report_losses(
    source: Source,
    documents: DocumentSet,
    *,
    tokenizer: Tokenizer,
    reading: Reading,
    against: Source | None = None,
    reset_tokens: int | None = None,
    distances: Sequence[int] = (),
) -> Report:
    """Loss by position; beside another model's, beside that of a reset state, and by distance, where asked for."""
    after = measure(source, documents, tokenizer=tokenizer, reading=reading)
    figures, lines = after.to_json(), [f"{source.label}: {loss_in_words(after)[0]}", *loss_in_words(after)[1:]]
    if against is not None:
        before = measure(against, documents, tokenizer=tokenizer, reading=reading)
        found = compare(before, after)
        figures["against"] = {"model": against.label, **before.to_json(), "compared": found.to_json()}
        lines += ["", f"Beside {against.label} (before):", *difference_in_words(before, after, found)]
    if reset_tokens is not None:
        reset = measure_by_position(
            source.model,
            documents,
            chunk_tokens=reading.chunk_tokens,
            rows=reading.rows,
            reset_tokens=reset_tokens,
        )
        found = compare(after, reset)
        figures["reset"] = {"reset_tokens": reset_tokens, "loss": reset.loss, "compared": found.to_json()}
        lines += ["", *reset_in_words(found, reset_tokens=reset_tokens)]
    if distances:
        by_distance = measure_by_distance(
            source.model,
            documents,
            distances=distances,
            chunk_tokens=reading.chunk_tokens,
            rows=reading.rows,
        )
        figures["distances"] = [one.to_json() for one in by_distance]
        lines += ["", *distances_in_words(by_distance)]
    return Report(figures=figures, lines=lines)


def report_forgetting(
    source: Source, before: Source, documents: DocumentSet, *, tokenizer: Tokenizer, reading: Reading
) -> Report:
    """Whether a model is worse than it was on documents that it was not tuned on."""
    old = measure(before, documents, tokenizer=tokenizer, reading=reading)
    new = measure(source, documents, tokenizer=tokenizer, reading=reading)
    found = compare(old, new)
    verdict = forgetting_in_words(found)
    line = f"Forgetting ({found.num_documents:,} documents): {old.loss:.4f} before, {new.loss:.4f} after; {verdict}."
    figures = {"before": old.to_json(), "after": new.to_json(), "compared": found.to_json(), "verdict": verdict}
    return Report(figures=figures, lines=[line])


def check_same_tokens(source: Source, other: Source, tokenizer: Tokenizer) -> None:
    """Refuse two models whose losses are of different tokens.

    Raises: InfctxError naming both tokenizers or vocabularies.
    """
    theirs = other.choose_tokenizer() if other.tokenizer is not None or other.recipe is not None else tokenizer
    if theirs.digest != tokenizer.digest:
        raise InfctxError(
            f"{other.label} has the tokenizer {theirs.name}, {source.label} {tokenizer.name}: the losses of their "
            "tokens cannot be compared. Measure each by itself; bits per byte can be."
        )
    sizes = source.model.config.vocab_size, other.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InfctxError(
            f"{source.label} has a vocabulary of {sizes[0]:,} ids, {other.label} of {sizes[1]:,}: expected the same. "
            "Compare models of one vocabulary."
        )
