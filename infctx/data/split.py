"""Documents that are held out: whole ones, or the end of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.errors import DataError

MIN_TAIL_TOKENS = 2
"""A shorter half of a document holds no target."""


def split_validation(documents: Sequence[Document], *, fraction: float, seed: int) -> tuple[DocumentSet, DocumentSet]:
    """Hold out a random share of whole documents, the same for the same seed.

    Args: fraction: share of the documents, above 0 and below 1; at least one document goes to either side.
    Returns: training and validation documents, each in the order given.
    Raises: DataError where there are fewer than two documents.
    """
    _check_fraction(fraction, "data.validation")
    documents = _as_set(documents)
    if len(documents) < 2:
        raise DataError(
            f"data.validation={fraction}: holds out whole documents and needs at least 2, got {len(documents)}. "
            f"Set data.validation_tail={fraction} to hold out the end of each document, or data.validation to a file."
        )
    num_held_out = min(max(1, round(len(documents) * fraction)), len(documents) - 1)
    # The third word keeps this draw apart from the permutations of the epochs, which are drawn from (seed, epoch).
    generator = np.random.Generator(np.random.PCG64([seed, 0, 1]))
    is_held_out = np.zeros(len(documents), dtype=np.bool_)
    is_held_out[generator.permutation(len(documents))[:num_held_out]] = True
    return documents.subset(np.flatnonzero(~is_held_out)), documents.subset(np.flatnonzero(is_held_out))


def split_tail(documents: Sequence[Document], *, fraction: float) -> tuple[DocumentSet, DocumentSet]:
    """Hold out the last part of every document; a document too short for that is only trained on.

    Args: fraction: share of each document's tokens, above 0 and below 1.
    Returns: training and validation documents. The held-out part starts afresh: its first token has weight 0.
    Raises: DataError where every document is too short.
    """
    _check_fraction(fraction, "data.validation_tail")
    documents = _as_set(documents)
    lengths = documents.lengths
    # The small term undoes rounding: 10 * (1 - 0.9) is just below 1.
    cuts = np.floor(lengths * (1 - fraction) + 1e-9).astype(np.int64)
    is_long = np.minimum(cuts, lengths - cuts) >= MIN_TAIL_TOKENS
    if not is_long.any():
        raise DataError(
            f"data.validation_tail={fraction}: leaves fewer than {MIN_TAIL_TOKENS} tokens on one side of the cut in "
            f"each of the {len(documents)} documents. Use another fraction, or set data.validation."
        )
    everywhere = np.arange(len(documents))
    train = documents.pieces(everywhere, np.zeros_like(lengths), np.where(is_long, cuts, lengths))
    return train, documents.pieces(everywhere[is_long], cuts[is_long], lengths[is_long])


def _as_set(documents: Sequence[Document]) -> DocumentSet:
    return documents if isinstance(documents, DocumentSet) else DocumentSet.of(documents)


def _check_fraction(fraction: float, key: str) -> None:
    if not 0 < fraction < 1:
        raise DataError(f"{key}={fraction}: expected a fraction above 0 and below 1.")
