"""Rows of tokens, cut into the chunks that the model sees one after another.

Rows are kept small (7 bytes a token); a chunk is cut when it is asked for, so that a long document costs no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from infctx.data.document import Document


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowSlice:
    """What one row contributes to one step.

    Attributes:
        tokens: ids [n], of any integer type; n may be 0.
        targets: ids [n], the token after each; 0 where there is none.
        weights: float32 [n], the weight of each target.
        starts: bool [n], True at a document's first token.
        origins: of the documents it holds a part of.
    """

    tokens: npt.NDArray[np.integer]
    targets: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float32]
    starts: npt.NDArray[np.bool_]
    origins: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def weight_total(self) -> float:
        """The sum of the weights, in float64."""
        return float(self.weights.sum(dtype=np.float64))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """Up to `chunk_tokens` tokens of every row of a group.

    Attributes:
        tokens: int64 [B, T]; 0 where a row is padded.
        targets: int64 [B, T], the token after each; 0 where there is none.
        loss_weight: float32 [B, T], the weight of the target; 0 on padding.
        starts: bool [B, T], or None when no document starts in this chunk.
        index: counted from the step's first chunk.
        has_loss: whether any weight is not 0; known here so that nobody has to ask the device.
    """

    tokens: Tensor
    targets: Tensor
    loss_weight: Tensor
    starts: Tensor | None
    index: int
    has_loss: bool

    def to(self, device: torch.device) -> Chunk:
        """The chunk on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            loss_weight=self.loss_weight.to(device, non_blocking=True),
            starts=None if self.starts is None else self.starts.to(device, non_blocking=True),
        )


class CutWhenAsked(Sequence[Chunk]):
    """Chunks that are cut when they are asked for; a kind of them says how many there are, and cuts one."""

    __slots__ = ()

    def cut(self, index: int) -> Chunk:
        """The chunk of this number, 0 <= index < len."""
        raise AssertionError("each kind has its own")

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        places = range(len(self))[index]
        return self.cut(places) if isinstance(places, int) else [self.cut(place) for place in places]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChunkSequence:
    """The chunks of one group of rows in one step.

    Attributes:
        weight_total: the sum of all weights, in float64.
        num_tokens: real tokens; padding is not counted.
        origins: of the documents in the rows, in their order.
    """

    chunks: RowChunks
    weight_total: float
    num_tokens: int
    origins: tuple[str, ...]

    def in_pieces(self, piece_tokens: int) -> ChunkSequence:
        """The same rows with every chunk cut into pieces of at most so many tokens, counted from the chunk's first."""
        return replace(self, chunks=replace(self.chunks, piece_tokens=piece_tokens))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowChunks(CutWhenAsked):
    """The chunks of some rows, each cut when it is asked for.

    Attributes:
        num_tokens: length of the rows with their padding on the right.
        chunk_tokens: tokens in a chunk; the last may be shorter.
        piece_tokens: a chunk is given in pieces of at most so many tokens; chunk_tokens = whole.
    """

    rows: Sequence[RowSlice]
    num_tokens: int
    chunk_tokens: int
    piece_tokens: int

    @property
    def pieces_per_chunk(self) -> int:
        """Pieces of a chunk that is not the last."""
        return -(-self.chunk_tokens // self.piece_tokens)

    def __len__(self) -> int:
        full, rest = divmod(self.num_tokens, self.chunk_tokens)
        return full * self.pieces_per_chunk + -(-rest // self.piece_tokens)

    def cut(self, index: int) -> Chunk:
        """The piece of this number."""
        chunk, piece = divmod(index, self.pieces_per_chunk)
        begin = chunk * self.chunk_tokens + piece * self.piece_tokens
        end = min(begin + self.piece_tokens, (chunk + 1) * self.chunk_tokens, self.num_tokens)
        return _cut(self.rows, begin, end, index=index)


def join_pieces(pieces: Iterable[tuple[Document, int]], *, num_tokens: int) -> RowSlice:
    """Lay pieces of documents back to back and read off the targets.

    Args:
        pieces: a document and the token where its piece begins; each runs to its document's end.
        num_tokens: the length of the slice, at most. Where the pieces hold more, the next token is the last target.
    """
    kept: list[tuple[Document, int, int]] = []
    num_missing = num_tokens + 1
    for document, begin in pieces:
        if num_missing == 0:
            break
        num_taken = min(len(document) - begin, num_missing)
        kept.append((document, begin, begin + num_taken))
        num_missing -= num_taken
    length = sum(end - begin for _, begin, end in kept)
    id_type = np.result_type(np.uint16, *(document.tokens.dtype for document, _, _ in kept))
    ahead_tokens = np.zeros(length + 1, dtype=id_type)
    ahead_weights = np.zeros(length + 1, dtype=np.float32)
    starts = np.zeros(length, dtype=np.bool_)
    place = 0
    for document, begin, end in kept:
        stop = place + end - begin
        ahead_tokens[place:stop] = document.tokens[begin:end]
        ahead_weights[place:stop] = document.weights[begin:end]
        starts[place] = begin == 0
        place = stop
    length = min(length, num_tokens)
    return RowSlice(
        tokens=ahead_tokens[:length],
        targets=ahead_tokens[1 : length + 1],
        weights=ahead_weights[1 : length + 1],
        starts=starts[:length],
        # The last may be there for its first token alone, which is a target and no input.
        origins=tuple(document.origin for document, _, _ in kept),
    )


def chunk_rows(rows: Sequence[RowSlice], *, chunk_tokens: int, min_tokens: int = 0) -> ChunkSequence:
    """Pad the rows on the right to one length and cut them every `chunk_tokens` tokens; the last chunk may be shorter.

    Args: min_tokens: pad to at least this length, so that groups on other ranks get the same number of chunks.
    """
    assert rows, "a group has no rows"
    assert chunk_tokens >= 1, f"chunk_tokens={chunk_tokens}"
    length = max(min_tokens, *(len(row) for row in rows))
    return ChunkSequence(
        chunks=RowChunks(rows=rows, num_tokens=length, chunk_tokens=chunk_tokens, piece_tokens=chunk_tokens),
        weight_total=sum(row.weight_total for row in rows),
        num_tokens=sum(len(row) for row in rows),
        origins=tuple(dict.fromkeys(origin for row in rows for origin in row.origins)),
    )


def _cut(rows: Sequence[RowSlice], begin: int, end: int, *, index: int) -> Chunk:
    shape = (len(rows), end - begin)
    tokens, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights, starts = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.bool_)
    for number, row in enumerate(rows):
        num_real = max(0, min(end, len(row)) - begin)
        tokens[number, :num_real] = row.tokens[begin:end]
        targets[number, :num_real] = row.targets[begin:end]
        weights[number, :num_real] = row.weights[begin:end]
        starts[number, :num_real] = row.starts[begin:end]
    return Chunk(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        loss_weight=torch.from_numpy(weights),
        starts=torch.from_numpy(starts) if starts.any() else None,
        index=index,
        has_loss=bool(weights.any()),
    )


def validation_batches(documents: Sequence[Document], *, rows: int, chunk_tokens: int) -> Iterator[ChunkSequence]:
    """Give every document whole and from a fresh state, `rows` at a time, shortest first so that little is padded."""
    by_length = sorted(documents, key=len)
    for begin in range(0, len(by_length), rows):
        group = by_length[begin : begin + rows]
        slices = [join_pieces([(document, 0)], num_tokens=len(document)) for document in group]
        yield chunk_rows(slices, chunk_tokens=chunk_tokens)
