"""The order of documents: a mixture deals by tokens, whatever the sizes, and every pass is whole."""

from __future__ import annotations

import numpy as np
import pytest

from infctx.data.order import BUCKET_DOCUMENTS, DocumentOrder, Portion
from infctx.errors import DataError


def make_lengths(*counts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of documents of several sets, and the set of each."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 50, size=sum(counts))
    return lengths, np.repeat(np.arange(len(counts)), counts)


def fair_queue(
    lengths: np.ndarray, sets: np.ndarray, queues: list[list[int]], budgets: list[float], dealt: list[float]
) -> list[int]:
    """The next document comes from the set that has had the least of its budget so far; the first set on a tie."""
    order = []
    while any(queues):
        waiting = [number for number, queue in enumerate(queues) if queue]
        number = min(waiting, key=lambda number: (dealt[number] / budgets[number], number))
        document = queues[number].pop(0)
        assert sets[document] == number
        dealt[number] += float(lengths[document])
        order.append(document)
    return order


def test_one_set_is_the_permutation_of_seed_and_epoch() -> None:
    lengths, _ = make_lengths(40)
    order = DocumentOrder(lengths, seed=5)
    for epoch in (0, 1, 7):
        expected = np.random.Generator(np.random.PCG64([5, epoch])).permutation(40)
        np.testing.assert_array_equal(order.epoch(epoch), expected)


def test_every_set_passes_once_in_an_epoch_by_default() -> None:
    lengths, sets = make_lengths(30, 5, 11)
    order = DocumentOrder(lengths, set_indices=sets, portions=[Portion()] * 3, seed=1)
    for epoch in range(3):
        assert sorted(order.epoch(epoch).tolist()) == list(range(46))
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert order.epoch_tokens == lengths.sum()


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (1, 20), (0.2, 0.3)])
def test_a_mixture_is_a_fair_queue(shares: tuple[float, float]) -> None:
    lengths, sets = make_lengths(40, 25, seed=3)
    order = DocumentOrder(lengths, set_indices=sets, portions=[Portion(share=share) for share in shares], seed=2)
    dealt = [0.0, 0.0]
    for epoch in range(3):
        found = order.epoch(epoch)
        queues = [[int(document) for document in found if sets[document] == number] for number in (0, 1)]
        assert fair_queue(lengths, sets, queues, order.budgets, dealt) == found.tolist()
        # What an epoch's last documents had too much is missing in the next.
        dealt = [tokens - budget for tokens, budget in zip(dealt, order.budgets, strict=True)]


def test_shares_hold_at_every_place_of_the_epoch() -> None:
    lengths, sets = make_lengths(4000, 300, seed=1)
    order = DocumentOrder(lengths, set_indices=sets, portions=[Portion(share=0.7), Portion(share=0.3)], seed=0)
    found = order.epoch(0)
    of_first = np.cumsum(np.where(sets[found] == 0, lengths[found], 0))
    tokens = np.cumsum(lengths[found])
    assert np.abs(of_first - 0.7 * tokens).max() <= lengths.max() * 2
    # Every set is read at least once, and one of them exactly once.
    assert set(found.tolist()) == set(range(4300))
    assert min(np.bincount(found[sets[found] == 0]).max(), np.bincount(found[sets[found] == 1])[4000:].max()) == 1


@pytest.mark.parametrize("passes", [0.25, 0.5, 1, 1.5, 3])
def test_passes_follow_each_other_without_a_break(passes: float) -> None:
    lengths, sets = make_lengths(16, 20)
    order = DocumentOrder(lengths, set_indices=sets, portions=[Portion(), Portion(epochs=passes)], seed=0)
    epochs = 8
    seen = np.zeros(36, dtype=int)
    for epoch in range(epochs):
        found = order.epoch(epoch)
        np.add.at(seen, found, 1)
        tokens = lengths[found[sets[found] == 1]].sum()
        assert abs(tokens - passes * lengths[16:].sum()) <= lengths.max()
    assert (seen[:16] == epochs).all()
    assert (seen[16:] == epochs * passes).all()


def test_a_budget_of_tokens() -> None:
    lengths, sets = make_lengths(50, 50)
    budget = 200
    order = DocumentOrder(lengths, set_indices=sets, portions=[Portion(), Portion(tokens=budget)], seed=0)
    totals = [lengths[found[sets[found] == 1]].sum() for found in map(order.epoch, range(20))]
    assert all(abs(total - budget) < lengths.max() for total in totals)
    assert abs(sum(totals) - 20 * budget) < lengths.max()


def test_orders_by_file_and_by_length() -> None:
    lengths, _ = make_lengths(30)
    assert DocumentOrder(lengths, seed=0, kind="file").epoch(4).tolist() == list(range(30))
    by_length = DocumentOrder(lengths, seed=0, kind="length").epoch(0)
    assert (np.diff(lengths[by_length]) >= 0).all()
    assert sorted(by_length.tolist()) == list(range(30))


def test_buckets_bring_documents_of_a_length_together() -> None:
    lengths, _ = make_lengths(3 * BUCKET_DOCUMENTS + 10)
    order = DocumentOrder(lengths, seed=0, kind="bucket")
    found = order.epoch(0)
    assert sorted(found.tolist()) == list(range(len(lengths)))
    for begin in range(0, len(lengths), BUCKET_DOCUMENTS):
        steps = np.diff(lengths[found[begin : begin + BUCKET_DOCUMENTS]])
        assert (steps >= 0).all() or (steps <= 0).all()
    rows = found[: 4 * (len(lengths) // 4)].reshape(-1, 4)
    longest = lengths[rows].max(axis=1)
    assert lengths[rows].sum() / (4 * longest.sum()) > 0.95
    assert order.epoch(1).tolist() != found.tolist()


def test_sets_of_one_size_have_permutations_of_their_own() -> None:
    lengths, sets = make_lengths(30, 30)
    order = DocumentOrder(lengths, set_indices=sets, portions=[Portion(), Portion()], seed=0)
    found = order.epoch(0)
    assert found[sets[found] == 0].tolist() != (found[sets[found] == 1] - 30).tolist()


def test_the_order_depends_on_the_seed_only() -> None:
    lengths, sets = make_lengths(30, 10)
    orders = [
        DocumentOrder(lengths, set_indices=sets, portions=[Portion(share=1), Portion(share=1)], seed=seed)
        for seed in (0, 0, 1)
    ]
    first, again, other = (order.epoch(3).tolist() for order in orders)
    assert first == again != other


def test_a_set_without_documents_is_refused() -> None:
    lengths, sets = make_lengths(5)
    with pytest.raises(DataError, match="no training documents"):
        DocumentOrder(lengths, set_indices=sets, portions=[Portion(), Portion()], seed=0)
