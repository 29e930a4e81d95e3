"""What a source tells of the rows that are still to come, against reading them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infctx.data.document import Document
from infctx.data.step_source import StepSource
from infctx.data.stream import DocumentSource, StreamSource

LENGTHS = (3, 40, 17, 5, 90, 22, 8, 31, 64, 2, 11)


def source(kind: str, **settings: Any) -> StepSource:
    documents = [
        Document(
            tokens=np.ones(length, dtype=np.uint16),
            weights=np.r_[0.0, np.ones(length - 1)].astype(np.float32),
            origin=f"a:{number}",
        )
        for number, length in enumerate(LENGTHS)
    ]
    shared = {"rows": 2, "accumulate": 2, "chunk_tokens": 8, "seed": 1, **settings}
    if kind == "stream":
        return StreamSource(documents, window=2, **shared)
    return DocumentSource(documents, pack_tokens=40 if kind == "packed" else None, **shared)


def spread_out(found: list[tuple[np.ndarray, float]]) -> list[int]:
    return sorted(length for lengths, times in found for length in np.tile(lengths, round(times)).tolist())


@pytest.mark.parametrize("kind", ["stream", "document", "packed"])
@pytest.mark.parametrize("end", [{"epochs": 2}, {"steps": 9}])
@pytest.mark.parametrize("begun", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 3])
def test_the_lengths_are_those_that_are_read(kind: str, end: dict[str, int], begun: int, world: int) -> None:
    reader = source(kind, **end, world=world)
    for _ in range(begun):
        reader.next_step()
    told = spread_out(reader.row_lengths_left())
    read = []
    while (step := reader.next_step()) is not None:
        read += [group.chunks.num_tokens for group in step.groups]
    if kind == "stream" and "epochs" in end:
        # Rows of the last step may end before its longest, in other groups than it.
        assert len(told) == len(read)
        assert max(told, default=0) == max(read, default=0)
        assert sum(told) >= sum(read) >= sum(told) - 16
    else:
        assert told == sorted(read)


def test_of_a_long_run_a_part_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infctx.data.stream.MOST_ENTRIES", 40)
    ((lengths, times),) = source("document", steps=1000).row_lengths_left()
    assert len(lengths) == 20
    assert times * len(lengths) == pytest.approx(2000)
