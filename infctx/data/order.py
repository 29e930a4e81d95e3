"""The order in which documents are read: permutations, mixtures of sets, and orders by length.

A mixture is dealt by tokens: the next document comes from the set whose tokens so far are the fewest for its share
(weighted fair queueing). The order follows from the seed, the documents and the shares alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from infctx.errors import DataError

OrderKind = Literal["random", "file", "length", "bucket"]
BUCKET_DOCUMENTS = 1024
"""Documents that are sorted among each other by the order `bucket`."""

_SETS_WORD = 2
"""Keeps the permutations of further sets apart from those of the first, and from the validation split's draw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """How much of a set one epoch of the mixture holds: at most one of the three; none = one pass.

    Attributes:
        share: of the tokens of the epoch, beside the shares of the other sets.
        epochs: passes over the set; may be a fraction.
        tokens: whole documents of about so many tokens.
    """

    share: float | None = None
    epochs: float | None = None
    tokens: int | None = None


class DocumentOrder:
    """The documents of every epoch, by number.

    Args:
        lengths: tokens of each document.
        set_indices: the set of each document.
        portions: of each set.
        seed: of the permutations.
        kind: random = a permutation in every pass; file = as they come; length = shortest first; bucket = random, then
            sorted by length within stretches of BUCKET_DOCUMENTS, so that rows side by side are about as long. The
            proportions of a mixture then hold from stretch to stretch, and not at all with length.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        *,
        set_indices: npt.NDArray[np.integer] | None = None,
        portions: Sequence[Portion] = (Portion(),),
        seed: int,
        kind: OrderKind = "random",
    ) -> None:
        self._lengths, self._seed, self._kind = lengths, seed, kind
        indices = np.zeros(len(lengths), dtype=np.int64) if set_indices is None else set_indices
        self._members = [np.flatnonzero(indices == number) for number in range(len(portions))]
        self._sizes = [int(lengths[members].sum()) for members in self._members]
        self._portions = portions
        # Tokens of each set in one epoch.
        self._budgets = _budgets(portions, self._sizes)

    @property
    def identity(self) -> list[object]:
        """What two orders have to share to be the same, beside documents and seed; as JSON values."""
        return [self._kind, *self._budgets]

    @property
    def budgets(self) -> list[float]:
        """Of each set, the tokens of one epoch."""
        return list(self._budgets)

    @property
    def sizes(self) -> list[int]:
        """Of each set, its tokens."""
        return list(self._sizes)

    @property
    def epoch_tokens(self) -> float:
        """Tokens of one epoch; where whole documents do not add up to it, of one epoch on average."""
        return math.fsum(self._budgets)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (an order lives as long as its run)
    def epoch(self, number: int) -> npt.NDArray[np.int64]:
        """Give the documents of an epoch, counted from 0, in their order."""
        parts, whens = [], []
        for set_number, budget in enumerate(self._budgets):
            documents, before = self._part(set_number, number, budget)
            parts.append(documents)
            # When each is due, if every set is read evenly through the epoch.
            whens.append(before / budget)
        order = np.concatenate(parts)
        if len(parts) > 1:
            order = order[np.argsort(np.concatenate(whens), kind="stable")]
        return self._arranged(order, number)

    def _part(
        self, set_number: int, epoch: int, budget: float
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """One epoch's documents of a set, and the tokens of the set that come before each in that epoch.

        Passes over the set follow each other without a break; an epoch is the documents that begin in its stretch of
        `budget` tokens.
        """
        size = self._sizes[set_number]
        begin, end = epoch * budget, (epoch + 1) * budget
        documents, offsets = [], []
        for turn in range(int(begin // size), math.ceil(end / size)):
            order = self._members[set_number][self._permutation(set_number, turn)]
            lengths = self._lengths[order]
            before = np.cumsum(lengths) - lengths + float(turn * size)
            inside = (before >= begin) & (before < end)
            documents.append(order[inside])
            offsets.append(before[inside] - begin)
        return np.concatenate(documents), np.concatenate(offsets)

    def _permutation(self, set_number: int, turn: int) -> npt.NDArray[np.int64]:
        num_documents = len(self._members[set_number])
        if self._kind in ("file", "length"):
            return np.arange(num_documents)
        words = [self._seed, turn] if set_number == 0 else [self._seed, turn, _SETS_WORD, set_number]
        return np.random.Generator(np.random.PCG64(words)).permutation(num_documents)

    def _arranged(self, order: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.int64]:
        if self._kind == "length":
            return order[np.argsort(self._lengths[order], kind="stable")]
        if self._kind != "bucket":
            return order
        stretches = []
        for number, begin in enumerate(range(0, len(order), BUCKET_DOCUMENTS)):
            stretch = order[begin : begin + BUCKET_DOCUMENTS]
            stretch = stretch[np.argsort(self._lengths[stretch], kind="stable")]
            # Up and down in turn, so that neighbours are alike across the border as well.
            stretches.append(stretch if (number + epoch) % 2 == 0 else stretch[::-1])
        return np.concatenate(stretches)


def _budgets(portions: Sequence[Portion], sizes: Sequence[int]) -> list[float]:
    budgets = []
    for portion, size in zip(portions, sizes, strict=True):
        if size == 0:
            raise DataError("data.sets: a set has no training documents left. Remove it, or hold out less.")
        if portion.tokens is not None:
            budgets.append(float(portion.tokens))
        elif portion.epochs is not None:
            budgets.append(portion.epochs * size)
        else:
            budgets.append(float(size))
    shares = [portion.share for portion in portions if portion.share is not None]
    if not shares:
        return budgets
    # As much as it takes for every set that has a share to be read once.
    total = max(
        size / portion.share for portion, size in zip(portions, sizes, strict=True) if portion.share is not None
    )
    return [
        float(max(1, round(total * portion.share))) if portion.share is not None else budget
        for portion, budget in zip(portions, budgets, strict=True)
    ]
