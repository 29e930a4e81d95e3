"""Rows to chunks: targets across borders, padding that counts for nothing, starts only where there are any."""

import numpy as np
import pytest
import torch

from infctx.data import chunking
from infctx.data.chunking import ChunkSequence, RowSlice, chunk_rows, join_pieces, validation_batches
from infctx.data.document import Document


def document_of(tokens: list[int], weights: list[float] | None = None, *, set_index: int = 0) -> Document:
    chosen = [0.0] + [1.0] * (len(tokens) - 1) if weights is None else weights
    return Document(
        tokens=np.array(tokens, dtype=np.uint16),
        weights=np.array(chosen, dtype=np.float32),
        origin=f"of {tokens}",
        set_index=set_index,
    )


def whole(*documents: Document) -> RowSlice:
    return join_pieces([(document, 0) for document in documents], num_tokens=sum(map(len, documents)))


def joined(sequence: ChunkSequence, name: str) -> list[list[float]]:
    parts = []
    for chunk in sequence.chunks:
        part = getattr(chunk, name)
        parts.append(torch.zeros_like(chunk.tokens, dtype=torch.bool) if part is None else part)
    rows: list[list[float]] = torch.cat(parts, dim=1).tolist()
    return rows


def test_join_pieces_reads_targets_off_the_next_token() -> None:
    row = whole(document_of([5, 6, 7], [0, 0.5, 2]), document_of([8]), document_of([9, 10]))
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert row.targets.tolist() == [6, 7, 8, 9, 10, 0]
    # A document's first token is nobody's target, though it is the next token.
    assert row.weights.tolist() == [0.5, 2, 0, 0, 1, 0]
    assert row.starts.tolist() == [True, False, False, True, True, False]
    # As small as the documents: a row of a million tokens is read in one step.
    assert (row.tokens.dtype, row.targets.dtype) == (np.uint16, np.uint16)
    assert (row.weights.dtype, row.starts.dtype) == (np.float32, np.bool_)
    assert row.weight_total == 3.5


def test_join_pieces_reads_one_token_ahead() -> None:
    document = document_of([5, 6, 7, 8])
    row = join_pieces([(document, 1)], num_tokens=2)
    assert (row.tokens.tolist(), row.targets.tolist(), row.weights.tolist()) == ([6, 7], [7, 8], [1, 1])
    assert row.starts.tolist() == [False, False]
    # The token ahead may be the first of another document, and then it has no weight.
    row = join_pieces([(document, 2), (document, 0)], num_tokens=2)
    assert (row.tokens.tolist(), row.targets.tolist(), row.weights.tolist()) == ([7, 8], [8, 5], [1, 0])
    assert row.starts.tolist() == [False, False]
    assert len(join_pieces([], num_tokens=3)) == 0


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 4, 7, 8, 100])
def test_chunks_cut_what_was_there(chunk_tokens: int) -> None:
    rows = [whole(document_of(list(range(1, 8)))), whole(document_of([11, 12, 13]), document_of([14]))]
    sequence = chunk_rows(rows, chunk_tokens=chunk_tokens)
    assert [chunk.tokens.shape[1] for chunk in sequence.chunks] == [
        min(chunk_tokens, 7 - begin) for begin in range(0, 7, chunk_tokens)
    ]
    assert [chunk.index for chunk in sequence.chunks] == list(range(len(sequence.chunks)))
    assert joined(sequence, "tokens") == [[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 0, 0, 0]]
    assert joined(sequence, "targets") == [[2, 3, 4, 5, 6, 7, 0], [12, 13, 14, 0, 0, 0, 0]]
    assert joined(sequence, "loss_weight") == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert joined(sequence, "starts") == [[1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]]
    assert sequence.num_tokens == 11
    assert sequence.weight_total == 8
    for chunk in sequence.chunks:
        assert (chunk.tokens.dtype, chunk.targets.dtype) == (torch.int64, torch.int64)
        assert chunk.loss_weight.dtype == torch.float32
        assert all(tensor.is_contiguous() for tensor in (chunk.tokens, chunk.targets, chunk.loss_weight))
        assert chunk.has_loss == bool(chunk.loss_weight.any())
        # starts is None exactly where no document starts.
        assert chunk.starts is None or bool(chunk.starts.any())


def test_starts_and_has_loss_are_decided_for_each_chunk() -> None:
    row = whole(document_of([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 0, 0]), document_of([7, 8], [0, 0]))
    sequence = chunk_rows([row], chunk_tokens=2)
    assert [chunk.starts is None for chunk in sequence.chunks] == [False, True, True, False]
    assert [chunk.has_loss for chunk in sequence.chunks] == [False, True, False, False]


def test_min_tokens_pads_without_counting() -> None:
    row = whole(document_of([1, 2, 3]))
    plain, padded = chunk_rows([row], chunk_tokens=2), chunk_rows([row], chunk_tokens=2, min_tokens=7)
    assert [chunk.tokens.shape for chunk in padded.chunks] == [(1, 2), (1, 2), (1, 2), (1, 1)]
    assert joined(padded, "tokens") == [[1, 2, 3, 0, 0, 0, 0]]
    assert (padded.num_tokens, padded.weight_total) == (plain.num_tokens, plain.weight_total) == (3, 2.0)
    assert chunk_rows([row], chunk_tokens=2, min_tokens=1).chunks[-1].tokens.shape == (1, 1)
    empty = chunk_rows([join_pieces([], num_tokens=0)], chunk_tokens=2, min_tokens=1)
    assert (len(empty.chunks), empty.num_tokens, empty.weight_total) == (1, 0, 0.0)
    assert empty.chunks[0].starts is None


def test_weight_total_is_summed_in_float64() -> None:
    # In float32 a thousandth added to 2^24 is lost.
    row = whole(document_of([1, 2, 3], [0, 2.0**24, 0.001]))
    assert chunk_rows([row, row], chunk_tokens=1).weight_total == 2 * (2.0**24 + float(np.float32(0.001)))


def test_validation_reads_every_document_whole_and_shortest_first() -> None:
    lengths = [5, 1, 9, 3, 3]
    documents = [document_of([10 * place + n for n in range(1, length + 1)]) for place, length in enumerate(lengths)]
    batches = list(validation_batches(documents, rows=2, chunk_tokens=4))
    assert [joined(batch, "tokens") for batch in batches] == [
        [[11, 0, 0], [31, 32, 33]],
        [[41, 42, 43, 0, 0], [1, 2, 3, 4, 5]],
        [[21, 22, 23, 24, 25, 26, 27, 28, 29]],
    ]
    assert [batch.num_tokens for batch in batches] == [4, 8, 9]
    assert [batch.weight_total for batch in batches] == [2, 6, 8]
    for batch in batches:
        assert all(row == [1] + [0] * (len(row) - 1) for row in joined(batch, "starts"))


def test_validation_gives_every_rank_as_many_rows() -> None:
    documents = [document_of(range(1, length)) for length in (3, 5, 6, 9, 9, 11, 14)]
    of_ranks = [list(validation_batches(documents, rows=2, chunk_tokens=4, rank=rank, world=3)) for rank in range(3)]
    for batches in zip(*of_ranks, strict=True):
        assert len({tuple(chunk.tokens.shape for chunk in batch.chunks) for batch in batches}) == 1
    assert sum(batch.num_tokens for batches in of_ranks for batch in batches) == sum(map(len, documents))


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("piece_tokens", [1, 2, 3, 4, 100])
def test_pieces_hold_the_same_and_never_cross_a_chunk(chunk_tokens: int, piece_tokens: int) -> None:
    rows = [whole(document_of(range(1, 20)), document_of([3, 4])), whole(document_of([7, 8, 9]))]
    sequence = chunk_rows(rows, chunk_tokens=chunk_tokens)
    pieces = sequence.in_pieces(piece_tokens)
    for name in ("tokens", "targets", "loss_weight", "starts"):
        assert joined(pieces, name) == joined(sequence, name)
    lengths = [piece.tokens.shape[1] for piece in pieces.chunks]
    expected = []
    for chunk in sequence.chunks:
        of_chunk = chunk.tokens.shape[1]
        expected += [min(piece_tokens, of_chunk - begin) for begin in range(0, of_chunk, piece_tokens)]
    assert lengths == expected
    assert [piece.index for piece in pieces.chunks] == list(range(len(expected)))
    assert pieces.chunks.pieces_per_chunk == -(-chunk_tokens // piece_tokens)
    assert pieces.weight_total == sequence.weight_total


@pytest.mark.parametrize(("num_tokens", "ranks"), [(11, 4), (4, 4), (7, 1), (9, 2)])
def test_slices_hold_the_chunk_between_them_and_go_its_way(num_tokens: int, ranks: int) -> None:
    weights = [0.0] * (num_tokens - 1) + [1.0]
    row = whole(document_of(list(range(1, num_tokens + 1)), weights, set_index=1))
    (chunk,) = chunk_rows([row, row], chunk_tokens=num_tokens, num_sets=2).chunks
    slices = [chunk.slice_of(rank, ranks) for rank in range(ranks)]
    for name in ("tokens", "targets", "loss_weight", "starts", "sets"):
        assert torch.equal(torch.cat([getattr(one, name) for one in slices], dim=1), getattr(chunk, name))
    lengths = [one.tokens.shape[1] for one in slices]
    assert max(lengths) - min(lengths) <= 1
    # Only the first has a start, and only the last a loss.
    assert all(one.starts is not None and one.has_loss for one in slices)
    assert [(one.index, one.num_sets) for one in slices] == [(0, 2)] * ranks
    for wrong in ((0, num_tokens + 1), (-1, ranks), (ranks, ranks)):
        with pytest.raises(AssertionError, match=r"rank .* tokens"):
            chunk.slice_of(*wrong)


def test_slices_of_a_chunk_without_starts_or_loss_have_none() -> None:
    row = whole(document_of(list(range(8)), [0.0, 1.0, 1.0, 1.0] + [0.0] * 4))
    chunk = chunk_rows([row], chunk_tokens=4).chunks[1]
    for rank in range(2):
        one = chunk.slice_of(rank, 2)
        assert (one.starts, one.has_loss, one.sets) == (None, False, None)


def test_chunks_are_a_sequence() -> None:
    chunks = chunk_rows([whole(document_of(range(10)))], chunk_tokens=4).chunks
    assert chunks[-1].tokens.tolist() == [[8, 9]]
    assert [chunk.index for chunk in chunks[1:]] == [1, 2]
    with pytest.raises(IndexError):
        chunks[3]


def test_a_row_tells_the_set_of_every_token_in_a_mixture_only() -> None:
    first, second = document_of([5, 6, 7]), document_of([8, 9, 10, 11], set_index=2)
    assert whole(first, first).sets is None
    row = whole(first, second)
    assert row.sets is not None
    assert row.sets.dtype == np.uint8
    assert row.sets.tolist() == [0, 0, 0, 2, 2, 2, 2]
    # In the middle of a document, and with a first token behind the row's end, which is a target and no input.
    row = join_pieces([(second, 1), (first, 0)], num_tokens=3)
    assert row.sets is not None
    assert row.sets.tolist() == [2, 2, 2]
    row = join_pieces([(second, 1), (first, 0)], num_tokens=5)
    assert row.sets is not None
    assert row.sets.tolist() == [2, 2, 2, 0, 0]


@pytest.mark.parametrize("counted_at_once", [1, 2, 100])
def test_totals_by_set(counted_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "COUNTED_AT_ONCE", counted_at_once)
    # In float32 a thousandth added to 2^24 is lost.
    documents = [
        document_of([1, 2, 3], [0, 2.0**24, 0.001], set_index=3),
        document_of([4, 5]),
        document_of([6, 7, 8], [0, 0, 0], set_index=1),
        document_of([9]),
    ]
    tokens, weights = whole(*documents).totals_by_set(4)
    assert (tokens.tolist(), weights.tolist()) == ([3, 3, 0, 3], [1, 0, 0, 2.0**24 + float(np.float32(0.001))])
    tokens, weights = whole(documents[1]).totals_by_set(2)
    assert (tokens.tolist(), weights.tolist()) == ([2, 0], [1, 0])
    tokens, weights = join_pieces([], num_tokens=3).totals_by_set(2)
    assert (tokens.tolist(), weights.tolist()) == ([0, 0], [0, 0])
    # What a row predicts and does not hold is counted with what predicts it.
    tokens, weights = join_pieces([(documents[0], 0)], num_tokens=1).totals_by_set(4)
    assert (tokens.tolist(), weights.tolist()) == ([0, 0, 0, 1], [0, 0, 0, 2.0**24])


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("piece_tokens", [1, 2, 100])
def test_chunks_tell_the_sets_of_a_mixture(chunk_tokens: int, piece_tokens: int) -> None:
    mixed = whole(document_of([1, 2, 3], set_index=1), document_of([4]), document_of([5, 6, 7], set_index=255))
    rows = [mixed, whole(document_of([11, 12, 13])), whole(document_of([21, 22], set_index=2))]
    sequence = chunk_rows(rows, chunk_tokens=chunk_tokens, num_sets=256).in_pieces(piece_tokens)
    assert joined(sequence, "sets") == [[1, 1, 1, 0, 255, 255, 255], [0] * 7, [2, 2, 0, 0, 0, 0, 0]]
    for chunk in sequence.chunks:
        assert chunk.num_sets == 256
        assert chunk.sets is not None
        assert chunk.sets.dtype == torch.uint8
        assert chunk.sets.shape == chunk.tokens.shape
    for chunk in chunk_rows(rows, chunk_tokens=chunk_tokens).chunks:
        assert (chunk.sets, chunk.num_sets) == (None, 1)
    with pytest.raises(AssertionError, match="a document of set 255 in a mixture of 255"):
        chunk_rows(rows, chunk_tokens=chunk_tokens, num_sets=255)


def test_validation_tells_the_sets() -> None:
    documents = [document_of([1, 2, 3, 4], set_index=1), document_of([5, 6])]
    (batch,) = validation_batches(documents, rows=2, chunk_tokens=3, num_sets=2)
    assert joined(batch, "sets") == [[0, 0, 0, 0], [1, 1, 1, 1]]
    (batch,) = validation_batches(documents, rows=2, chunk_tokens=3)
    assert all(chunk.sets is None for chunk in batch.chunks)
