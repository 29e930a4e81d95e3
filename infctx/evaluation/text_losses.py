"""The log-probability of whole texts, of any length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infctx.data.document import Document, smallest_ids
from infctx.data.tokenizer import END_OF_TEXT, Tokenizer
from infctx.evaluation.document_losses import read_losses
from infctx.model.finch import Finch


def text_log_probabilities(
    model: Finch, tokenizer: Tokenizer, texts: Sequence[str], *, rows: int, chunk_tokens: int
) -> list[float]:
    """The log-probability of all tokens of each text behind an end of text, nats; the state is carried through it."""
    documents = []
    for number, text in enumerate(texts):
        ids = np.concatenate([[END_OF_TEXT], tokenizer.encode(text)])
        weights = np.ones(len(ids), dtype=np.float32)
        weights[0] = 0.0
        documents.append(Document(tokens=smallest_ids(ids), weights=weights, origin=f"text {number + 1}"))
    sums = np.zeros(len(texts))
    for piece in read_losses(model, documents, chunk_tokens=chunk_tokens, rows=rows):
        sums[piece.places] -= piece.losses.sum(axis=1)
    return sums.tolist()
