"""How far a step is: what is told of a place, against going through the chunks one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from infctx.adapters.peft_adapters import attach_lora
from infctx.data.document import Document
from infctx.data.stream import DocumentSource
from infctx.model.finch import Finch
from infctx.training.step_place import WalkPlace
from infctx.training.step_work import StepWork, guess_backward_cost, sweep_tokens


def walk(num_chunks: int, length: int) -> Iterator[WalkPlace]:
    for first in range(0, num_chunks, length):
        end = min(first + length, num_chunks)
        yield from (WalkPlace(first, chunk, False) for chunk in range(first, end - 1))
        yield from (WalkPlace(first, chunk, True) for chunk in reversed(range(first, end)))


@pytest.mark.parametrize("window", [1, 3, "document"])
@pytest.mark.parametrize("piece", [None, 3, 5])
@pytest.mark.parametrize("length", [1, 8, 47, 64])
def test_every_place_of_a_step(window: int | str, piece: int | None, length: int) -> None:
    documents = [
        Document(tokens=np.ones(n, np.uint16), weights=np.zeros(n, np.float32), origin=str(n)) for n in (length, 5)
    ]
    source = DocumentSource(
        documents, rows=1, accumulate=2, chunk_tokens=8, seed=0, steps=1, order=None, token_dropout=0.0
    )
    expected_left = sweep_tokens(source.row_lengths_left(), chunk_tokens=8, window=window)
    data = source.next_step()
    assert data is not None
    data = data.in_pieces(piece)
    work = StepWork(7, data, window)
    forward = backward = 0
    total = None
    for number, group in enumerate(data.groups):
        chunks = group.chunks
        sizes = [chunk.tokens.shape[1] for chunk in chunks]
        pieces = len(sizes) if window == "document" else int(window) * chunks.pieces_per_chunk
        for walked in walk(len(sizes), pieces):
            place = work.place(number, walked)
            total = place.total
            assert (place.done.forward, place.done.backward) == (forward, backward)
            assert (place.token, place.chunk_tokens) == (sum(sizes[: walked.chunk]), sizes[walked.chunk])
            assert (place.step, place.group, place.num_groups, place.num_chunks) == (7, number, 2, len(sizes))
            assert place.window == walked.chunk // pieces
            assert place.num_windows == -(-len(sizes) // pieces)
            forward += 0 if walked.in_sweep_2 else sizes[walked.chunk]
            backward += sizes[walked.chunk] if walked.in_sweep_2 else 0
    assert total is not None
    assert (total.forward, total.backward) == (forward, backward)
    if piece is None:
        assert total == expected_left


def test_the_guess_of_what_sweep_2_costs(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", n_layer=2, n_embd=64, vocab_size=64, dim_ffn=224)
    head, embedding = model.head.weight.numel(), model.embedding.weight.numel()
    products = sum(p.numel() for p in model.parameters()) - embedding
    assert guess_backward_cost(model) == pytest.approx(3 / (1 - head / products))
    model.recompute_layers()
    assert guess_backward_cost(model) == pytest.approx(3 / (1 - head / products) + 1)
    model.recompute_layers(False)
    attach_lora(model, rank=1, alpha=1.0, targets=["key"])
    assert 2.0 < guess_backward_cost(model) < 2.5
