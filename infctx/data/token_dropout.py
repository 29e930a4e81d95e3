"""Targets that a step leaves out at random, drawn for each place of a step by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from infctx.data.chunking import RowSlice

# Keeps these draws apart from all others of the same seed.
PURPOSE = 0x746F6B64


def drop_targets(slices: Sequence[RowSlice], *, probability: float, seed: int, step: int) -> list[RowSlice]:
    """The same rows with the weight of each target set to 0 with this probability.

    What is drawn depends on the seed, the step, the number of the row and the place in it alone: not on how rows are
    divided among groups and ranks, on where chunks are cut in them, or on where a run was stopped.

    Args:
        slices: of every row of the step, of all ranks.
        step: counted from 1.
    """
    if probability == 0.0:
        return list(slices)
    dropped = []
    for number, row in enumerate(slices):
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, PURPOSE, step, number))))
        is_kept = draws.random(len(row), dtype=np.float32) >= probability
        dropped.append(replace(row, weights=np.where(is_kept, row.weights, np.float32(0.0))))
    return dropped
