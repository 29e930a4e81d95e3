"""The first step as the model gets it: starts, targets, padding."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from infctx.data.order import DocumentOrder
from infctx.data.tokenizer import tokenizer_by_name
from infctx.data_view import DataToView
from infctx.data_view.first_step import SHOWN_ROWS, SHOWN_TOKENS, StepFacts, measure_first_step, padding_of_an_epoch


def first_step(view: DataToView, tokenizer: str = "bytes") -> StepFacts:
    step = measure_first_step(view.source, tokenizer_by_name(tokenizer))
    assert step is not None
    return step


def test_starts_and_targets_of_packed_documents(
    make_view: Callable[..., DataToView], byte_document: Callable[..., Any]
) -> None:
    documents = [byte_document("Q:one", trained="one"), byte_document("R:yes", trained="yes")]
    step = first_step(make_view(documents=documents, mode="document", rows=1, pack_tokens=50, chunk_tokens=4))
    (row,) = step.rows
    assert (row.num_tokens, row.num_starts) == (12, 2)
    # Four tokens a chunk: the row goes on over three, and the targets over their borders.
    assert "".join(token.text or "." for token in row.tokens) == "Q:one.R:yes."
    assert [token.id for token in row.tokens][5::6] == [0, 0]
    assert [token.is_end for token in row.tokens] == [False] * 5 + [True] + [False] * 5 + [True]
    assert [token.is_start for token in row.tokens] == [place in (0, 6) for place in range(12)]
    assert [token.weight for token in row.tokens] == [0, 0, 1, 1, 1, 0] * 2
    assert (step.num_chunks, step.num_tokens, step.padding) == (3, 12, 0.0)


def test_padding_of_rows_of_different_lengths(
    make_view: Callable[..., DataToView], byte_document: Callable[..., Any]
) -> None:
    documents = [byte_document("x" * (length - 1)) for length in (10, 40, 20, 30)]
    step = first_step(make_view(documents=documents, mode="document", rows=2, accumulate=2, order="file"))
    assert (step.mode, step.num_groups, step.num_rows, step.num_tokens) == ("document", 2, 4, 100)
    # 10 and 40 tokens are padded to 40, 20 and 30 to 30.
    assert step.padding == pytest.approx(1 - 100 / 140)
    assert [(row.group, row.row, row.num_tokens) for row in step.rows] == [
        (0, 0, 10),
        (0, 1, 40),
        (1, 0, 20),
        (1, 1, 30),
    ]
    # What is padded is not shown as text.
    assert len(step.rows[0].tokens) == 10


def test_padding_of_an_epoch_is_that_of_its_steps(
    make_view: Callable[..., DataToView], byte_document: Callable[..., Any]
) -> None:
    lengths = np.random.default_rng(0).integers(2, 50, 23)
    documents = [byte_document("x" * (length - 1)) for length in lengths.tolist()]
    view = make_view(documents=documents, mode="document", rows=4, order="random")
    real = places = 0
    while (step := view.source.next_step()) is not None:
        real += step.num_tokens
        places += sum(chunk.tokens.numel() for group in step.groups for chunk in group.chunks)
    assert real == lengths.sum()
    assert padding_of_an_epoch(view.training.lengths, view.order, rows=4) == pytest.approx(1 - real / places)
    assert padding_of_an_epoch(np.array([5]), DocumentOrder(np.array([5]), seed=0), rows=4) == 0.75


def test_no_more_rows_and_tokens_than_one_can_read(make_view: Callable[..., DataToView]) -> None:
    step = first_step(make_view(rows=SHOWN_ROWS + 3, chunk_tokens=SHOWN_TOKENS * 2))
    assert (step.mode, step.num_rows, len(step.rows)) == ("stream", SHOWN_ROWS + 3, SHOWN_ROWS)
    # One row is dealt two of the documents of 37 tokens, the others one.
    assert [len(row.tokens) for row in step.rows] == [SHOWN_TOKENS] + [37] * (SHOWN_ROWS - 1)


def test_tokens_that_are_no_characters_are_shown_as_bytes(
    make_view: Callable[..., DataToView], byte_document: Callable[..., Any]
) -> None:
    step = first_step(make_view(documents=[byte_document("é\n\t\x1b世")], rows=1))
    texts = [token.text for token in step.rows[0].tokens]
    assert texts == ["\\xc3", "\\xa9", "↵", "⇥", "␛", "\\xe4", "\\xb8", "\\x96", ""]


def test_a_source_without_a_step_has_no_first_one(make_view: Callable[..., DataToView]) -> None:
    view = make_view()
    while view.source.next_step() is not None:
        pass
    assert measure_first_step(view.source, view.tokenizer) is None
