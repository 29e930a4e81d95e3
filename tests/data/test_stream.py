"""The rows of every step against a slow second implementation, and reading on from a cursor."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from infctx.data.chunking import ChunkSequence
from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.order import DocumentOrder, Portion
from infctx.data.stream import DocumentSource, StepData, StreamSource
from infctx.errors import DataError

Source = StreamSource | DocumentSource


def corpus(num_documents: int, longest: int, *, seed: int = 0) -> list[Document]:
    """Documents whose tokens are all different, with some weights 0 and some fractional."""
    generator = np.random.Generator(np.random.PCG64(seed))
    counter = itertools.count(1)
    documents = []
    for place in range(num_documents):
        length = int(generator.integers(1, longest + 1))
        weights = generator.choice([0.0, 0.25, 1.0], size=length).astype(np.float32)
        weights[0] = 0
        tokens = np.array([next(counter) for _ in range(length)], dtype=np.int32)
        documents.append(Document(tokens=tokens, weights=weights, origin=f"x:{place}"))
    return documents


@dataclass
class Row:
    """What one row of a step holds, in plain lists."""

    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    starts: list[bool] = field(default_factory=list)


def rows_of(sequence: ChunkSequence) -> list[Row]:
    """Glue the chunks together and take the padding off."""
    rows = [Row() for _ in range(sequence.chunks[0].tokens.shape[0])]
    for chunk in sequence.chunks:
        for number, row in enumerate(rows):
            row.tokens += chunk.tokens[number].tolist()
            row.targets += chunk.targets[number].tolist()
            row.weights += chunk.loss_weight[number].tolist()
            row.starts += [False] * chunk.tokens.shape[1] if chunk.starts is None else chunk.starts[number].tolist()
    for row in rows:
        # The corpora here have no token 0, so every 0 is padding, which is on the right only.
        length = len(row.tokens) - row.tokens.count(0)
        assert not any(row.tokens[length:] + row.targets[length:] + row.weights[length:] + row.starts[length:])
        row.tokens, row.targets = row.tokens[:length], row.targets[:length]
        row.weights, row.starts = row.weights[:length], row.starts[:length]
        assert all(row.tokens)
    assert sequence.num_tokens == sum(len(row.tokens) for row in rows)
    assert sequence.weight_total == sum(sum(row.weights) for row in rows)
    return rows


def run(source: Source) -> list[StepData]:
    steps = []
    while (step := source.next_step()) is not None:
        steps.append(step)
        assert len(steps) < 1000
    assert source.next_step() is None
    return steps


def plain_rows(step: StepData) -> list[Row]:
    return [row for group in step.groups for row in rows_of(group)]


def permutation(seed: int, epoch: int, num_documents: int) -> list[int]:
    order: list[int] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_documents).tolist()
    return order


def row_of_documents(documents: Sequence[Document]) -> Row:
    row = Row()
    for document in documents:
        row.tokens += document.tokens.tolist()
        row.weights += document.weights.tolist()
        row.starts += [True] + [False] * (len(document) - 1)
    row.targets = [*row.tokens[1:], 0]
    row.weights = [*row.weights[1:], 0.0]
    return row


def part(row: Row, begin: int, end: int) -> Row:
    return Row(row.tokens[begin:end], row.targets[begin:end], row.weights[begin:end], row.starts[begin:end])


def slow_stream(
    documents: list[Document], *, num_rows: int, step_tokens: int, seed: int, epochs: int
) -> list[list[Row]]:
    """Deal all epochs at once, lay every row out in full, then cut."""
    dealt: list[list[Document]] = [[] for _ in range(num_rows)]
    for epoch in range(epochs):
        for index in permutation(seed, epoch, len(documents)):
            totals = [sum(len(document) for document in row) for row in dealt]
            dealt[totals.index(min(totals))].append(documents[index])
    full = [row_of_documents(row) if row else Row() for row in dealt]
    longest = max(len(row.tokens) for row in full)
    return [[part(row, begin, begin + step_tokens) for row in full] for begin in range(0, longest, step_tokens)]


def slow_documents(
    documents: list[Document], *, num_rows: int, seed: int, epochs: int, pack_tokens: int | None
) -> list[list[Row]]:
    entries: list[list[Document]] = []
    for epoch in range(epochs):
        entry: list[Document] = []
        for index in permutation(seed, epoch, len(documents)):
            size = sum(map(len, entry)) + len(documents[index])
            if entry and (pack_tokens is None or size > pack_tokens):
                entries.append(entry)
                entry = []
            entry.append(documents[index])
        entries.append(entry)
    rows = [row_of_documents(entry) for entry in entries]
    rows += [Row() for _ in range(-len(rows) % num_rows)]
    return [rows[begin : begin + num_rows] for begin in range(0, len(rows), num_rows)]


STREAMS = [
    # documents, longest, rows, accumulate, chunk_tokens, window
    (20, 30, 1, 1, 4, 3),
    (20, 30, 3, 1, 5, 2),
    (20, 30, 2, 2, 7, 1),
    (3, 100, 2, 1, 1, 4),
    (2, 4, 3, 2, 4, 2),
    (1, 9, 4, 1, 100, 1),
    (60, 3, 2, 1, 4, 1),
]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("num", "longest", "rows", "accumulate", "chunk_tokens", "window"), STREAMS)
def test_stream_equals_the_slow_one(
    num: int, longest: int, rows: int, accumulate: int, chunk_tokens: int, window: int, epochs: int
) -> None:
    documents = corpus(num, longest)
    source = StreamSource(
        documents, rows=rows, accumulate=accumulate, chunk_tokens=chunk_tokens, window=window, seed=5, epochs=epochs
    )
    steps = run(source)
    expected = slow_stream(
        documents, num_rows=rows * accumulate, step_tokens=window * chunk_tokens, seed=5, epochs=epochs
    )
    assert [plain_rows(step) for step in steps] == expected
    assert len(steps) == source.total_steps
    assert source.epoch == epochs
    assert all(step.carries_state for step in steps)
    assert all(len(step.groups) == accumulate for step in steps)
    assert all(len(group.chunks) <= window for step in steps for group in step.groups)
    seen = Counter(token for step in steps for row in plain_rows(step) for token in row.tokens)
    assert seen == {token: epochs for document in documents for token in document.tokens.tolist()}
    assert sum(step.num_tokens for step in steps) == epochs * sum(map(len, documents))
    total = float(sum(document.weights.sum(dtype=np.float64) for document in documents))
    assert sum(step.weight_total for step in steps) == epochs * total


def test_stream_targets_and_weights_across_every_border() -> None:
    documents = corpus(15, 40, seed=2)
    next_token, weight_of = {}, {}
    for document in documents:
        for token, following, weight in zip(
            document.tokens.tolist(), document.tokens.tolist()[1:], document.weights.tolist()[1:], strict=False
        ):
            next_token[token], weight_of[token] = following, weight
    source = StreamSource(documents, rows=2, accumulate=1, chunk_tokens=3, window=2, seed=0, epochs=1)
    num_borders = 0
    for step in run(source):
        for row in plain_rows(step):
            for place, (token, target, weight) in enumerate(zip(row.tokens, row.targets, row.weights, strict=True)):
                if token in next_token:
                    assert (target, weight) == (next_token[token], weight_of[token])
                    num_borders += place == 5
                else:
                    assert weight == 0
    assert num_borders > 10


def test_stream_by_steps_runs_into_the_next_epoch() -> None:
    documents = corpus(4, 12)
    source = StreamSource(documents, rows=3, accumulate=1, chunk_tokens=4, window=2, seed=1, steps=11)
    steps = run(source)
    assert len(steps) == source.total_steps == 11
    expected = slow_stream(documents, num_rows=3, step_tokens=8, seed=1, epochs=60)
    assert [plain_rows(step) for step in steps] == expected[:11]
    assert all(step.num_tokens == 24 for step in steps)
    assert source.epoch == pytest.approx(11 * 24 / sum(map(len, documents)))


@pytest.mark.parametrize("pack_tokens", [None, 1, 25, 10_000])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("num", "longest", "rows", "accumulate"), [(20, 30, 3, 1), (7, 9, 2, 2), (1, 5, 2, 3)])
def test_document_mode_equals_the_slow_one(
    num: int, longest: int, rows: int, accumulate: int, epochs: int, pack_tokens: int | None
) -> None:
    documents = corpus(num, longest, seed=4)
    source = DocumentSource(
        documents, rows=rows, accumulate=accumulate, chunk_tokens=4, seed=9, epochs=epochs, pack_tokens=pack_tokens
    )
    steps = run(source)
    expected = slow_documents(documents, num_rows=rows * accumulate, seed=9, epochs=epochs, pack_tokens=pack_tokens)
    assert [plain_rows(step) for step in steps] == expected
    assert len(steps) == source.total_steps
    assert source.epoch == epochs
    assert not any(step.carries_state for step in steps)
    assert all(row.starts[0] for step in steps for row in plain_rows(step) if row.tokens)
    assert all(len(group.chunks) >= 1 for step in steps for group in step.groups)
    seen = Counter(token for step in steps for row in plain_rows(step) for token in row.tokens)
    assert seen == {token: epochs for document in documents for token in document.tokens.tolist()}
    assert sum(step.num_tokens for step in steps) == epochs * sum(map(len, documents))


def test_document_mode_by_steps_fills_every_row() -> None:
    documents = corpus(5, 12)
    source = DocumentSource(documents, rows=4, accumulate=1, chunk_tokens=4, seed=1, steps=9)
    steps = run(source)
    assert len(steps) == source.total_steps == 9
    assert [plain_rows(step) for step in steps] == slow_documents(
        documents, num_rows=4, seed=1, epochs=8, pack_tokens=None
    )[:9]
    assert source.epoch == pytest.approx(36 / 5)


def make_stream(documents: list[Document], *, rank: int = 0, world: int = 1, accumulate: int = 2) -> StreamSource:
    return StreamSource(
        documents,
        rows=2,
        accumulate=accumulate,
        chunk_tokens=3,
        window=2,
        seed=7,
        epochs=2,
        rank=rank,
        world=world,
    )


def make_packed(documents: list[Document], *, rank: int = 0, world: int = 1, accumulate: int = 2) -> DocumentSource:
    return DocumentSource(
        documents,
        rows=2,
        accumulate=accumulate,
        chunk_tokens=3,
        seed=7,
        epochs=2,
        rank=rank,
        world=world,
        pack_tokens=20,
    )


MAKERS: list[Callable[..., Source]] = [make_stream, make_packed]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_only_divide_the_rows(make: Callable[..., Source], world: int) -> None:
    documents = corpus(23, 25, seed=1)
    alone = run(make(documents, accumulate=4))
    ranks = [run(make(documents, rank=rank, world=world, accumulate=4 // world)) for rank in range(world)]
    assert len({len(steps) for steps in [alone, *ranks]}) == 1
    assert len(alone) > 3
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert plain_rows(whole) == [row for step in parts for row in plain_rows(step)]
        assert {step.weight_total for step in parts} == {whole.weight_total}
        assert {step.num_tokens for step in parts} == {whole.num_tokens}
        for groups in zip(*(step.groups for step in parts), strict=True):
            # All ranks take part in the same chunks, of the same sizes.
            assert len({tuple(chunk.tokens.shape for chunk in group.chunks) for group in groups}) == 1


def exactly(steps: list[StepData]) -> list[object]:
    """Everything in the steps, padding included, as plain values."""
    return [
        (
            step.weight_total,
            step.num_tokens,
            step.carries_state,
            [
                (
                    chunk.tokens.tolist(),
                    chunk.targets.tolist(),
                    chunk.loss_weight.tolist(),
                    None if chunk.starts is None else chunk.starts.tolist(),
                    chunk.index,
                )
                for group in step.groups
                for chunk in group.chunks
            ],
        )
        for step in steps
    ]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_reading_on_from_a_cursor_is_exact(make: Callable[..., Source], rank: int, world: int) -> None:
    documents = corpus(23, 25, seed=3)
    all_steps = run(make(documents, rank=rank, world=world))
    source = make(documents, rank=rank, world=world)
    assert len(all_steps) > 3
    for num_done in range(len(all_steps) + 1):
        cursor = json.loads(json.dumps(source.cursor()))
        again = make(documents, rank=rank, world=world)
        again.restore(cursor)
        assert again.epoch == source.epoch
        assert again.cursor() == source.cursor()
        assert exactly(run(again)) == exactly(all_steps[num_done:])
        source.next_step()


@pytest.mark.parametrize("make", MAKERS)
def test_a_cursor_may_go_to_another_number_of_ranks(make: Callable[..., Source]) -> None:
    documents = corpus(23, 25, seed=3)
    source = make(documents, accumulate=2)
    source.next_step()
    cursor = source.cursor()
    rest = [plain_rows(step) for step in run(source)]
    ranks = []
    for rank in range(2):
        again = make(documents, rank=rank, world=2, accumulate=1)
        again.restore(cursor)
        ranks.append([plain_rows(step) for step in run(again)])
    assert [first + second for first, second in zip(*ranks, strict=True)] == rest


@pytest.mark.parametrize("make", MAKERS)
def test_a_cursor_of_other_data_is_refused(make: Callable[..., Source]) -> None:
    documents = corpus(6, 10)
    cursor = make(documents).cursor()
    with pytest.raises(DataError, match=r"documents_fingerprint \(then \w+, now \w+\)"):
        make(corpus(6, 10, seed=1)).restore(cursor)
    with pytest.raises(DataError, match=r"documents \(then 6, now 5\)"):
        make(documents[:5]).restore(cursor)
    other = make_packed if make is make_stream else make_stream
    with pytest.raises(DataError, match="mode"):
        other(documents).restore(cursor)


def test_a_cursor_of_another_mixture_is_refused() -> None:
    documents = [replace(one, set_index=place % 2) for place, one in enumerate(corpus(10, 20))]
    found = DocumentSet.of(documents)

    def make(share: float) -> StreamSource:
        portions = [Portion(share=share), Portion(share=1.0)]
        order = DocumentOrder(found.lengths, set_indices=found.set_indices, portions=portions, seed=0)
        return StreamSource(found, rows=1, accumulate=1, chunk_tokens=4, window=1, seed=0, steps=3, order=order)

    make(2.0).restore(make(2.0).cursor())
    with pytest.raises(DataError, match=r"order \(then \['random', .*\], now \['random', .*\]\)"):
        make(3.0).restore(make(2.0).cursor())


@pytest.mark.parametrize("mode", ["stream", "document", "packed"])
def test_a_mixture_is_the_same_for_any_number_of_ranks(mode: str) -> None:
    """Rows of a step are dealt from one order, however they are divided; after a restart with other ranks, too."""
    documents = [replace(one, set_index=int(place % 3 == 0)) for place, one in enumerate(corpus(40, 30, seed=3))]
    found = DocumentSet.of(documents)

    def make(rank: int, world: int) -> Source:
        order = DocumentOrder(
            found.lengths,
            set_indices=found.set_indices,
            portions=[Portion(share=0.8), Portion(share=0.2)],
            seed=5,
        )
        settings: dict[str, Any] = {"rows": 1, "accumulate": 4 // world, "chunk_tokens": 4, "seed": 5, "epochs": 2}
        settings |= {"rank": rank, "world": world, "order": order}
        if mode == "stream":
            return StreamSource(found, window=2, **settings)
        return DocumentSource(found, pack_tokens=20 if mode == "packed" else None, **settings)

    alone = make(0, 1)
    expected = [plain_rows(step) for step in run(alone)]
    for world in (2, 4):
        ranks = [[plain_rows(step) for step in run(make(rank, world))] for rank in range(world)]
        assert [list(itertools.chain(*rows)) for rows in zip(*ranks, strict=True)] == expected
    for num_before in range(0, len(expected), 3):
        begun = [make(rank, 2) for rank in range(2)]
        for source in begun:
            for _ in range(num_before):
                source.next_step()
        cursors = [source.cursor() for source in begun]
        assert cursors[0] == cursors[1]
        rest = []
        for rank in range(4):
            again = make(rank, 4)
            again.restore(json.loads(json.dumps(cursors[0])))
            rest.append([plain_rows(step) for step in run(again)])
        assert [list(itertools.chain(*rows)) for rows in zip(*rest, strict=True)] == expected[num_before:]


def test_rows_of_a_stream_have_states_and_keep_their_number() -> None:
    documents = corpus(6, 10)
    with pytest.raises(DataError, match=r"rows \(then 4, now 6\)"):
        make_stream(documents, accumulate=3).restore(make_stream(documents).cursor())


@pytest.mark.parametrize("num_before", [0, 1, 3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_other_rows_the_documents_of_document_mode_keep_their_order(num_before: int, accumulate: int) -> None:
    documents = corpus(23, 10)

    def in_order(steps: list[StepData]) -> list[int]:
        return [token for step in steps for row in plain_rows(step) for token in row.tokens]

    expected = in_order(run(make_packed(documents)))
    source = make_packed(documents)
    before = [step for _ in range(num_before) if (step := source.next_step()) is not None]
    again = make_packed(documents, accumulate=accumulate)
    again.restore(source.cursor())
    # Steps are counted on, in the new size; and once more from a checkpoint of the continued run.
    middle = [step for _ in range(2) if (step := again.next_step()) is not None]
    last = make_packed(documents, accumulate=accumulate)
    last.restore(again.cursor())
    after = run(last)
    assert in_order(before) + in_order(middle) + in_order(after) == expected
    assert last.total_steps == again.total_steps == num_before + len(middle) + len(after)


def test_a_stream_cursor_of_another_step_size_or_seed_is_refused() -> None:
    documents = corpus(6, 10)
    cursor = make_stream(documents).cursor()
    changed = StreamSource(documents, rows=4, accumulate=1, chunk_tokens=3, window=3, seed=8, epochs=2)
    with pytest.raises(DataError, match=r"seed \(then 7, now 8\), step_tokens \(then 6, now 9\)"):
        changed.restore(cursor)


def test_a_cursor_stays_small() -> None:
    documents = corpus(5, 20_000)
    source = StreamSource(documents, rows=2, accumulate=1, chunk_tokens=64, window=2, seed=0, epochs=1)
    for _ in range(20):
        source.next_step()
    assert len(json.dumps(source.cursor())) < 500


def test_the_order_depends_on_seed_and_epoch() -> None:
    documents = corpus(12, 3)

    def order(seed: int) -> list[int]:
        source = DocumentSource(documents, rows=1, accumulate=1, chunk_tokens=8, seed=seed, epochs=2)
        return [plain_rows(step)[0].tokens[0] for step in run(source)]

    assert order(0) != order(1)
    assert order(0)[:12] != order(0)[12:]
    assert sorted(order(0)[:12]) == sorted(order(0)[12:])


@pytest.mark.parametrize(("steps", "epochs"), [(None, None), (3, 1)])
def test_exactly_one_end_is_given(steps: int | None, epochs: int | None) -> None:
    for source in (
        lambda: StreamSource(
            corpus(2, 3), rows=1, accumulate=1, chunk_tokens=2, window=1, seed=0, steps=steps, epochs=epochs
        ),
        lambda: DocumentSource(corpus(2, 3), rows=1, accumulate=1, chunk_tokens=2, seed=0, steps=steps, epochs=epochs),
    ):
        with pytest.raises(DataError, match=r"exactly one of run\.steps and run\.epochs"):
            source()


def test_no_documents_are_refused() -> None:
    with pytest.raises(DataError, match="at least one training document"):
        DocumentSource([], rows=1, accumulate=1, chunk_tokens=2, seed=0, steps=1)


def test_packing_fills_a_row_to_the_very_limit() -> None:
    documents = [document for document in corpus(200, 8) if len(document) == 4]
    assert len(documents) > 9
    for pack_tokens, num_packed in ((11, 2), (12, 3), (13, 3), (4, 1), (3, 1)):
        source = DocumentSource(
            documents, rows=1, accumulate=1, chunk_tokens=4, seed=0, steps=1, pack_tokens=pack_tokens
        )
        (row,) = plain_rows(run(source)[0])
        assert sum(row.starts) == num_packed
