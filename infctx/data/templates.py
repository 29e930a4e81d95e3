"""Rows to documents: which text is shown to the model, and which part of it is trained on.

A template names the trained parts as byte spans of the whole rendered text. The text is tokenised once, and a token has
the weight of the span in which its last byte lies: so the mask does not depend on where tokens happen to end, and the
ids are those the model will meet, which they would not be if the pieces were tokenised one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infctx.data.document import Document, smallest_ids
from infctx.data.rendered import (
    EmptyRowError,
    NothingToTrainOnError,
    Rendered,
    WrongFieldsError,
    leading_space_missing,
)
from infctx.data.template_catalog import TEMPLATE_NAMES, Template, looks_like, make_template
from infctx.data.tokenizer import END_OF_TEXT, Tokenizer, utf8_length

__all__ = [
    "TEMPLATE_NAMES",
    "EmptyRowError",
    "NothingToTrainOnError",
    "Rendered",
    "Template",
    "TokenBatch",
    "WrongFieldsError",
    "leading_space_missing",
    "looks_like",
    "make_document",
    "make_documents",
    "make_template",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenBatch:
    """Documents one after the other.

    Attributes:
        tokens: ids [n], int32; each document closed with end of text.
        weights: float32 [n], of each token as a target; 0 for the first token of each document.
        lengths: int64 [documents], end of text included.
    """

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]


def make_documents(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> TokenBatch:
    """Tokenise each rendered text once, close it with end of text, and weigh its tokens.

    Rows are taken together, a megabyte or so at once: the work on each row alone would cost more than on its text. A
    row without text becomes end of text alone, one with nothing to train on has no weight above 0: neither is an error.
    """
    ids, lengths = tokenizer.encode_batch([row.text for row in rendered])
    row_ends = np.cumsum(lengths)
    weights = _token_weights(rendered, ids, lengths, tokenizer)
    end_weights = np.array([row.end_weight for row in rendered], dtype=np.float32)
    weights = np.insert(weights, row_ends, end_weights)
    lengths = lengths + 1
    # Nothing comes before the first token to predict it.
    weights[np.cumsum(lengths) - lengths] = 0
    return TokenBatch(tokens=np.insert(ids, row_ends, END_OF_TEXT), weights=weights, lengths=lengths)


def _token_weights(
    rendered: Sequence[Rendered], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], tokenizer: Tokenizer
) -> npt.NDArray[np.float32]:
    """Weigh the tokens of the texts, without the ends of text: [n]."""
    num_bytes = [utf8_length(row.text) for row in rendered]
    if all(row.spans == ((0, size, 1.0),) for row, size in zip(rendered, num_bytes, strict=True)):
        return np.ones(len(ids), dtype=np.float32)
    last_bytes = tokenizer.token_ends([row.text for row in rendered], ids, lengths) - 1
    borders, weights = [0], [0.0]
    text_start = 0
    for row, size in zip(rendered, num_bytes, strict=True):
        for start, end, weight in row.spans:
            borders += (text_start + start, text_start + end)
            weights += (weight, 0.0)
        text_start += size
    # Token numbers where the weight changes: of the first token whose last byte is at or after each border.
    changes = np.searchsorted(last_bytes, np.array(borders, dtype=np.int64))
    return np.repeat(np.array(weights, dtype=np.float32), np.diff(changes, append=len(ids)))


def make_document(rendered: Rendered, tokenizer: Tokenizer, *, origin: str) -> Document:
    """Make the document of one row: see `make_documents`.

    Raises: EmptyRowError for an empty text; NothingToTrainOnError.
    """
    batch = make_documents([rendered], tokenizer)
    if len(batch.tokens) == 1:
        raise EmptyRowError("empty document")
    if not batch.weights.any():
        reason = "nothing to train on: no token but the first lies in the trained part"
        raise NothingToTrainOnError(reason, num_tokens=len(batch.tokens))
    return Document(tokens=smallest_ids(batch.tokens), weights=batch.weights, origin=origin)
