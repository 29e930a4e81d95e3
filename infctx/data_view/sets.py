"""The sets in numbers: how long their documents are, and how much of an epoch they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.document_set import DocumentSet
from infctx.data.order import DocumentOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """The documents of `first` to `last` tokens, both included; `first` is a power of two."""

    first: int
    last: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthFacts:
    """Lengths in tokens. The quantiles are lengths that occur. buckets: without gaps, shortest first."""

    shortest: int
    tenth: int
    median: int
    ninetieth: int
    longest: int
    mean: float
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """One set.

    Attributes:
        epoch_tokens: of this set in one epoch of the run.
        share: of the epoch's tokens.
        passes: over the set in one epoch.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_trained: int
    epoch_tokens: float
    share: float
    passes: float
    lengths: LengthFacts


def measure_lengths(lengths: npt.NDArray[np.int64]) -> LengthFacts:
    """Describe the lengths of at least one document."""
    quantiles = np.quantile(lengths, [0.0, 0.1, 0.5, 0.9, 1.0], method="inverted_cdf")
    shortest, tenth, median, ninetieth, longest = (int(value) for value in quantiles)
    # frexp gives the power of two above; exact, which a logarithm is not.
    powers = np.frexp(lengths.astype(np.float64))[1] - 1
    first = int(powers.min())
    counts = np.bincount(powers - first)
    tokens = np.bincount(powers - first, weights=lengths)
    buckets = tuple(
        Bucket(first=2**power, last=2 ** (power + 1) - 1, num_documents=count, num_tokens=round(sum_of_lengths))
        for power, (count, sum_of_lengths) in enumerate(zip(counts.tolist(), tokens.tolist(), strict=True), first)
    )
    return LengthFacts(
        shortest=shortest,
        tenth=tenth,
        median=median,
        ninetieth=ninetieth,
        longest=longest,
        mean=float(lengths.mean()),
        buckets=buckets,
    )


def measure_sets(
    documents: DocumentSet, order: DocumentOrder, ledger_of_sets: Sequence[Mapping[str, Any]]
) -> tuple[SetFacts, ...]:
    """Describe every set that has documents."""
    # Sorted once: a mixture can have hundreds of sets.
    by_set = np.argsort(documents.set_indices, kind="stable")
    ends = np.cumsum(np.bincount(documents.set_indices, minlength=len(documents.set_names))).tolist()
    lengths = documents.lengths[by_set]
    facts = []
    for number, (counted, budget, size) in enumerate(zip(ledger_of_sets, order.budgets, order.sizes, strict=True)):
        mine = lengths[ends[number - 1] if number else 0 : ends[number]]
        if len(mine) == 0:
            continue
        facts.append(
            SetFacts(
                name=str(counted["name"]),
                num_documents=counted["documents"],
                num_tokens=counted["tokens"],
                num_trained=counted["trained"],
                epoch_tokens=budget,
                share=budget / order.epoch_tokens,
                passes=budget / size,
                lengths=measure_lengths(mine),
            )
        )
    return tuple(facts)
