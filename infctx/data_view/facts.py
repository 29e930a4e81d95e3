"""Everything that is shown of a run's data, measured once as plain values; nothing is printed here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from infctx.data.document_set import DocumentSet
from infctx.data.sources.records import Rejection
from infctx.data_view.advice import Advice
from infctx.data_view.excerpts import ShownDocument, show_document
from infctx.data_view.first_step import StepFacts, measure_first_step
from infctx.data_view.opened import DataToView
from infctx.data_view.sets import LengthFacts, SetFacts, measure_lengths, measure_sets
from infctx.data_view.warnings import find_warnings
from infctx.visible_text import visible

NAMED_PLACES = 3
# What differs between two rejections of one kind.
_NUMBERS = re.compile(r"U\+[0-9A-F]+|\d[\d,.]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedRows:
    """Rows left out for one reason. reason: of the first; numbers in it may differ. places: the first."""

    reason: str
    num_rows: int
    places: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """What is shown.

    Attributes:
        account: the ledger; see `ledger`.
        tokenizer: its name.
        lengths: of all documents.
        documents: the first of each set in turn.
        rejected: most frequent reason first.
        first_step: None where the run has no step.
        files: of each set, trained or held out; documents name them.
    """

    account: Mapping[str, Any]
    tokenizer: str
    sets: tuple[SetFacts, ...]
    lengths: LengthFacts
    documents: tuple[ShownDocument, ...]
    rejected: tuple[RejectedRows, ...]
    first_step: StepFacts | None
    warnings: tuple[Advice, ...]
    files: tuple[tuple[str, ...], ...]


def measure(view: DataToView, *, show: int) -> DataFacts:
    """Measure what is shown. Reads the first step from the source.

    Args: show: documents that are shown.
    """
    tokens = view.account["tokens"]
    assert tokens["in"] == tokens["trained"] + tokens["masked"] + tokens["dropped"], "the ledger does not add up"
    sets = measure_sets(view.training, view.order, view.account["sets"])
    first_step = measure_first_step(view.source, view.tokenizer)
    return DataFacts(
        account=view.account,
        tokenizer=view.tokenizer.name,
        sets=sets,
        lengths=measure_lengths(view.training.lengths),
        documents=tuple(
            show_document(document, view.tokenizer, set_name=view.training.set_names[document.set_index])
            for document in (view.training[place] for place in _first_places(view.training, show))
        ),
        rejected=_by_reason(view.loaded.rejected),
        first_step=first_step,
        warnings=find_warnings(view, sets, first_step),
        files=view.training.files + (view.validation.files if view.validation is not None else ()),
    )


def account_with_facts(facts: DataFacts) -> dict[str, Any]:
    """The ledger with lengths, shares and warnings, as JSON values."""
    by_name = {one.name: one for one in facts.sets}
    sets = []
    for counted in facts.account["sets"]:
        one = by_name.get(counted["name"])
        measured = (
            {}
            if one is None
            else {
                "epoch_tokens": one.epoch_tokens,
                "share": one.share,
                "passes": one.passes,
                "lengths": _lengths_as_json(one.lengths),
            }
        )
        sets.append({**counted, **measured})
    step = facts.first_step
    return {
        **facts.account,
        "sets": sets,
        "lengths": _lengths_as_json(facts.lengths),
        "first_step": None if step is None else {key: value for key, value in asdict(step).items() if key != "rows"},
        "warnings": [advice.text for advice in facts.warnings],
    }


def _lengths_as_json(lengths: LengthFacts) -> dict[str, Any]:
    return {
        "min": lengths.shortest,
        "p10": lengths.tenth,
        "median": lengths.median,
        "p90": lengths.ninetieth,
        "max": lengths.longest,
        "mean": lengths.mean,
        "histogram": [
            {"from": bucket.first, "to": bucket.last, "documents": bucket.num_documents, "tokens": bucket.num_tokens}
            for bucket in lengths.buckets
        ],
    }


def _first_places(documents: DocumentSet, count: int) -> list[int]:
    """The first documents of each set in turn, so that every set of a mixture is seen."""
    ranks = np.zeros(len(documents), dtype=np.int64)
    for number in range(len(documents.set_names)):
        mine = documents.set_indices == number
        ranks[mine] = np.arange(np.count_nonzero(mine))
    candidates = np.flatnonzero(ranks < count)
    order = np.lexsort((documents.set_indices[candidates], ranks[candidates]))
    return [int(place) for place in candidates[order][:count]]


def _by_reason(rejected: Sequence[Rejection]) -> tuple[RejectedRows, ...]:
    groups: defaultdict[str, list[Rejection]] = defaultdict(list)
    for row in rejected:
        groups[_NUMBERS.sub("#", row.reason)].append(row)
    return tuple(
        RejectedRows(
            reason=visible(rows[0].reason),
            num_rows=len(rows),
            places=tuple(visible(f"{row.file}:{row.line}") for row in rows[:NAMED_PLACES]),
        )
        for rows in sorted(groups.values(), key=len, reverse=True)
    )
