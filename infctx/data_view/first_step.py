"""The first step of a run, row by row, as the model will get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from infctx.data.order import DocumentOrder
from infctx.data.tokenizer import END_OF_TEXT, Tokenizer
from infctx.data_view.excerpts import bytes_of
from infctx.visible_text import visible

if TYPE_CHECKING:
    from infctx.data.chunking import ChunkSequence
    from infctx.data.step_source import StepSource

SHOWN_ROWS = 8
SHOWN_TOKENS = 40
TOKEN_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownToken:
    """A token of a row.

    Attributes:
        text: its bytes, where they are not text as escapes; empty for end of text.
        weight: as a target in this step.
        is_start: whether a document begins with it.
    """

    text: str
    id: int
    weight: float
    is_start: bool

    @property
    def is_end(self) -> bool:
        """Whether it is the end of a text."""
        return self.id == END_OF_TEXT


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRow:
    """A row and its first tokens. num_starts: documents that begin in it."""

    group: int
    row: int
    num_tokens: int
    num_starts: int
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """The first step.

    Attributes:
        mode: stream or document.
        num_rows, num_chunks: in all groups, of this rank.
        num_tokens: without padding.
        padding: share of the places that hold no token.
        rows: the first of them.
    """

    mode: str
    num_groups: int
    num_rows: int
    num_chunks: int
    chunk_tokens: int
    num_tokens: int
    padding: float
    rows: tuple[ShownRow, ...]


def measure_first_step(source: StepSource, tokenizer: Tokenizer) -> StepFacts | None:
    """Read one step from a source; None where it has none."""
    step = source.next_step()
    if step is None:
        return None
    sequences = [group.chunks for group in step.groups]
    num_tokens = sum(group.num_tokens for group in step.groups)
    num_places = sum(len(chunks.rows) * chunks.num_tokens for chunks in sequences)
    places = [(group, row) for group, chunks in enumerate(sequences) for row in range(len(chunks.rows))]
    return StepFacts(
        mode=source.kind,
        num_groups=len(step.groups),
        num_rows=len(places),
        num_chunks=sum(len(chunks) for chunks in sequences),
        chunk_tokens=step.chunk_tokens,
        num_tokens=num_tokens,
        padding=1 - num_tokens / num_places,
        rows=tuple(_shown_row(step.groups[group], group, row, tokenizer) for group, row in places[:SHOWN_ROWS]),
    )


def _shown_row(sequence: ChunkSequence, group: int, row: int, tokenizer: Tokenizer) -> ShownRow:
    whole = sequence.chunks.rows[row]
    wanted = min(SHOWN_TOKENS, len(whole))
    tokens: list[int] = []
    # A token is the target of the place before it; the first is nobody's.
    weights: list[float] = [0.0]
    starts: list[bool] = []
    for chunk in sequence.chunks:
        if len(tokens) >= wanted:
            break
        tokens += chunk.tokens[row].tolist()
        weights += chunk.loss_weight[row].tolist()
        starts += chunk.starts[row].tolist() if chunk.starts is not None else [False] * chunk.tokens.shape[1]
    shown = list(zip(tokens, weights, starts, strict=False))[:wanted]
    return ShownRow(
        group=group,
        row=row,
        num_tokens=len(whole),
        num_starts=int(whole.starts.sum()),
        tokens=tuple(
            ShownToken(text=token_text(token, tokenizer), id=token, weight=weight, is_start=start)
            for token, weight, start in shown
        ),
    )


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """A token in one line: what is no text as escapes, newlines and tabs as signs; empty for end of text."""
    data = bytes_of(np.array([token]), tokenizer)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="backslashreplace")
    text = visible(text).replace("\n", "↵").replace("\t", "⇥")
    return text if len(text) <= TOKEN_CHARACTERS else f"{text[:TOKEN_CHARACTERS]}…"


def padding_of_an_epoch(lengths: npt.NDArray[np.int64], order: DocumentOrder, *, rows: int) -> float:
    """Share of padding where each row is one document and `rows` of them are padded to the longest."""
    ordered = lengths[order.epoch(0)]
    groups = np.append(ordered, np.zeros(-len(ordered) % rows, dtype=np.int64)).reshape(-1, rows)
    return 1 - float(ordered.sum()) / float(groups.max(axis=1).sum() * rows)
