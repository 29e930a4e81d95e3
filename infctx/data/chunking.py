"""Rows of tokens, cut into the chunks that the model sees one after another.

Rows are kept small (7 bytes a token, 8 in a mixture of sets); a chunk is cut when it is asked for, so that a long
document costs no more.
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
from infctx.data.document_set import DocumentSet

COUNTED_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowSlice:
    """What one row contributes to one step.

    Attributes:
        tokens: ids [n], of any integer type; n may be 0.
        targets: ids [n], the token after each; 0 where there is none.
        weights: float32 [n], the weight of each target.
        starts: bool [n], True at a document's first token.
        origins: of the documents it holds a part of.
        sets: uint8 [n], the set of each token, and of its target where that has a weight: both are of one document.
            None = all of set 0.
    """

    tokens: npt.NDArray[np.integer]
    targets: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float32]
    starts: npt.NDArray[np.bool_]
    origins: tuple[str, ...] = ()
    sets: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def weight_total(self) -> float:
        """The sum of the weights, in float64."""
        return float(self.weights.sum(dtype=np.float64))

    def totals_by_set(self, num_sets: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Of each set, its tokens and the sum of their targets' weights, in float64."""
        num_tokens = np.zeros(num_sets, dtype=np.int64)
        weights = np.zeros(num_sets, dtype=np.float64)
        if self.sets is None:
            num_tokens[0], weights[0] = len(self), self.weight_total
            return num_tokens, weights
        # In parts: bincount makes copies in int64 and float64 of what it counts.
        for begin in range(0, len(self), COUNTED_AT_ONCE):
            part = slice(begin, begin + COUNTED_AT_ONCE)
            num_tokens += np.bincount(self.sets[part], minlength=num_sets)
            weights += np.bincount(self.sets[part], weights=self.weights[part], minlength=num_sets)
        return num_tokens, weights


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
        sets: uint8 [B, T], the set of each token and of its target, 0 on padding; None where there is one set only.
        num_sets: there are.
        most_tokens: of all rows, where several ranks have parts of the chunk: in the largest part; 0 = in this one.
    """

    tokens: Tensor
    targets: Tensor
    loss_weight: Tensor
    starts: Tensor | None
    index: int
    has_loss: bool
    sets: Tensor | None = None
    num_sets: int = 1
    most_tokens: int = 0

    def to(self, device: torch.device) -> Chunk:
        """The chunk on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            loss_weight=self.loss_weight.to(device, non_blocking=True),
            starts=None if self.starts is None else self.starts.to(device, non_blocking=True),
            sets=None if self.sets is None else self.sets.to(device, non_blocking=True),
        )

    def slice_of(self, rank: int, ranks: int) -> Chunk:
        """The tokens that one of several ranks holds: nearly as many for each, in the order of the ranks.

        `has_loss`, and whether `starts` is None, are those of the whole chunk, so that all ranks go the same way.

        Args:
            rank: 0 <= rank < ranks.
            ranks: at most T, so that nobody is without a token.
        """
        num_tokens = self.tokens.shape[1]
        assert 0 <= rank < ranks <= num_tokens, f"rank {rank} of {ranks}, {num_tokens} tokens"
        place = slice(num_tokens * rank // ranks, num_tokens * (rank + 1) // ranks)
        return replace(
            self,
            tokens=self.tokens[:, place],
            targets=self.targets[:, place],
            loss_weight=self.loss_weight[:, place],
            starts=None if self.starts is None else self.starts[:, place],
            sets=None if self.sets is None else self.sets[:, place],
            most_tokens=self.tokens.shape[0] * -(-num_tokens // ranks),
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
        num_sets: that documents may come from; with more than one the chunks tell the sets.
        peers: rows that other ranks run at the same time. What a chunk has, a loss or a document's start, it has on all
            ranks or on none, so that all of them do the same with it.
        part: of every chunk, which of how many parts this rank computes; (0, 1) = all of it.
    """

    rows: Sequence[RowSlice]
    num_tokens: int
    chunk_tokens: int
    piece_tokens: int
    num_sets: int = 1
    peers: Sequence[RowSlice] = ()
    part: tuple[int, int] = (0, 1)

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
        whole = _cut(self.rows, begin, end, index=index, num_sets=self.num_sets, peers=self.peers)
        return whole if self.part == (0, 1) else whole.slice_of(*self.part)


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
    has_sets = any(document.set_index for document, _, _ in kept)
    sets = np.zeros(length, dtype=np.uint8) if has_sets else None
    place = 0
    for document, begin, end in kept:
        stop = place + end - begin
        ahead_tokens[place:stop] = document.tokens[begin:end]
        ahead_weights[place:stop] = document.weights[begin:end]
        starts[place] = begin == 0
        if sets is not None:
            sets[place:stop] = document.set_index
        place = stop
    length = min(length, num_tokens)
    return RowSlice(
        tokens=ahead_tokens[:length],
        targets=ahead_tokens[1 : length + 1],
        weights=ahead_weights[1 : length + 1],
        starts=starts[:length],
        # The last may be there for its first token alone, which is a target and no input.
        origins=tuple(document.origin for document, _, _ in kept),
        sets=sets[:length] if sets is not None else None,
    )


def chunk_rows(
    rows: Sequence[RowSlice],
    *,
    chunk_tokens: int,
    min_tokens: int = 0,
    num_sets: int = 1,
    peers: Sequence[RowSlice] = (),
    part: tuple[int, int] = (0, 1),
) -> ChunkSequence:
    """Pad the rows on the right to one length and cut them every `chunk_tokens` tokens; the last chunk may be shorter.

    Args:
        min_tokens: pad to at least this length, so that groups on other ranks get the same number of chunks.
        num_sets: that documents may come from; with more than one the chunks tell the sets.
        peers, part: see `RowChunks`. A chunk has a token for each part; the last is padded to that.
    """
    assert rows, "a group has no rows"
    assert chunk_tokens >= 1, f"chunk_tokens={chunk_tokens}"
    if num_sets > 1:
        last = max((int(row.sets.max(initial=0)) for row in rows if row.sets is not None), default=0)
        assert last < num_sets, f"a document of set {last} in a mixture of {num_sets}"
    length = max(min_tokens, *(len(row) for row in rows))
    length += max(0, part[1] - (length % chunk_tokens or chunk_tokens))
    return ChunkSequence(
        chunks=RowChunks(
            rows=rows,
            num_tokens=length,
            chunk_tokens=chunk_tokens,
            piece_tokens=chunk_tokens,
            num_sets=num_sets,
            peers=peers,
            part=part,
        ),
        weight_total=sum(row.weight_total for row in rows),
        num_tokens=sum(len(row) for row in rows),
        origins=tuple(dict.fromkeys(origin for row in rows for origin in row.origins)),
    )


def _cut(
    rows: Sequence[RowSlice], begin: int, end: int, *, index: int, num_sets: int, peers: Sequence[RowSlice]
) -> Chunk:
    shape = (len(rows), end - begin)
    tokens, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights, starts = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.bool_)
    sets = np.zeros(shape, dtype=np.uint8) if num_sets > 1 else None
    for number, row in enumerate(rows):
        num_real = max(0, min(end, len(row)) - begin)
        tokens[number, :num_real] = row.tokens[begin:end]
        targets[number, :num_real] = row.targets[begin:end]
        weights[number, :num_real] = row.weights[begin:end]
        starts[number, :num_real] = row.starts[begin:end]
        if sets is not None and row.sets is not None:
            sets[number, :num_real] = row.sets[begin:end]
    return Chunk(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        loss_weight=torch.from_numpy(weights),
        starts=torch.from_numpy(starts) if starts.any() or any(row.starts[begin:end].any() for row in peers) else None,
        index=index,
        has_loss=bool(weights.any() or any(row.weights[begin:end].any() for row in peers)),
        sets=torch.from_numpy(sets) if sets is not None else None,
        num_sets=num_sets,
    )


def validation_batches(
    documents: Sequence[Document],
    *,
    rows: int,
    chunk_tokens: int,
    num_sets: int = 1,
    rank: int = 0,
    world: int = 1,
    part: tuple[int, int] = (0, 1),
) -> Iterator[ChunkSequence]:
    """Give every document whole and from a fresh state, `rows` at a time, shortest first so that little is padded.

    Args:
        rank, world: every rank gets as many batches of as many chunks, each with documents of its own; where there are
            none left, rows of padding.
        part: see `RowChunks`.
    """
    lengths = documents.lengths.tolist() if isinstance(documents, DocumentSet) else [len(one) for one in documents]
    by_length = sorted(range(len(documents)), key=lengths.__getitem__)
    for begin in range(0, len(by_length), rows * world):
        # One group of documents at a time: all of them may be more than fits the memory.
        group = [documents[place] for place in by_length[begin : begin + rows * world]]
        slices = [join_pieces([(document, 0)], num_tokens=len(document)) for document in group]
        mine = slices[rank * rows : (rank + 1) * rows]
        # As many rows on every rank: what is done with them in pieces is done as often.
        mine += [join_pieces([], num_tokens=0)] * (min(rows, len(slices)) - len(mine))
        yield chunk_rows(
            mine,
            chunk_tokens=chunk_tokens,
            min_tokens=max(map(len, slices)),
            num_sets=num_sets,
            peers=slices if world > 1 else (),
            part=part,
        )
