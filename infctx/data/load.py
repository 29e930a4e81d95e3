"""Files to documents, with every row that was not usable; the validation split; and the ledger of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from infctx.data.document import Document
from infctx.data.sources import Rejection, expand_paths, read_records
from infctx.data.templates import check_template, make_document, render
from infctx.data.tokenizer import Tokenizer
from infctx.errors import DataError

MIN_TAIL_TOKENS = 2
"""A shorter half of a document holds no target."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedData:
    """All documents in file order, the rows that were skipped, and the tokens lost on the way (none so far)."""

    documents: list[Document]
    rejected: list[Rejection] = field(default_factory=list)
    tokens_dropped: int = 0


def load_documents(
    paths: Sequence[str],
    *,
    tokenizer: Tokenizer,
    exclude: Sequence[str] = (),
    template: str = "text",
    on_bad_row: Literal["stop", "skip"] = "stop",
    vocab_size: int | None = None,
) -> LoadedData:
    """Read every record of every file into a document.

    Args:
        paths, exclude: as for `expand_paths`.
        on_bad_row: stop = raise at the first unusable row; skip = leave it out and list it in `rejected`.
        vocab_size: rows of the model's embedding; ids beyond are refused. None = not checked.
    Raises: DataError naming file and line, and where no document is left.
    """
    check_template(template)
    if on_bad_row not in ("stop", "skip"):
        raise DataError(f"data.on_bad_row={on_bad_row}: expected stop or skip.")
    documents: list[Document] = []
    rejected: list[Rejection] = []
    tokens_dropped = 0

    def reject(rejection: Rejection) -> None:
        if on_bad_row == "stop":
            raise DataError(
                f"{rejection.file}:{rejection.line}: {rejection.reason}. "
                "Set data.on_bad_row=skip to skip and count such rows."
            )
        rejected.append(rejection)

    for path in expand_paths(paths, exclude):
        for record in read_records(path, on_reject=reject):
            try:
                document = make_document(render(template, record.fields), tokenizer, origin=record.origin)
            except DataError as error:
                reject(Rejection(file=record.file, line=record.line, reason=str(error)))
                tokens_dropped += getattr(error, "num_tokens", 0)
                continue
            _check_ids_fit(document, tokenizer, vocab_size)
            documents.append(document)
    if not documents:
        raise _no_documents(paths, rejected)
    return LoadedData(documents=documents, rejected=rejected, tokens_dropped=tokens_dropped)


def _no_documents(paths: Sequence[str], rejected: Sequence[Rejection]) -> DataError:
    if not rejected:
        return DataError(f"data.path={list(paths)}: expected at least one document, got none: the files have no rows.")
    first = rejected[0]
    return DataError(
        f"data.path={list(paths)}: expected at least one document, got none: all {len(rejected)} rows were rejected, "
        f"the first ({first.file}:{first.line}) because: {first.reason}."
    )


def _check_ids_fit(document: Document, tokenizer: Tokenizer, vocab_size: int | None) -> None:
    largest = int(document.tokens.max())
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(
            f"{document.origin}: data.tokenizer={tokenizer.name} gives the token id {largest}, but the model's "
            f"vocabulary has {vocab_size} rows (ids 0..{vocab_size - 1}). Set data.tokenizer to the tokenizer that the "
            "model was trained with."
        )


def split_validation(
    documents: Sequence[Document], *, fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Hold out a random share of whole documents, the same for the same seed.

    Args: fraction: share of the documents, above 0 and below 1; at least one document goes to either side.
    Returns: training and validation documents, each in the order given.
    Raises: DataError where there are fewer than two documents.
    """
    _check_fraction(fraction, "data.validation")
    if len(documents) < 2:
        raise DataError(
            f"data.validation={fraction}: holds out whole documents and needs at least 2, got {len(documents)}. "
            f"Set data.validation_tail={fraction} to hold out the end of each document, or data.validation to a file."
        )
    num_held_out = min(max(1, round(len(documents) * fraction)), len(documents) - 1)
    # The third word keeps this draw apart from the permutations of the epochs, which are drawn from (seed, epoch).
    generator = np.random.Generator(np.random.PCG64([seed, 0, 1]))
    held_out = set(generator.permutation(len(documents))[:num_held_out].tolist())
    train = [document for index, document in enumerate(documents) if index not in held_out]
    return train, [documents[index] for index in sorted(held_out)]


def split_tail(documents: Sequence[Document], *, fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out the last part of every document; a document too short for that is only trained on.

    Args: fraction: share of each document's tokens, above 0 and below 1.
    Returns: training and validation documents. The held-out part starts afresh: its first token has weight 0.
    Raises: DataError where every document is too short.
    """
    _check_fraction(fraction, "data.validation_tail")
    first_part, last_part = f"[first {100 * (1 - fraction):g} %]", f"[last {100 * fraction:g} %]"
    train, validation = [], []
    for document in documents:
        # The small term undoes rounding: 10 * (1 - 0.9) is just below 1.
        cut = math.floor(len(document) * (1 - fraction) + 1e-9)
        if min(cut, len(document) - cut) < MIN_TAIL_TOKENS:
            train.append(document)
            continue
        train.append(_part(document, slice(0, cut), first_part))
        validation.append(_part(document, slice(cut, None), last_part))
    if not validation:
        raise DataError(
            f"data.validation_tail={fraction}: leaves fewer than {MIN_TAIL_TOKENS} tokens on one side of the cut in "
            f"each of the {len(documents)} documents. Use another fraction, or set data.validation."
        )
    return train, validation


def _part(document: Document, tokens: slice, label: str) -> Document:
    weights = document.weights[tokens].copy()
    weights[0] = 0
    return Document(tokens=document.tokens[tokens], weights=weights, origin=f"{document.origin} {label}")


def _check_fraction(fraction: float, key: str) -> None:
    if not 0 < fraction < 1:
        raise DataError(f"{key}={fraction}: expected a fraction above 0 and below 1.")


def ledger(documents: Sequence[Document], rejected: Sequence[Rejection], *, dropped: int = 0) -> dict[str, object]:
    """Account for every token: in = trained + masked + dropped. A document's first token counts as masked."""
    num_kept = sum(len(document) for document in documents)
    trained = sum(document.num_trained_tokens for document in documents)
    return {
        "documents": len(documents),
        "tokens": {"in": num_kept + dropped, "trained": trained, "masked": num_kept - trained, "dropped": dropped},
        "rejected_rows": [{"file": row.file, "line": row.line, "reason": row.reason} for row in rejected],
    }
