"""What a person who knows the field would remark on, looking at the data before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infctx.data.document_set import DocumentSet
from infctx.data.prepare import DUPLICATE
from infctx.data_view.advice import Advice
from infctx.data_view.first_step import StepFacts, padding_of_an_epoch
from infctx.data_view.opened import DataToView
from infctx.data_view.sample_warnings import warnings_of_samples
from infctx.data_view.sets import SetFacts

LEAST_TRAINED = 0.01
MOST_UNTRAINED_DOCUMENTS = 0.01
MOST_DUPLICATES = 0.01
MOST_REJECTED = 0.05
MOST_PASSES = 10.0
MOST_PADDING = 0.1
NAMED_PLACES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    view: DataToView
    sets: Sequence[SetFacts]
    first_step: StepFacts | None

    def of_set(self, name: str) -> str:
        """Name the set, where there are several."""
        return f" of the set {name}" if len(self.view.training.set_names) > 1 else ""


def find_warnings(view: DataToView, sets: Sequence[SetFacts], first_step: StepFacts | None) -> tuple[Advice, ...]:
    """Look for everything that is likely to be a mistake; a sound set gives nothing."""
    seen = _Seen(view=view, sets=sets, first_step=first_step)
    rules: tuple[Callable[[_Seen], Iterator[Advice]], ...] = (
        _too_little_trained,
        _untrained_documents,
        _of_samples,
        _end_never_trained,
        _short_documents,
        _duplicates,
        _held_out_in_training,
        _rejected,
        _repeated,
    )
    return tuple(advice for rule in rules for advice in rule(seen))


def _too_little_trained(seen: _Seen) -> Iterator[Advice]:
    for one in seen.sets:
        share = one.num_trained / one.num_tokens
        if one.num_trained == 0:
            yield Advice(
                seen=f"Nothing is trained: all {one.num_tokens:,} tokens{seen.of_set(one.name)} are masked.",
                to_do="Check data.template, data.weights and data.train_turns: the answers need a weight above 0.",
            )
        elif share < LEAST_TRAINED:
            yield Advice(
                seen=f"Only {one.num_trained:,} of {one.num_tokens:,} tokens{seen.of_set(one.name)} are trained "
                f"({share:.2%}).",
                to_do="If the answers ought to be longer, check data.template and data.fields.",
            )


def _untrained_documents(seen: _Seen) -> Iterator[Advice]:
    documents = seen.view.training
    places = np.flatnonzero(documents.num_trained == 0)
    if len(places) < len(documents) and len(places) > MOST_UNTRAINED_DOCUMENTS * len(documents):
        yield Advice(
            seen=f"{len(places):,} of {len(documents):,} documents have no trained token.",
            places=_origins(documents, places),
            to_do="Where data.max_tokens or data.rechunk_tokens cuts the answer off, raise it, or set data.on_long to "
            "skip; else leave such rows out.",
        )


def _of_samples(seen: _Seen) -> Iterator[Advice]:
    return warnings_of_samples(seen.view.samples, name_set=seen.of_set)


def _end_never_trained(seen: _Seen) -> Iterator[Advice]:
    documents = seen.view.training
    # Whole documents end with the end of text; it is the last token, and the counts leave a range's first one out.
    is_whole = ~documents.entries["is_piece"] & (documents.lengths > 1)
    for number, name in enumerate(documents.set_names):
        ends = documents.entries["end"][is_whole & (documents.set_indices == number)]
        if len(ends) and not documents.stores[number].num_trained(ends - 2, ends).any():
            yield Advice(
                seen=f"The end of text is trained in none of the {len(ends):,} whole documents{seen.of_set(name)}, so "
                "that the model does not learn where to stop.",
                to_do="Train the last piece of the template, or end conversations with the assistant's turn.",
            )


def _short_documents(seen: _Seen) -> Iterator[Advice]:
    view, step = seen.view, seen.first_step
    lengths = view.training.lengths
    mean = float(lengths.mean())
    if step is None or step.mode != "document" or view.pack_tokens is not None or mean >= view.chunk_tokens:
        return
    rows_at_once = step.num_rows // step.num_groups
    padding = padding_of_an_epoch(lengths, view.order, rows=rows_at_once)
    # Rows of about one length side by side use what there is; one short row alone does not.
    if rows_at_once > 1 and padding < MOST_PADDING:
        return
    yield Advice(
        seen=f"The mean document has {mean:,.0f} tokens, fewer than a chunk of {view.chunk_tokens:,}, and each row of "
        f"a step is one document: {step.padding:.0%} of the first step is padding, {padding:.0%} of the first epoch, "
        f"and a chunk holds {rows_at_once * min(mean, view.chunk_tokens):,.0f} tokens.",
        to_do=f"Set data.pack_tokens (for example {view.chunk_tokens}) to put several documents into a row; "
        "data.order: bucket puts documents of about one length side by side.",
    )


def _duplicates(seen: _Seen) -> Iterator[Advice]:
    parts = _as_read(seen.view.training)
    digests = np.concatenate([part.entries["digest"] for part in parts])
    order = np.argsort(digests, kind="stable")
    is_repeated = np.concatenate([[False], digests[order][1:] == digests[order][:-1]])
    count = int(is_repeated.sum())
    if count <= MOST_DUPLICATES * len(digests):
        return
    # The first of each group of equals, for each of its members.
    firsts = order[np.maximum.accumulate(np.where(is_repeated, 0, np.arange(len(order))))]
    repeats = order[is_repeated]
    chosen = np.argsort(repeats, kind="stable")[:NAMED_PLACES]
    pairs = zip(repeats[chosen].tolist(), firsts[is_repeated][chosen].tolist(), strict=True)
    yield Advice(
        seen=f"{count:,} of {len(digests):,} documents ({count / len(digests):.1%}) are the same as an earlier one.",
        places=tuple((_origin(parts, repeat), _origin(parts, first)) for repeat, first in pairs),
        to_do="Set data.on_duplicate: skip to read each once; between sets, remove them from one.",
    )


def _as_read(documents: DocumentSet) -> list[DocumentSet]:
    """The documents of each store before they were cut anew or held out."""
    parts: dict[int, DocumentSet] = {}
    for store, files in zip(documents.stores, documents.files, strict=True):
        parts[id(store)] = DocumentSet(
            stores=(store,),
            files=(files,),
            entries=np.asarray(store.index),
            set_indices=np.zeros(len(store.index), dtype=np.uint8),
            set_names=("",),
        )
    return list(parts.values())


def _origin(parts: Sequence[DocumentSet], place: int) -> str:
    """The origin of a document, counted through all parts."""
    for part in parts:
        if place < len(part):
            return part.origin(place)
        place -= len(part)
    raise AssertionError("a place beyond the documents")


def _held_out_in_training(seen: _Seen) -> Iterator[Advice]:
    training, held_out = seen.view.training, seen.view.validation
    if held_out is None:
        return
    # A digest is of the whole row, whatever piece of it a document is.
    whole = np.flatnonzero(~training.entries["is_piece"])
    digests = held_out.entries["digest"]
    is_in_both = _is_among(digests, training.entries["digest"][whole])
    count = int(is_in_both.sum())
    if count == 0:
        return
    places = np.flatnonzero(is_in_both)[:NAMED_PLACES].tolist()
    twins = _first_with(training, whole, digests[places])
    yield Advice(
        seen=f"{count:,} of {len(held_out):,} held-out documents are also trained on: the validation loss will look "
        "better than it is.",
        places=tuple(
            (held_out.origin(place), training.origin(twin)) for place, twin in zip(places, twins, strict=True)
        ),
        to_do="Remove them from one side; where a fraction is held out, set data.on_duplicate: skip.",
    )


def _is_among(few: npt.NDArray[np.uint64], many: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of the few there are among the many; np.isin sorts or hashes the many, which takes seconds."""
    if len(few) == 0:
        return np.zeros(0, dtype=np.bool_)
    ordered = np.sort(few)
    nearest = np.minimum(np.searchsorted(ordered, many), len(few) - 1)
    return np.isin(few, many[ordered[nearest] == many])


def _first_with(documents: DocumentSet, places: npt.NDArray[np.int64], digests: npt.NDArray[np.uint64]) -> list[int]:
    """The first of these places that holds each digest."""
    found = documents.entries["digest"][places]
    return [int(places[np.argmax(found == digest)]) for digest in digests]


def _rejected(seen: _Seen) -> Iterator[Advice]:
    # Repeated rows are left out where the recipe asks for it, and are nothing to look at.
    rejected = [row for row in seen.view.loaded.rejected if row.reason != DUPLICATE]
    read_from = seen.view.training.stores + (seen.view.validation.stores if seen.view.validation is not None else ())
    num_rows = len(rejected) + sum(len(store.index) for store in {id(store): store for store in read_from}.values())
    if len(rejected) <= MOST_REJECTED * num_rows:
        return
    yield Advice(
        seen=f"{len(rejected):,} of {num_rows:,} rows ({len(rejected) / num_rows:.1%}) are left out, the first "
        f"because: {rejected[0].reason}.",
        places=tuple((f"{row.file}:{row.line}",) for row in rejected[:NAMED_PLACES]),
        to_do="See the reasons in the ledger, and mend the files or the template.",
    )


def _repeated(seen: _Seen) -> Iterator[Advice]:
    for one in seen.sets:
        if one.passes > MOST_PASSES:
            yield Advice(
                seen=f"One epoch reads the {one.num_documents:,} documents{seen.of_set(one.name)} {one.passes:,.1f} "
                "times.",
                to_do="Lower its share, epochs or tokens (data.sets), or add documents: the model will know them by "
                "heart.",
            )


def _origins(documents: DocumentSet, places: npt.NDArray[np.int64]) -> tuple[tuple[str, ...], ...]:
    return tuple((documents.origin(place),) for place in places[:NAMED_PLACES].tolist())
