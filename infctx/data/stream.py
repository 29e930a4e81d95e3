"""Which tokens each step reads, in the two modes, and where reading resumes."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.chunking import RowSlice, join_pieces
from infctx.data.document import Document
from infctx.data.order import DocumentOrder
from infctx.data.step_source import StepData, StepSource

# Of a run's documents, so many are measured beforehand; they stand for the rest.
MOST_ENTRIES = 200_000

__all__ = ["DocumentSource", "StepData", "StreamSource"]


class StreamSource(StepSource):
    """Rows that run documents back to back, step after step; each document goes to the row dealt the fewest tokens.

    Args:
        rows, accumulate, rank, world: how the rows of a step are divided.
        chunk_tokens, window: a step is the next `window` chunks of `chunk_tokens` tokens of every row.
        order: of the documents; by default a permutation for each epoch.
        epochs, steps: the end, exactly one. With epochs, rows that run out first are padded and nothing is dropped.
        token_dropout: probability that a target is left out of its step, see `drop_targets`.
        part: of every chunk, which of how many parts this rank computes.
    """

    kind = "stream"
    carries_state = True

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        rows: int,
        accumulate: int,
        chunk_tokens: int,
        window: int,
        seed: int,
        epochs: int | None = None,
        steps: int | None = None,
        rank: int = 0,
        world: int = 1,
        order: DocumentOrder | None = None,
        token_dropout: float = 0.0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(
            documents,
            rows=rows,
            accumulate=accumulate,
            chunk_tokens=chunk_tokens,
            seed=seed,
            epochs=epochs,
            steps=steps,
            rank=rank,
            world=world,
            order=order,
            token_dropout=token_dropout,
            part=part,
        )
        assert window >= 1, f"window={window}"
        self._step_tokens = window * chunk_tokens
        # Known with the number of steps of a run of epochs.
        self._longest_row = 0
        # A heap of (tokens dealt so far, row): the least is the next to be dealt to, the lowest row on a tie.
        self._dealt = [(0, row) for row in range(self._num_rows)]
        # Of each row, the documents dealt and not yet read to their end: index, and the token to read next.
        self._pending: list[list[tuple[int, int]]] = [[] for _ in range(self._num_rows)]

    def next_step(self) -> StepData | None:
        """Read the next step; None at the end."""
        if self._step == self._steps:
            return None
        self._deal()
        if not any(self._pending):
            return None
        return self._step_data([self._read(row) for row in range(self._num_rows)])

    def _deal(self) -> None:
        """Deal until every row can fill the step and see one token beyond."""
        # Every row has read the same number of tokens as long as there are documents, so the row that was dealt the
        # fewest is also the one with the fewest left.
        enough = (self._step + 1) * self._step_tokens + 1
        while self._dealt[0][0] < enough and self._has_documents():
            index = int(self._order[self._position])
            self._position += 1
            dealt, row = self._dealt[0]
            heapq.heapreplace(self._dealt, (dealt + int(self._lengths[index]), row))
            self._pending[row].append((index, 0))

    def _read(self, row: int) -> RowSlice:
        pending = self._pending[row]
        pieces = ((self._documents[index], begin) for index, begin in pending)
        result = join_pieces(pieces, num_tokens=self._step_tokens)
        num_left = len(result)
        while num_left:
            index, begin = pending[0]
            num_read = min(num_left, int(self._lengths[index]) - begin)
            num_left -= num_read
            if begin + num_read == self._lengths[index]:
                del pending[0]
            else:
                pending[0] = (index, begin + num_read)
        return result

    def _identity(self) -> dict[str, object]:
        # The tokens read so far are step * step_tokens, so a step may not change its size on the way.
        return {**super()._identity(), "step_tokens": self._step_tokens}

    def row_lengths_left(self) -> list[tuple[npt.NDArray[np.int64], float]]:
        """All steps are of one length, but for the last of a run of epochs."""
        num_steps = max(0, self.total_steps - self._step)
        full = np.array([self._step_tokens], dtype=np.int64)
        if self._epochs is None or num_steps == 0:
            return [(full, float(num_steps * self._accumulate))]
        last = np.array([self._longest_row - (self.total_steps - 1) * self._step_tokens], dtype=np.int64)
        return [(full, float((num_steps - 1) * self._accumulate)), (last, float(self._accumulate))]

    def _steps_of_epochs(self, epochs: int) -> int:
        dealt = [0] * self._num_rows
        for epoch in range(epochs):
            for length in self._lengths[self._epochs_order.epoch(epoch)].tolist():
                # Only the multiset of sums matters here, so the rows need no numbers.
                heapq.heapreplace(dealt, dealt[0] + length)
        self._longest_row = max(dealt)
        return -(-self._longest_row // self._step_tokens)

    @property
    def epoch(self) -> float:
        """Epochs read so far."""
        read = sum(min(dealt, self._step * self._step_tokens) for dealt, _ in self._dealt)
        return read / self._epochs_order.epoch_tokens

    def cursor(self) -> dict[str, object]:
        """Give the place of the next step as JSON values."""
        dealt = [tokens for _, tokens in sorted((row, tokens) for tokens, row in self._dealt)]
        pending = [[list(piece) for piece in row] for row in self._pending]
        return {**super().cursor(), "dealt": dealt, "pending": pending}

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue from a cursor of the same documents, rows and seed; the number of ranks may differ."""
        super().restore(cursor)
        self._dealt = [(tokens, row) for row, tokens in enumerate(cursor["dealt"])]
        heapq.heapify(self._dealt)
        self._pending = [[(index, begin) for index, begin in row] for row in cursor["pending"]]


class DocumentSource(StepSource):
    """Rows that are one whole document each, from a fresh state.

    Args:
        rows, accumulate, rank, world: how the rows of a step are divided.
        order: of the documents; by default a permutation for each epoch.
        epochs, steps: the end, exactly one. The next epoch's documents fill up the last rows of the one before.
        pack_tokens: put consecutive documents into one row while their sum is at most this; None = one a row.
        token_dropout: probability that a target is left out of its step, see `drop_targets`.
        part: of every chunk, which of how many parts this rank computes.
    """

    kind = "document"
    carries_state = False
    _may_change_rows = True

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        rows: int,
        accumulate: int,
        chunk_tokens: int,
        seed: int,
        epochs: int | None = None,
        steps: int | None = None,
        rank: int = 0,
        world: int = 1,
        order: DocumentOrder | None = None,
        pack_tokens: int | None = None,
        token_dropout: float = 0.0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(
            documents,
            rows=rows,
            accumulate=accumulate,
            chunk_tokens=chunk_tokens,
            seed=seed,
            epochs=epochs,
            steps=steps,
            rank=rank,
            world=world,
            order=order,
            token_dropout=token_dropout,
            part=part,
        )
        self._pack_tokens = pack_tokens
        # The step, epoch and place from which steps have had this number of rows.
        self._counted_from: tuple[int, int, int] = (0, 0, 0)

    def next_step(self) -> StepData | None:
        """Read the next step; None at the end."""
        if self._step == self._steps:
            return None
        slices = [self._next_row() for _ in range(self._num_rows)]
        return self._step_data(slices) if any(len(row) for row in slices) else None

    def _next_row(self) -> RowSlice:
        if not self._has_documents():
            return join_pieces([], num_tokens=0)
        end = self._entry_end(self._order, self._position)
        documents = [self._documents[index] for index in self._order[self._position : end].tolist()]
        self._position = end
        return join_pieces([(document, 0) for document in documents], num_tokens=sum(map(len, documents)))

    def _entry_end(self, order: npt.NDArray[np.int64], begin: int) -> int:
        """Where the entry that begins at this place of the permutation ends; entries do not cross epochs."""
        end = begin + 1
        if self._pack_tokens is None:
            return end
        total = int(self._lengths[order[begin]])
        while end < len(order) and total + int(self._lengths[order[end]]) <= self._pack_tokens:
            total += int(self._lengths[order[end]])
            end += 1
        return end

    def row_lengths_left(self) -> list[tuple[npt.NDArray[np.int64], float]]:
        """Of each group the longest row, of all ranks."""
        num_steps = max(0, self.total_steps - self._step)
        # Packed rows are put together one document at a time.
        most = MOST_ENTRIES if self._pack_tokens is None else MOST_ENTRIES // 10
        entries = self._entry_lengths(min(num_steps * self._num_rows, max(most, self._num_rows)))
        if len(entries) == 0:
            return []
        rows = np.zeros(-(-len(entries) // self._num_rows) * self._num_rows, dtype=np.int64)
        rows[: len(entries)] = entries
        groups = rows.reshape(-1, self._world, self._accumulate, self._rows).max(axis=(1, 3))
        # A group without a row is one token of padding.
        return [(np.maximum(groups.reshape(-1), 1), num_steps / len(groups))]

    def _entry_lengths(self, most: int) -> npt.NDArray[np.int64]:
        """Tokens of the next entries, at most so many; fewer where the epochs end."""
        parts: list[npt.NDArray[np.int64]] = []
        epoch, position, num_found = self._epoch, self._position, 0
        while num_found < most and (self._epochs is None or epoch < self._epochs):
            order = self._epochs_order.epoch(epoch)
            lengths = self._lengths[order]
            begins = np.arange(position, len(order))
            if self._pack_tokens is not None:
                begins = np.fromiter(self._entry_begins(order, position, most - num_found), dtype=np.int64)
            parts.append(np.add.reduceat(lengths, begins) if len(begins) else begins)
            num_found += len(begins)
            epoch, position = epoch + 1, 0
        return np.concatenate(parts)[:most] if parts else np.zeros(0, dtype=np.int64)

    def _entry_begins(self, order: npt.NDArray[np.int64], place: int, most: int) -> Iterator[int]:
        for _ in range(most + 1):
            if place >= len(order):
                return
            yield place
            place = self._entry_end(order, place)

    def _steps_of_epochs(self, epochs: int) -> int:
        step, epoch, position = self._counted_from
        entries = sum(self._num_entries(number, position * (number == epoch)) for number in range(epoch, epochs))
        return step + -(-entries // self._num_rows)

    def _num_entries(self, epoch: int, begin: int) -> int:
        """Count the entries of an epoch from this place of its order on."""
        order = self._epochs_order.epoch(epoch)
        if self._pack_tokens is None:
            return len(order) - begin
        num_entries, place = 0, begin
        while place < len(order):
            place = self._entry_end(order, place)
            num_entries += 1
        return num_entries

    @property
    def epoch(self) -> float:
        """Epochs read so far."""
        return self._epoch + self._position / max(1, len(self._order))

    def cursor(self) -> dict[str, object]:
        """Give the place of the next step as JSON values."""
        return {**super().cursor(), "counted_from": list(self._counted_from)}

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue from a cursor of the same documents, order and seed; the number of rows may differ."""
        super().restore(cursor)
        if cursor["rows"] == self._num_rows:
            self._counted_from = tuple(cursor["counted_from"])
        else:
            # From here on, steps are of another size.
            self._counted_from = (self._step, self._epoch, self._position)
        self.__dict__.pop("total_steps", None)
