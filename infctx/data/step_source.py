"""What a step is for one rank, and what the two modes of reading (stream.py) share.

A step has R = rows x accumulate x world rows, and what is in them does not depend on how they are divided: rank r owns
the rows [r * rows * accumulate, (r + 1) * rows * accumulate), in groups of `rows`. Every rank works out all R rows
(they are cheap) and hands out its own, so all ranks agree on the weight total and the number of chunks without talking.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.chunking import ChunkSequence, RowSlice, chunk_rows
from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.order import DocumentOrder
from infctx.data.token_dropout import drop_targets
from infctx.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepData:
    """What one rank computes in one step.

    Attributes:
        groups: `accumulate` groups of `rows` rows; group g has the same number of chunks on every rank, at least one.
        weight_total: over all rows of all groups and ranks, in float64.
        num_tokens: real tokens over all rows and ranks.
        set_weights: of each set its part of the weight total, in float64.
        set_tokens: of each set its part of the tokens.
        chunk_tokens: tokens in a chunk.
        carries_state: True = each row continues from the state the previous step left; False = from a fresh one.
    """

    groups: tuple[ChunkSequence, ...]
    weight_total: float
    num_tokens: int
    set_weights: tuple[float, ...]
    set_tokens: tuple[int, ...]
    chunk_tokens: int
    carries_state: bool

    def in_pieces(self, piece_tokens: int | None) -> StepData:
        """The same step with its chunks cut into pieces of at most so many tokens; None = whole."""
        if piece_tokens is None:
            return self
        return replace(self, groups=tuple(group.in_pieces(piece_tokens) for group in self.groups))


class StepSource(ABC):
    """The rows of a step, the permutations of the epochs, and the cursor. The arguments are those of its two modes."""

    kind = ""
    carries_state = False
    # Whether a run may go on with another number of rows.
    _may_change_rows = False

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        rows: int,
        accumulate: int,
        chunk_tokens: int,
        seed: int,
        epochs: int | None,
        steps: int | None,
        rank: int,
        world: int,
        order: DocumentOrder | None = None,
        token_dropout: float = 0.0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if (epochs is None) == (steps is None):
            raise DataError(f"expected exactly one of run.steps and run.epochs, got steps={steps}, epochs={epochs}.")
        if not documents:
            raise DataError("expected at least one training document, got none.")
        assert min(rows, accumulate, chunk_tokens, world) >= 1, "sizes start at 1"
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self._documents = documents if isinstance(documents, DocumentSet) else DocumentSet.of(documents)
        self._num_sets = len(self._documents.stores)
        self._lengths = self._documents.lengths
        # Of every epoch; by default a permutation of all documents.
        self._epochs_order = order if order is not None else DocumentOrder(self._lengths, seed=seed)
        self._rows, self._accumulate, self._world, self._rank = rows, accumulate, world, rank
        self._num_rows = rows * accumulate * world
        self._chunk_tokens = chunk_tokens
        self._seed, self._epochs, self._steps = seed, epochs, steps
        self._token_dropout, self._part = token_dropout, part
        self._step = 0
        # The next document: its epoch, and its place in that epoch's permutation.
        self._epoch, self._position = 0, 0
        self._order = self._epochs_order.epoch(0)

    @abstractmethod
    def next_step(self) -> StepData | None:
        """Read the next step; None at the end."""

    @abstractmethod
    def _steps_of_epochs(self, epochs: int) -> int:
        """Count the steps of a run of so many epochs from the documents' lengths alone."""

    @property
    @abstractmethod
    def epoch(self) -> float:
        """Epochs read so far."""

    @abstractmethod
    def row_lengths_left(self) -> list[tuple[npt.NDArray[np.int64], float]]:
        """Tokens of the rows of all further groups, their padding included: lengths, and how many times they come.

        Counted without reading a token; of long runs a part is counted, which stands for the rest.
        """

    @functools.cached_property
    def total_steps(self) -> int:
        """The number of steps of the whole run."""
        if self._epochs is None:
            assert self._steps is not None
            return self._steps
        return self._steps_of_epochs(self._epochs)

    def _has_documents(self) -> bool:
        """Step into the next epoch where this one is used up; False when there is none."""
        while self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            if self._is_past_the_end():
                return False
            self._order = self._epochs_order.epoch(self._epoch)
        return not self._is_past_the_end()

    def _is_past_the_end(self) -> bool:
        return self._epochs is not None and self._epoch >= self._epochs

    def _step_data(self, slices: Sequence[RowSlice]) -> StepData:
        self._step += 1
        # Of all rows and before anything is added up, so that what the loss is divided by is the weight of the kept.
        slices = drop_targets(slices, probability=self._token_dropout, seed=self._seed, step=self._step)
        groups = []
        for group in range(self._accumulate):
            firsts = [(rank * self._accumulate + group) * self._rows for rank in range(self._world)]
            longest = max(len(row) for first in firsts for row in slices[first : first + self._rows])
            mine = slices[firsts[self._rank] : firsts[self._rank] + self._rows]
            others = [row for first in firsts for row in slices[first : first + self._rows]] if self._world > 1 else []
            # One token of padding where no rank has anything left: a group without a chunk would be a special case.
            sizes = {"chunk_tokens": self._chunk_tokens, "min_tokens": max(longest, 1), "num_sets": self._num_sets}
            groups.append(chunk_rows(mine, **sizes, peers=others, part=self._part))
        weight_total, num_tokens = sum(row.weight_total for row in slices), sum(len(row) for row in slices)
        of_sets = [(num_tokens, weight_total)]
        if self._num_sets > 1:
            of_rows = [row.totals_by_set(self._num_sets) for row in slices]
            tokens, weights = (np.sum(totals, axis=0).tolist() for totals in zip(*of_rows, strict=True))
            of_sets = list(zip(tokens, weights, strict=True))
        return StepData(
            groups=tuple(groups),
            weight_total=weight_total,
            num_tokens=num_tokens,
            set_weights=tuple(weight for _, weight in of_sets),
            set_tokens=tuple(tokens for tokens, _ in of_sets),
            chunk_tokens=self._chunk_tokens,
            carries_state=self.carries_state,
        )

    def _identity(self) -> dict[str, object]:
        """What has to be the same for a cursor to mean the same place."""
        return {
            "mode": self.kind,
            "documents": len(self._documents),
            "documents_fingerprint": self._documents.fingerprint,
            "rows": self._num_rows,
            "seed": self._seed,
            "order": self._epochs_order.identity,
        }

    def cursor(self) -> dict[str, object]:
        """Give the place of the next step as JSON values."""
        return {**self._identity(), "step": self._step, "epoch": self._epoch, "position": self._position}

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue from a cursor of the same documents, order and seed; the number of ranks may differ.

        Raises: DataError naming what has changed.
        """
        changed = [
            f"{key} (then {cursor.get(key)}, now {now})"
            for key, now in self._identity().items()
            if cursor.get(key) != now and not (key == "rows" and self._may_change_rows)
        ]
        if changed:
            raise DataError(
                f"The checkpoint's place in the data does not fit this run: {', '.join(changed)}. Continue with the "
                "same data and settings (rows = run.rows × run.accumulate × devices), or start anew."
            )
        self._step, self._epoch, self._position = cursor["step"], cursor["epoch"], cursor["position"]
        self._order = self._epochs_order.epoch(self._epoch)
