"""Documents of a store are those that were put in: whole, cut, joined, mapped from a folder."""

from pathlib import Path

import numpy as np
import pytest

from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.token_store import INDEX_TYPE, StoreBuilder, TokenStore, merge, open_store, repeated, without


def random_documents(count: int, *, seed: int = 0, longest: int = 40) -> list[Document]:
    """Documents of all lengths, with weights in runs of any values and in none."""
    generator = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        length = int(generator.integers(1, longest))
        kind = number % 4
        if kind == 0:
            weights = np.ones(length, dtype=np.float32)
        elif kind == 1:
            weights = np.repeat(generator.choice([0, 0.25, 1, 3], size=length), 3)[:length].astype(np.float32)
        elif kind == 2:
            weights = generator.random(length).astype(np.float32)
        else:
            weights = np.zeros(length, dtype=np.float32)
        weights[0] = 0
        tokens = generator.integers(0, 65536, size=length).astype(np.uint16)
        documents.append(Document(tokens=tokens, weights=weights, origin=f"x:{number}", set_index=number % 3))
    return documents


def assert_same(left: Document, right: Document) -> None:
    np.testing.assert_array_equal(left.tokens, right.tokens)
    np.testing.assert_array_equal(left.weights, right.weights)
    assert left.weights.dtype == np.float32
    assert (left.origin, left.set_index) == (right.origin, right.set_index)


def test_what_is_put_in_comes_out() -> None:
    documents = random_documents(60)
    found = DocumentSet.of(documents)
    assert len(found) == 60
    for place, document in enumerate(documents):
        assert_same(found[place], document)
        assert_same(found[place - 60], document)
    assert found.lengths.tolist() == [len(document) for document in documents]
    assert found.num_trained.tolist() == [document.num_trained_tokens for document in documents]
    assert found.num_tokens == sum(len(document) for document in documents)
    with pytest.raises(IndexError):
        found[60]


def test_a_subset_and_a_slice() -> None:
    documents = random_documents(20)
    found = DocumentSet.of(documents).subset(np.array([7, 3, 3, 19]))
    for document, place in zip(found, (7, 3, 3, 19), strict=True):
        assert_same(document, documents[place])
    assert_same(DocumentSet.of(documents)[5:9][1], documents[6])


def test_pieces_begin_anew_and_say_which_tokens_they_are() -> None:
    documents = [document for document in random_documents(40) if len(document) >= 6]
    whole = DocumentSet.of(documents)
    places = np.arange(len(documents))
    found = whole.pieces(places, np.full(len(places), 2), np.full(len(places), 5))
    for piece, document in zip(found, documents, strict=True):
        expected = document.weights[2:5].copy()
        expected[0] = 0
        np.testing.assert_array_equal(piece.tokens, document.tokens[2:5])
        np.testing.assert_array_equal(piece.weights, expected)
        assert piece.origin == f"{document.origin} [tokens 2-4]"
    assert found.num_trained.tolist() == [piece.num_trained_tokens for piece in found]
    again = found.pieces(places, np.full(len(places), 1), np.full(len(places), 3))
    assert again[0].origin == f"{documents[0].origin} [tokens 3-4]"
    np.testing.assert_array_equal(again[0].tokens, documents[0].tokens[3:5])


@pytest.mark.parametrize("num_tokens", [2, 7, 64, 10_000])
def test_rechunked_pieces_are_the_joined_tokens(num_tokens: int) -> None:
    documents = [Document(tokens=d.tokens, weights=d.weights, origin=d.origin) for d in random_documents(30)]
    joined = np.concatenate([document.tokens for document in documents])
    found = DocumentSet.of(documents).rechunked(num_tokens)
    assert [len(piece) for piece in found[: len(found) - 1]] == [num_tokens] * (len(found) - 1)
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in found]), joined)
    # The first token of a document inside a piece is predicted by the end of the one before it: it is one text.
    assert all(piece.weights[0] == 0 for piece in found)
    assert found.lengths.tolist() == [len(piece) for piece in found]


def test_the_fingerprint_is_of_the_contents() -> None:
    documents = random_documents(12)
    same = DocumentSet.of(documents)
    assert DocumentSet.of(random_documents(12)).fingerprint == same.fingerprint
    changed = random_documents(12)
    other = changed[5]
    weights = other.weights.copy()
    weights[-1] += 1
    changed[5] = Document(tokens=other.tokens, weights=weights, origin=other.origin, set_index=other.set_index)
    others = [
        DocumentSet.of(changed),
        DocumentSet.of(documents[::-1]),
        DocumentSet.of(documents[:-1]),
        same.pieces(np.arange(12), np.zeros(12, np.int64), np.maximum(same.lengths - 1, 1)),
        DocumentSet.of([Document(tokens=d.tokens, weights=d.weights, origin=d.origin) for d in documents]),
    ]
    some = np.flatnonzero(same.lengths > 3)
    for begin in (0, 1):
        others.append(same.pieces(some, np.full(len(some), begin), np.full(len(some), begin + 2)))
    prints = {found.fingerprint for found in [same, *others]}
    assert len(prints) == 8


def build(documents: list[Document], *, batches: list[int]) -> TokenStore:
    """A store of documents added in batches of so many."""
    builder = StoreBuilder()
    begin = 0
    for size in batches:
        batch = documents[begin : begin + size]
        begin += size
        entries = np.zeros(len(batch), INDEX_TYPE)
        entries["end"] = np.cumsum([len(document) for document in batch])
        entries["begin"] = entries["end"] - np.array([len(document) for document in batch])
        entries["line"] = np.arange(begin - size, begin)
        if batch:
            tokens = np.concatenate([document.tokens for document in batch])
            builder.add(tokens, np.concatenate([document.weights for document in batch]), entries)
    return builder.finish()


def as_set(store: TokenStore) -> DocumentSet:
    return DocumentSet(
        stores=(store,),
        files=(("f",),),
        entries=np.asarray(store.index),
        set_indices=np.zeros(len(store.index), np.uint8),
        set_names=("a",),
    )


def assert_same_stores(left: TokenStore, right: TokenStore) -> None:
    assert as_set(left).fingerprint == as_set(right).fingerprint
    for one, other in zip(as_set(left), as_set(right), strict=True):
        assert_same(one, other)


def test_batches_folders_and_merging_change_nothing(tmp_path: Path) -> None:
    documents = random_documents(50)
    whole = build(documents, batches=[50])
    assert_same_stores(whole, build(documents, batches=[1] * 50))
    parts = [build(documents[:20], batches=[7, 13]), build([], batches=[]), build(documents[20:], batches=[30])]
    parts[2].index["line"] += 20
    assert_same_stores(whole, merge(parts))
    folder = tmp_path / "merged"
    folder.mkdir()
    merge(parts, folder)
    opened, facts = open_store(folder)
    assert facts["id_type"] == "<u2"
    assert_same_stores(whole, opened)


def test_documents_that_are_left_out_leave_no_hole(tmp_path: Path) -> None:
    documents = random_documents(30)
    store = build(documents, batches=[30])
    places = np.array([0, 4, 5, 6, 29])
    kept = [number for number in range(30) if number not in places]
    folder = tmp_path / "less"
    folder.mkdir()
    for less in (without(store, places), without(store, places, folder)):
        found = as_set(less)
        assert found.entries["line"].tolist() == kept
        np.testing.assert_array_equal(found.entries["begin"][1:], found.entries["end"][:-1])
        for document, number in zip(found, kept, strict=True):
            np.testing.assert_array_equal(document.tokens, documents[number].tokens)
            np.testing.assert_array_equal(document.weights, documents[number].weights)


def test_a_fully_trained_text_is_one_run_of_weights() -> None:
    """The first token's 0 is not stored: it would be two runs more for each document."""
    whole = [document for document in random_documents(40) if document.weights[1:].all() and len(document) > 1]
    plain = [d for d in whole if (d.weights[1:] == 1).all()]
    assert len(plain) > 3
    store = build(plain, batches=[len(plain)])
    assert (store.run_ends.tolist(), store.run_weights.tolist()) == ([sum(map(len, plain))], [1.0])


def test_a_store_without_documents(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    merge([], folder)
    opened, _ = open_store(folder)
    assert len(as_set(opened)) == 0


def test_repeated_values() -> None:
    values = np.array([5, 3, 5, 5, 1, 3], dtype=np.uint64)
    assert repeated(values).tolist() == [2, 3, 5]
    assert repeated(values[:0]).tolist() == []
