"""The loss of every token of some documents, read in chunks with the state carried, and given away chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import in_compute_dtype
from infctx.training.host_memory import HeapTrimmer
from infctx.training.loss import weighted_loss_sum

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossPiece:
    """Neighbouring targets of some documents.

    Attributes:
        places: int64 [B], the documents' places in their sequence.
        first_position: of the first target in its document: the number of tokens before it.
        losses: float64 [B, T], nats, each times its weight; 0 on padding.
        weights: float64 [B, T]; 0 on padding.
        targets: int64 [B, T]; 0 on padding.
    """

    places: npt.NDArray[np.int64]
    first_position: int
    losses: Floats
    weights: Floats
    targets: npt.NDArray[np.int64]

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Of the targets [T]: the number of tokens before each in its document."""
        return self.first_position + np.arange(self.losses.shape[1])


def document_lengths(documents: Sequence[Document]) -> list[int]:
    """Tokens of each document, without reading those that are mapped from a file."""
    return documents.lengths.tolist() if isinstance(documents, DocumentSet) else [len(one) for one in documents]


@torch.no_grad()
def read_losses(
    model: Finch,
    documents: Sequence[Document],
    *,
    chunk_tokens: int,
    rows: int,
    reset_tokens: int | None = None,
) -> Iterator[LossPiece]:
    """Read every document from a fresh state and yield the losses of its targets.

    Chunks that hold no weight are read, for the state, and not yielded. One chunk is in memory at a time.

    Args:
        model: in evaluation mode.
        chunk_tokens: read at once.
        rows: documents read side by side, those of about one length together; a document that ends leaves its row.
        reset_tokens: before every token whose position is a multiple of this the state is that of a fresh document.
    Raises:
        CheckpointError: a loss is not finite.
    """
    assert not model.training, "expected a model in evaluation mode"
    assert min(chunk_tokens, rows, reset_tokens or 1) >= 1, f"{chunk_tokens=} {rows=} {reset_tokens=}"
    lengths = document_lengths(documents)
    trimmer = HeapTrimmer(model.embedding.weight.device)
    # Longest first: the rows that end are always the last ones.
    by_length = sorted((place for place, length in enumerate(lengths) if length > 1), key=lambda place: -lengths[place])
    for first in range(0, len(by_length), rows):
        places = np.array(by_length[first : first + rows])
        group = [documents[place] for place in places.tolist()]
        state = model.fresh_state(len(group))
        for begin in range(0, len(group[0]) - 1, chunk_tokens):
            # The last token of a document has nothing to predict.
            group = [document for document in group if len(document) - 1 > begin]
            state = ModelState(*(tensor[:, : len(group)] for tensor in state))
            found, state = _read_chunk(
                model, group, state, begin=begin, chunk_tokens=chunk_tokens, reset_tokens=reset_tokens
            )
            trimmer.tick()
            if found is not None:
                losses, weights, targets = found
                yield LossPiece(
                    places=places[: len(group)],
                    first_position=begin + 1,
                    losses=losses,
                    weights=weights,
                    targets=targets,
                )


def _read_chunk(
    model: Finch,
    group: Sequence[Document],
    state: ModelState,
    *,
    begin: int,
    chunk_tokens: int,
    reset_tokens: int | None,
) -> tuple[tuple[Floats, Floats, npt.NDArray[np.int64]] | None, ModelState]:
    """Losses, weights and targets of one chunk, None without weights, and the state after it."""
    num_tokens = min(chunk_tokens, len(group[0]) - 1 - begin)
    tokens = np.zeros((len(group), num_tokens), dtype=np.int64)
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=np.float32)
    for row, document in enumerate(group):
        end = min(begin + num_tokens, len(document) - 1)
        tokens[row, : end - begin] = document.tokens[begin:end]
        targets[row, : end - begin] = document.tokens[begin + 1 : end + 1]
        weights[row, : end - begin] = document.weights[begin + 1 : end + 1]
    device = model.embedding.weight.device
    inputs = torch.from_numpy(tokens).to(device)
    starts = _resets(begin, num_tokens, reset_tokens)
    if starts is not None:
        starts = starts.to(device).expand(len(group), num_tokens)
    with in_compute_dtype(model, device):
        if not weights.any():
            return None, model.advance(inputs, state, starts=starts)
        hidden, state = model.forward_hidden(inputs, state, starts=starts)
        _, losses = weighted_loss_sum(
            hidden,
            model.head,
            torch.from_numpy(targets).to(device),
            torch.from_numpy(weights).to(device),
            vocab_size=model.config.vocab_size,
            backend=model.surrounding_backend,
            with_token_losses=True,
        )
    found = losses.double().cpu().numpy().reshape(tokens.shape)
    if not np.isfinite(found).all():
        row, place = np.argwhere(~np.isfinite(found))[0].tolist()
        raise CheckpointError(
            f"the loss of token {begin + 1 + place:,} of {group[row].origin} is not finite: the model's weights are "
            "damaged, or its training diverged. Take an earlier checkpoint."
        )
    return (found, weights.astype(np.float64), targets), state


def _resets(begin: int, num_tokens: int, reset_tokens: int | None) -> torch.Tensor | None:
    """Where the state is that of a fresh document, bool [1, T]; None where nowhere."""
    if reset_tokens is None:
        return None
    positions = begin + np.arange(num_tokens)
    is_reset = (positions % reset_tokens == 0) & (positions > 0)
    return torch.from_numpy(is_reset)[None] if is_reset.any() else None
