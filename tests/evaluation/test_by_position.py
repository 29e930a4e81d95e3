"""Loss by position: the same numbers as one forward pass over each whole document, added up by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.errors import CheckpointError, DataError
from infctx.evaluation.by_position import PositionLosses, bucket_edges, bucket_of, compare, measure_by_position
from infctx.evaluation.intervals import means_with_intervals, resampled_sums
from infctx.model.finch import Finch
from infctx.training.bptt import ChunkObjective
from infctx.training.validation import validation_loss

LENGTHS = (70, 1, 33, 16, 2, 41)
MakeFinch = Callable[..., Finch]


def make_documents(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> list[Document]:
    """Random tokens; weights of 0, 1 and between."""
    generator = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        weights = generator.choice([0.0, 0.25, 1.0], size=length).astype(np.float32)
        weights[0] = 0.0
        tokens = generator.integers(50, size=length).astype(np.uint16)
        documents.append(Document(tokens=tokens, weights=weights, origin=f"documents.jsonl:{number + 1}"))
    return documents


def every_token_counts(*rows: np.ndarray) -> list[Document]:
    """Documents in which every target has a weight of 1."""
    return [
        Document(
            tokens=row.astype(np.uint16),
            weights=np.float32([0.0] + [1.0] * (len(row) - 1)),
            origin=f"documents.jsonl:{number}",
        )
        for number, row in enumerate(rows, start=1)
    ]


def losses_by_hand(model: Finch, document: Document, reset_tokens: int | None = None) -> np.ndarray:
    """Cross entropy of every token but the first, each segment in one piece from a fresh state."""
    tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
    step = reset_tokens or len(document)
    with torch.no_grad():
        logits = torch.cat([model(tokens[:, begin : begin + step])[0] for begin in range(0, len(document), step)], 1)
    return F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none").numpy()


def by_hand(model: Finch, documents: list[Document], reset_tokens: int | None = None) -> dict[int, tuple[float, float]]:
    """Weighted sum and weight of each bucket, by the bucket's first position."""
    found: dict[int, tuple[float, float]] = {}
    for document in documents:
        for position, loss in enumerate(losses_by_hand(model, document, reset_tokens), start=1):
            edge = 0 if position < 16 else 2 ** int(math.log2(position))
            loss_sum, weight_sum = found.get(edge, (0.0, 0.0))
            weight = float(document.weights[position])
            found[edge] = loss_sum + weight * loss, weight_sum + weight
    return found


@pytest.mark.parametrize("reset_tokens", [None, 1, 9, 32])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("has_initial_state", [False, True])
def test_the_losses_are_those_of_whole_documents(
    make_finch: MakeFinch, reset_tokens: int | None, rows: int, has_initial_state: bool
) -> None:
    model = make_finch(dtype=torch.float64, has_initial_state=has_initial_state)
    documents = make_documents()
    found = measure_by_position(model, documents, chunk_tokens=7, rows=rows, reset_tokens=reset_tokens)
    expected = by_hand(model, documents, reset_tokens)
    assert found.edges == (0, 16, 32, 64, 128)
    for edge, loss, weight in zip(found.edges[:-1], found.losses, found.weights, strict=True):
        loss_sum, weight_sum = expected[edge]
        assert weight == weight_sum
        assert loss == pytest.approx(loss_sum / weight_sum, rel=1e-10)
    sums = np.array(list(expected.values())).sum(0)
    assert found.loss == pytest.approx(sums[0] / sums[1], rel=1e-10)
    assert found.perplexity == pytest.approx(math.exp(sums[0] / sums[1]), rel=1e-9)
    assert (found.num_documents, found.num_tokens) == (len(LENGTHS), sum(LENGTHS))


def test_each_document_has_its_own_sums(make_finch: MakeFinch) -> None:
    model, documents = make_finch(dtype=torch.float64), make_documents()
    found = measure_by_position(model, DocumentSet.of(documents), chunk_tokens=16, rows=3)
    for document, losses, weights in zip(documents, found.document_losses, found.document_weights, strict=True):
        own = by_hand(model, [document])
        assert losses.sum() == pytest.approx(sum(loss for loss, _ in own.values()), rel=1e-10)
        assert weights.sum() == document.weights.sum()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_loss_is_the_validation_loss_of_training(make_finch: MakeFinch, rows: int) -> None:
    model, documents = make_finch(), make_documents()
    of_training = validation_loss(
        ChunkObjective(model), documents, rows=2, chunk_tokens=11, fresh_state=lambda rows: model.fresh_state(rows)
    ).loss
    found = measure_by_position(model, documents, chunk_tokens=32, rows=rows)
    assert found.loss == pytest.approx(of_training, abs=1e-6)


def test_bits_per_byte_count_the_bytes_of_the_targets(make_finch: MakeFinch) -> None:
    model, documents = make_finch(dtype=torch.float64), make_documents()

    def count_bytes(ids: np.ndarray) -> np.ndarray:
        assert ids.ndim == 1
        return ids % 4

    found = measure_by_position(model, documents, rows=2, count_bytes=count_bytes)
    num_bytes = sum(float((one.tokens.astype(np.int64)[1:] % 4) @ one.weights[1:]) for one in documents)
    nats = sum(loss for loss, _ in by_hand(model, documents).values())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-10)
    assert measure_by_position(model, documents).bits_per_byte is None


def test_buckets_are_powers_of_two_to_any_length() -> None:
    positions = np.array([1, 15, 16, 31, 32, 63, 64, 2**20 - 1, 2**20, 2**21 + 5])
    assert bucket_of(positions).tolist() == [0, 0, 1, 1, 2, 2, 3, 16, 17, 18]
    edges = bucket_edges(19)
    assert edges[:4] == (0, 16, 32, 64)
    assert edges[17] == 2**20
    for position, bucket in zip(positions, bucket_of(positions), strict=True):
        assert edges[bucket] <= position < edges[bucket + 1]


def test_memory_of_a_long_document_is_that_of_a_chunk(make_finch: MakeFinch) -> None:
    """The longest tensor that the model is given has chunk_tokens tokens."""
    model, widths = make_finch(n_layer=1), []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[1]))
    measure_by_position(model, make_documents((500,)), chunk_tokens=64)
    handle.remove()
    assert widths == [64] * 7 + [51]


def measured(losses: np.ndarray, weights: np.ndarray) -> PositionLosses:
    """A measurement in which documents have these sums, all in one bucket."""
    ((loss, interval),) = means_with_intervals(losses[:, None], weights[:, None])
    assert loss is not None
    return PositionLosses(
        edges=(0, 16),
        losses=(loss,),
        weights=(float(weights.sum()),),
        intervals=(interval,),
        loss=loss,
        interval=interval,
        num_documents=len(losses),
        num_tokens=16 * len(losses),
        bits_per_byte=None,
        document_losses=losses[:, None],
        document_weights=weights[:, None],
    )


def test_intervals_are_as_wide_as_theory_says() -> None:
    """Of a mean of n equal weights: 1.96 standard errors on either side."""
    generator = np.random.default_rng(1)
    losses = generator.normal(3.0, 0.5, size=400)
    found = measured(losses, np.ones(400))
    assert found.interval is not None
    low, high = found.interval
    assert (low + high) / 2 == pytest.approx(losses.mean(), abs=0.005)
    assert (high - low) / 2 == pytest.approx(1.96 * losses.std() / 20, rel=0.1)


def test_a_difference_is_paired() -> None:
    """Documents differ by far more than the two measurements; the interval of the difference does not see it."""
    generator = np.random.default_rng(2)
    weights = generator.integers(1, 50, size=60).astype(np.float64)
    losses = generator.normal(3.0, 1.0, size=60) * weights
    before = measured(losses, weights)
    after = measured(losses + 0.125 * weights, weights)
    found = compare(before, after)
    assert found.difference == pytest.approx(0.125)
    assert found.interval == pytest.approx((0.125, 0.125))
    assert found.is_certain
    assert not compare(before, before).is_certain
    noisy = measured(losses + generator.normal(0.0, 0.1, size=60) * weights, weights)
    low, high = compare(before, noisy).interval or (0.0, 0.0)
    assert 0.02 < high - low < 0.1


def test_resamples_are_the_same_each_time() -> None:
    columns = np.random.default_rng(0).normal(size=(37, 3))
    assert np.array_equal(resampled_sums(columns), resampled_sums(columns))
    # The same documents for every column, and in a call with other columns.
    assert np.allclose(resampled_sums(columns)[:, 1], resampled_sums(columns[:, 1:2])[:, 0])
    counts = resampled_sums(np.ones((37, 1)))
    assert np.array_equal(counts, np.full_like(counts, 37))


def test_one_document_has_no_interval(make_finch: MakeFinch) -> None:
    found = measure_by_position(make_finch(), make_documents((40,)))
    assert found.interval is None
    assert found.intervals == (None, None, None)
    assert compare(found, found).interval is None
    # 40 tokens in the longest, 20 in the other: the last bucket has one document.
    found = measure_by_position(make_finch(), make_documents((40, 20)))
    assert [interval is None for interval in found.intervals] == [False, False, True]


def test_json_has_no_infinity(make_finch: MakeFinch) -> None:
    found = measure_by_position(make_finch(), make_documents(), count_bytes=lambda ids: ids)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["loss"] == found.loss
    assert told["positions"][1] == {
        "from": 16,
        "to": 32,
        "loss": found.losses[1],
        "interval": list(found.intervals[1] or ()),
        "weight": found.weights[1],
    }
    json.dumps(compare(found, found).to_json(), allow_nan=False)


def test_documents_that_train_nothing_are_refused(make_finch: MakeFinch) -> None:
    document = Document(tokens=np.arange(9, dtype=np.uint16), weights=np.zeros(9, np.float32), origin="a:1")
    with pytest.raises(DataError, match="1 documents have nothing to predict"):
        measure_by_position(make_finch(), [document])


def test_a_damaged_model_is_named(make_finch: MakeFinch) -> None:
    model = make_finch()
    with torch.no_grad():
        model.head.weight[7, 3] = math.nan
    with pytest.raises(CheckpointError, match=r"token 1 of documents.jsonl:1 is not finite"):
        measure_by_position(
            model, [Document(tokens=np.arange(9), weights=np.float32([0] + [1] * 8), origin="documents.jsonl:1")]
        )


def test_other_documents_are_not_compared(make_finch: MakeFinch) -> None:
    model = make_finch()
    with pytest.raises(ValueError, match="same documents"):
        compare(measure_by_position(model, make_documents(seed=1)), measure_by_position(model, make_documents(seed=2)))
