"""Packed equals separate: what surrounds a document in its row changes neither its loss, its gradient nor its state.

The oracle runs every document alone and in one piece through the plain model, with autograd over all of it: it knows
no rows, no starts, no padding and no chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import infctx
from infctx.data.document import Document
from infctx.data.stream import DocumentSource, StepData, StreamSource
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective, Window
from infctx.training.engine import WholeWeights
from infctx.training.step import run_step

Source = DocumentSource | StreamSource
Gradients = dict[str, Tensor]

TOLERANCE = 1e-10
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 257, 1000, 3001]
# Finch with a tuned initial state, Finch without one, and Eagle; a start without one takes another path in the kernel.
MODELS = [("6", True), ("6", False), ("5.2", True)]


def each_with_a_model(*cases: tuple[object, ...]) -> list[tuple[object, ...]]:
    """Every case with one of the models, every model with some of the cases: all pairs would take minutes."""
    return [(*MODELS[index % len(MODELS)], *case) for index, case in enumerate(cases)]


def small_model(
    make_finch: Callable[..., Finch], version: str, has_initial_state: bool, *, vocab_size: int = 50
) -> Finch:
    return make_finch(
        version,
        n_layer=2,
        n_embd=16,
        dim_ffn=29,
        vocab_size=vocab_size,
        has_initial_state=has_initial_state,
        dtype=torch.float64,
    )


def make_documents(lengths: Sequence[int], *, has_unique_tokens: bool = False) -> list[Document]:
    """Fractional weights, some of them 0, and 0 throughout the middle half; no token 0, which is the padding's."""
    generator = np.random.default_rng(0)
    documents = []
    first_id = 1
    for index, length in enumerate(lengths):
        weights = generator.random(length, dtype=np.float32) * (generator.random(length) < 0.7).astype(np.float32)
        weights[length // 4 : length - length // 4] = 0
        weights[-1] = 0.5
        weights[0] = 0
        tokens = np.arange(first_id, first_id + length) if has_unique_tokens else generator.integers(1, 50, length)
        first_id += length
        documents.append(Document(tokens=tokens.astype(np.uint16), weights=weights, origin=f"test:{index}"))
    return documents


def tokens_of(document: Document) -> Tensor:
    return torch.from_numpy(document.tokens.astype(np.int64))[None]


def weight_of(pieces: Sequence[tuple[Document, int, int]]) -> float:
    """What the tokens behind those of the pieces weigh."""
    return sum(float(document.weights[begin + 1 : end + 1].sum(dtype=np.float64)) for document, begin, end in pieces)


def piece_loss(model: Finch, document: Document, begin: int, end: int) -> Tensor:
    """The weighted loss of what tokens begin..end of a document predict; the gradient goes back to `begin`."""
    tokens, state = tokens_of(document), None
    if begin > 0:
        with torch.no_grad():
            _, state = model(tokens[:, :begin])
    logits, _ = model(tokens[:, begin:end], state)
    targets = tokens[0, begin + 1 : end + 1]
    losses = F.cross_entropy(logits[0, : len(targets)], targets, reduction="none")
    return (losses * torch.from_numpy(document.weights[begin + 1 : end + 1])).sum()


def separately(model: Finch, pieces: Sequence[tuple[Document, int, int]]) -> tuple[float, Gradients]:
    """The loss sum of some pieces of documents and its gradient, each piece alone."""
    model.zero_grad(set_to_none=True)
    loss_sum = 0.0
    for document, begin, end in pieces:
        loss = piece_loss(model, document, begin, end)
        torch.autograd.backward(loss)
        loss_sum += loss.item()
    return loss_sum, gradients_of(model)


def whole(documents: Sequence[Document]) -> list[tuple[Document, int, int]]:
    return [(document, 0, len(document)) for document in documents]


def gradients_of(model: Finch, *, times: float = 1.0) -> Gradients:
    """A copy of every parameter's gradient, 0 where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach() * times
        for name, parameter in model.named_parameters()
    }


def assert_same(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    """Loss sum and every gradient: norm of the difference beside the norm, absolute where 0 is expected."""
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    errors = {}
    for name, reference in expected[1].items():
        scale = float(reference.norm()) or 1.0
        errors[name] = float((found[1][name] - reference).norm()) / scale
    assert max(errors.values()) <= TOLERANCE, errors


def unrelated_state(model: Finch, rows: int) -> ModelState:
    """What a start has to forget."""
    generator = torch.Generator().manual_seed(3)
    return ModelState(
        *(torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in model.fresh_state(rows))
    )


def steps_of(source: Source) -> Iterator[StepData]:
    while (data := source.next_step()) is not None:
        yield data


class Trainer:
    """Runs the steps of a source one after another, as the training loop does, at weights that stay as they are."""

    def __init__(self, model: Finch, *, window: Window) -> None:
        self._model, self._window = model, window
        self._objective: Callable[..., tuple[Tensor, ...]] = ChunkObjective(model)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self._states: list[ModelState] = []

    def with_padding_of(self, token: int) -> Trainer:
        """Put another id wherever a token or target is padding."""
        inner = self._objective

        def objective(tokens: Tensor, targets: Tensor, *others: object, **settings: object) -> tuple[Tensor, ...]:
            return inner(
                tokens.masked_fill(tokens == 0, token), targets.masked_fill(targets == 0, token), *others, **settings
            )

        self._objective = objective
        return self

    def step(self, data: StepData) -> tuple[float, Gradients]:
        """The loss sum of a step and its gradient."""
        if not (data.carries_state and self._states):
            self._states = [unrelated_state(self._model, group.chunks[0].tokens.shape[0]) for group in data.groups]
        report, self._states = run_step(
            self._objective,
            data,
            self._states,
            window=self._window,
            engine=WholeWeights(self._model, self._optimizer),
            clip=None,
        )
        if report.loss is None:
            # A step without a weight: there is a state to carry on, and nothing else.
            assert data.weight_total == 0
            return 0.0, gradients_of(self._model)
        return report.loss * report.weight_total, gradients_of(self._model, times=report.weight_total)

    def run(self, source: Source) -> tuple[float, Gradients]:
        """The same, summed over all steps of a source."""
        loss_sum, gradients = 0.0, {name: torch.zeros_like(p) for name, p in self._model.named_parameters()}
        for data in steps_of(source):
            loss, of_step = self.step(data)
            loss_sum += loss
            gradients = {name: gradient + of_step[name] for name, gradient in gradients.items()}
        return loss_sum, gradients


@pytest.mark.parametrize(
    ("version", "has_initial_state", "rows", "accumulate", "chunk_tokens", "pack_tokens", "lengths"),
    each_with_a_model(
        (3, 2, 1, 20, LENGTHS[:6]),
        (3, 2, 7, 100, LENGTHS[:9]),
        (2, 2, 64, 300, LENGTHS[:11]),
        (2, 2, 1000, 1100, LENGTHS),
        # Every document in a row of its own, which ends in a chunk of its own; then all of them in one row of four.
        (10, 1, 16, None, LENGTHS[:10]),
        (2, 2, 1000, 10_000, LENGTHS),
    ),
)
def test_rows_of_packed_documents_equal_separate_ones(
    make_finch: Callable[..., Finch],
    version: str,
    has_initial_state: bool,
    rows: int,
    accumulate: int,
    chunk_tokens: int,
    pack_tokens: int | None,
    lengths: list[int],
) -> None:
    model = small_model(make_finch, version, has_initial_state)
    documents = make_documents(lengths)
    source = DocumentSource(
        documents,
        rows=rows,
        accumulate=accumulate,
        chunk_tokens=chunk_tokens,
        seed=4,
        epochs=1,
        pack_tokens=pack_tokens,
    )
    found = Trainer(model, window="document").run(source)
    assert_same(found, separately(model, whole(documents)))


@pytest.mark.parametrize(
    ("version", "has_initial_state", "rows", "chunk_tokens", "lengths"),
    each_with_a_model((2, 1, LENGTHS[:6]), (3, 7, LENGTHS[:9]), (3, 64, LENGTHS[:11]), (2, 1000, LENGTHS)),
)
def test_a_stream_in_one_window_equals_separate_documents(
    make_finch: Callable[..., Finch],
    version: str,
    has_initial_state: bool,
    rows: int,
    chunk_tokens: int,
    lengths: list[int],
) -> None:
    model = small_model(make_finch, version, has_initial_state)
    documents = make_documents(lengths)
    window = sum(lengths) // chunk_tokens + 1
    source = StreamSource(
        documents, rows=rows, accumulate=2, chunk_tokens=chunk_tokens, window=window, seed=1, epochs=1
    )
    assert source.total_steps == 1
    found = Trainer(model, window=window).run(source)
    assert_same(found, separately(model, whole(documents)))


def pieces_in(data: StepData, documents: Sequence[Document], *, cut_every: int) -> list[tuple[Document, int, int]]:
    """Which parts of which documents a step reads, told by their tokens alone; cut where the gradient is."""
    place_of = {
        token: (index, place)
        for index, document in enumerate(documents)
        for place, token in enumerate(document.tokens.tolist())
    }
    pieces: list[tuple[int, int, int]] = []
    for group in data.groups:
        for row in torch.cat([chunk.tokens for chunk in group.chunks], dim=1).tolist():
            last = None
            for column, token in enumerate(row):
                if token == 0:
                    break
                index, place = place_of[token]
                if last == (index, place - 1) and column % cut_every:
                    pieces[-1] = (index, pieces[-1][1], place + 1)
                else:
                    pieces.append((index, place, place + 1))
                last = (index, place)
    return [(documents[index], begin, end) for index, begin, end in pieces]


@pytest.mark.parametrize(
    ("version", "has_initial_state", "mode", "chunk_tokens", "window"),
    each_with_a_model(
        ("stream", 1, 3), ("stream", 7, 1), ("stream", 7, 4), ("stream", 32, 1), ("document", 7, 2), ("document", 32, 1)
    ),
)
def test_every_step_equals_separate_documents_cut_at_its_windows(
    make_finch: Callable[..., Finch], version: str, has_initial_state: bool, mode: str, chunk_tokens: int, window: int
) -> None:
    """A document that goes on from an earlier window is run alone up to there, without a graph, then on with one."""
    lengths = LENGTHS[:5] if chunk_tokens == 1 else LENGTHS[:9]
    model = small_model(make_finch, version, has_initial_state, vocab_size=sum(lengths) + 1)
    documents = make_documents(lengths, has_unique_tokens=True)
    settings = {"rows": 2, "accumulate": 2, "chunk_tokens": chunk_tokens, "seed": 2, "epochs": 1}
    source: Source
    if mode == "stream":
        source = StreamSource(documents, window=window, **settings)
    else:
        source = DocumentSource(documents, pack_tokens=150, **settings)
    trainer = Trainer(model, window=window)
    read: list[tuple[str, int, int]] = []
    for data in steps_of(source):
        pieces = pieces_in(data, documents, cut_every=window * chunk_tokens)
        assert data.weight_total == pytest.approx(weight_of(pieces), rel=1e-12)
        assert_same(trainer.step(data), separately(model, pieces))
        read += [(document.origin, begin, end) for document, begin, end in pieces]
    assert sum(end - begin for _, begin, end in read) == sum(lengths)
    # There were documents that went on from an earlier window.
    assert sum(begin > 0 for _, begin, _ in read) >= 3


@pytest.mark.parametrize("mode", ["stream", "document"])
def test_what_padding_holds_does_not_matter(make_finch: Callable[..., Finch], mode: str) -> None:
    """To the last bit: its loss has weight 0, and nothing comes after it."""
    model = small_model(make_finch, "6", True)
    documents = make_documents(LENGTHS[:9])
    settings = {"rows": 3, "accumulate": 2, "chunk_tokens": 10, "seed": 2, "epochs": 1}

    def source() -> Source:
        if mode == "stream":
            return StreamSource(documents, window=3, **settings)
        return DocumentSource(documents, pack_tokens=70, **settings)

    chunks = [chunk for data in steps_of(source()) for group in data.groups for chunk in group.chunks]
    assert sum(int((chunk.tokens == 0).sum()) for chunk in chunks) > 100
    trainers = [Trainer(model, window=3 if mode == "stream" else "document") for _ in range(2)]
    results = [trainers[0].run(source()), trainers[1].with_padding_of(49).run(source())]
    (loss, gradients), (other_loss, other_gradients) = results
    assert other_loss == loss
    assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())


# Rows of one length each. For chunks of 7, 64 and 1000, documents start at a chunk's first token, at its last, and
# between; a document of one token starts a row, ends a row, and fills a place in the middle.
SHORT_ROWS = [[36], [17, 1, 2, 16], [6, 1, 7, 20, 1, 1], [1, 35]]
MIDDLE_ROWS = [[257], [65, 64, 63, 17, 16, 15, 3, 2, 1, 11], [63, 1, 64, 63, 1, 64, 1], [1, 256]]
LONG_ROWS = [
    [3001],
    [1000, 257, 65, 64, 63, 17, 16, 15, 3, 2, 1, 1498],
    [63, 1, 64, 871, 1, 1, 1000, 999, 1],
    [1, 257, 2743],
]


def pack(rows: Sequence[Sequence[Document]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and starts [B, T] of documents laid back to back."""
    tokens = torch.cat([torch.cat([tokens_of(document) for document in row], 1) for row in rows])
    weights = torch.tensor(np.stack([np.concatenate([document.weights for document in row]) for row in rows]))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        starts[number, np.cumsum([0] + [len(document) for document in row[:-1]])] = True
    return tokens, weights, starts


def in_rows(lengths: Sequence[Sequence[int]]) -> list[list[Document]]:
    documents = iter(make_documents([length for row in lengths for length in row]))
    return [[next(documents) for _ in row] for row in lengths]


@pytest.mark.parametrize(("version", "has_initial_state"), MODELS)
@pytest.mark.parametrize("lengths", [SHORT_ROWS, LONG_ROWS])
def test_logits_and_states_of_packed_rows_equal_separate_documents(
    make_finch: Callable[..., Finch], version: str, has_initial_state: bool, lengths: list[list[int]]
) -> None:
    model = small_model(make_finch, version, has_initial_state)
    rows = in_rows(lengths)
    tokens, _, starts = pack(rows)
    with torch.no_grad():
        found, found_state = model(tokens, unrelated_state(model, len(rows)), starts=starts)
        for number, row in enumerate(rows):
            alone = [model(tokens_of(document)) for document in row]
            expected = torch.cat([logits[0] for logits, _ in alone])
            assert float((found[number] - expected).norm() / expected.norm()) <= TOLERANCE
            for ours, theirs in zip(found_state, alone[-1][1], strict=True):
                assert float((ours[:, number] - theirs[:, 0]).norm() / theirs.norm()) <= TOLERANCE


@pytest.mark.parametrize(
    ("version", "has_initial_state", "chunk_tokens", "lengths"),
    each_with_a_model(
        (7, SHORT_ROWS),
        (64, MIDDLE_ROWS),
        (1000, LONG_ROWS),
        (64, MIDDLE_ROWS),
        (1, SHORT_ROWS),
        (7, SHORT_ROWS),
        (1000, LONG_ROWS),
    ),
)
def test_the_chunked_gradient_of_packed_rows_equals_that_of_separate_documents(
    make_finch: Callable[..., Finch],
    version: str,
    has_initial_state: bool,
    chunk_tokens: int,
    lengths: list[list[int]],
) -> None:
    model = small_model(make_finch, version, has_initial_state)
    rows = in_rows(lengths)
    tokens, weights, starts = pack(rows)
    in_chunk = set((starts.nonzero()[:, 1] % chunk_tokens).tolist())
    assert {0, chunk_tokens - 1} <= in_chunk
    assert chunk_tokens == 1 or len(in_chunk) > 2
    pieces = whole([document for row in rows for document in row])
    weight_total = weight_of(pieces)
    expected = separately(model, pieces)
    model.zero_grad(set_to_none=True)
    # A document's first token is nobody's target, whatever it weighs.
    weights = weights.masked_fill(starts, 1.0)
    loss = infctx.backward_through_chunks(model, tokens, loss_weight=weights, starts=starts, chunk_tokens=chunk_tokens)
    assert_same((float(loss) * weight_total, gradients_of(model, times=weight_total)), expected)


@pytest.mark.parametrize("version", ["6", "5.2"])
@pytest.mark.parametrize("chunk_tokens", [7, 64])
def test_chunks_without_a_target_carry_the_gradient_on(
    make_finch: Callable[..., Finch], version: str, chunk_tokens: int
) -> None:
    """Only the last token of a document is trained: all that its first chunks get comes through the state."""
    model = small_model(make_finch, version, True)
    (document,) = make_documents([257])
    document.weights[:-1] = 0
    source = DocumentSource([document], rows=1, accumulate=1, chunk_tokens=chunk_tokens, seed=0, epochs=1)
    (data,) = steps_of(source)
    has_loss = [chunk.has_loss for group in data.groups for chunk in group.chunks]
    assert has_loss.count(True) == 1
    assert not any(has_loss[:-2])
    assert_same(Trainer(model, window="document").step(data), separately(model, whole([document])))
