"""The tokens of many documents back to back, in memory or memory-mapped from a folder.

Weights are kept as runs of equal values: documents have few of them, and a token then takes two bytes. A document is a
range of tokens and the place it came from; that is one entry of the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from infctx.data.tokenizer import TokenIds

INDEX_TYPE = np.dtype(
    [
        ("begin", "<i8"),
        ("end", "<i8"),
        ("file", "<u4"),
        ("line", "<i8"),
        # Of its first token in the row it is a piece of; 0 also for a whole row.
        ("offset", "<i8"),
        ("is_piece", "?"),
        ("digest", "<u8"),
    ]
)
Index = npt.NDArray[np.void]

_TOKENS, _RUN_ENDS, _RUN_WEIGHTS, _INDEX, _FACTS = (
    "tokens.bin",
    "run_ends.npy",
    "run_weights.npy",
    "index.npy",
    "facts.json",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenStore:
    """Tokens and weights, addressed by their place.

    Attributes:
        tokens: ids [n], uint16 or int32.
        run_ends: int64 [R], the places where runs of equal weights end; the last is n.
        run_weights: float32 [R].
        index: INDEX_TYPE [documents], in the order of the rows.
    """

    tokens: TokenIds
    run_ends: npt.NDArray[np.int64]
    run_weights: npt.NDArray[np.float32]
    index: Index

    def read(self, begin: int, end: int) -> tuple[TokenIds, npt.NDArray[np.float32]]:
        """Give the tokens of a range and their weights, the first weight as 0: nothing predicts a first token."""
        first = int(np.searchsorted(self.run_ends, begin, "right"))
        last = int(np.searchsorted(self.run_ends, end, "left"))
        if first == last:
            weights = np.full(end - begin, self.run_weights[first], dtype=np.float32)
        else:
            ends = np.clip(self.run_ends[first : last + 1], begin, end)
            weights = np.repeat(self.run_weights[first : last + 1], np.diff(ends, prepend=begin))
        weights[0] = 0
        return np.asarray(self.tokens[begin:end]), weights

    def num_trained(self, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count the tokens with a weight above 0 in each range, the first token aside."""
        is_trained = np.asarray(self.run_weights) > 0
        before_run = np.concatenate([[0], np.cumsum(np.diff(self.run_ends, prepend=0) * is_trained)])
        run_begins = np.concatenate([[0], self.run_ends])

        def trained_before(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            run = np.minimum(np.searchsorted(self.run_ends, places, "right"), len(is_trained) - 1)
            counts: npt.NDArray[np.int64] = before_run[run] + (places - run_begins[run]) * is_trained[run]
            return counts

        return trained_before(ends) - trained_before(begins + 1)

    def stretch(self, first: int, last: int) -> TokenStore:
        """The documents [first, last), which lie back to back, as a view."""
        index = self.index[first:last].copy()
        begin, end = int(index["begin"][0]), int(index["end"][-1])
        index["begin"] -= begin
        index["end"] -= begin
        runs = slice(
            int(np.searchsorted(self.run_ends, begin, "right")), int(np.searchsorted(self.run_ends, end, "left")) + 1
        )
        return TokenStore(
            tokens=self.tokens[begin:end],
            run_ends=np.minimum(self.run_ends[runs], end) - begin,
            run_weights=self.run_weights[runs],
            index=index,
        )

    def save(self, folder: Path, facts: dict[str, Any], *, with_tokens: bool = True) -> None:
        """Write the store into an empty folder; `facts` are what `open_store` gives back beside it."""
        if with_tokens:
            with (folder / _TOKENS).open("wb") as file:
                _write_ids(file, self.tokens)
        for name, array in ((_RUN_ENDS, self.run_ends), (_RUN_WEIGHTS, self.run_weights), (_INDEX, self.index)):
            with (folder / name).open("wb") as file:
                np.lib.format.write_array(_Writer(file), array, allow_pickle=False)
        write_facts(folder, {**facts, "id_type": self.tokens.dtype.str})


def open_store(folder: Path) -> tuple[TokenStore, dict[str, Any]]:
    """Map a saved store into memory; nothing is read before it is asked for."""

    def mapped(name: str) -> npt.NDArray[Any]:
        return np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False))

    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    store = TokenStore(
        tokens=_mapped_ids(folder, np.dtype(facts["id_type"])),
        run_ends=mapped(_RUN_ENDS),
        run_weights=mapped(_RUN_WEIGHTS),
        index=mapped(_INDEX),
    )
    return store, facts


class StoreBuilder:
    """Collects batches of documents into a store in memory. id_type: of the ids, uint16 or int32."""

    def __init__(self, id_type: npt.DTypeLike = np.uint16) -> None:
        self._id_type = np.dtype(id_type)
        self._tokens: list[TokenIds] = []
        self._run_ends: list[npt.NDArray[np.int64]] = []
        self._run_weights: list[npt.NDArray[np.float32]] = []
        self._indices: list[Index] = []
        self.num_tokens = 0

    def add(self, tokens: TokenIds, weights: npt.NDArray[np.float32], entries: Index) -> None:
        """Add documents that lie back to back; begin and end of their entries count from the first of these tokens."""
        if len(entries) == 0:
            return
        weights = weights.copy()
        firsts, longer = entries["begin"], entries["end"] - entries["begin"] > 1
        # The first weight is 0 anyway; stored as its neighbour's, it does not cost two runs.
        weights[firsts[longer]] = weights[firsts[longer] + 1]
        entries = entries.copy()
        entries["digest"] = _digests(tokens, weights, entries)
        borders = np.flatnonzero(np.diff(weights)) + 1
        ends = np.append(borders, len(weights))
        self._run_ends.append(ends + self.num_tokens)
        self._run_weights.append(weights[ends - 1])
        entries["begin"] += self.num_tokens
        entries["end"] += self.num_tokens
        self._tokens.append(tokens.astype(self._id_type))
        self._indices.append(entries)
        self.num_tokens += len(tokens)

    def finish(self) -> TokenStore:
        """Give the store of everything that was added, and begin anew."""
        store = TokenStore(
            tokens=np.concatenate([np.zeros(0, self._id_type), *self._tokens]),
            run_ends=np.concatenate([np.zeros(0, np.int64), *self._run_ends]),
            run_weights=np.concatenate([np.zeros(0, np.float32), *self._run_weights]),
            index=np.concatenate([np.zeros(0, INDEX_TYPE), *self._indices]),
        )
        for parts in (self._tokens, self._run_ends, self._run_weights, self._indices):
            parts.clear()
        self.num_tokens = 0
        return store


def _digests(tokens: TokenIds, weights: npt.NDArray[np.float32], entries: Index) -> npt.NDArray[np.uint64]:
    """64 bits of each document's tokens and weights, however the documents were batched and ids are stored."""
    ids = np.ascontiguousarray(tokens, dtype="<i4")
    is_one = weights == 1
    digests = []
    for begin, end in zip(entries["begin"].tolist(), entries["end"].tolist(), strict=True):
        digest = hashlib.blake2b(ids[begin:end].data, digest_size=8)
        if not is_one[begin:end].all():
            digest.update(weights[begin:end].data)
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8")


def merge(stores: Iterable[TokenStore], into: Path | None = None) -> TokenStore:
    """Put stores of one type of ids behind each other, and hold no more than one of them at a time.

    Args: into: an empty folder to write to; the result is mapped from it. None = in memory.
    """
    tokens: list[TokenIds] = []
    run_ends, run_weights, index = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], [np.zeros(0, INDEX_TYPE)]
    base = 0
    id_type: np.dtype[Any] = np.dtype(np.uint16)
    with contextlib.ExitStack() as stack:
        file = None if into is None else stack.enter_context((into / _TOKENS).open("wb"))
        for store in stores:
            id_type = store.tokens.dtype
            if file is None:
                tokens.append(store.tokens)
            else:
                _write_ids(file, store.tokens)
            run_ends.append(store.run_ends + base)
            run_weights.append(np.array(store.run_weights))
            entries = np.array(store.index)
            entries["begin"] += base
            entries["end"] += base
            index.append(entries)
            base += len(store.tokens)
    merged = TokenStore(
        tokens=np.concatenate([np.zeros(0, id_type), *tokens]) if into is None else _mapped_ids(into, id_type),
        run_ends=np.concatenate(run_ends),
        run_weights=np.concatenate(run_weights),
        index=np.concatenate(index),
    )
    if into is not None:
        merged.save(into, {}, with_tokens=False)
    return merged


def without(store: TokenStore, places: npt.NDArray[np.int64], into: Path | None = None) -> TokenStore:
    """Leave out the documents of these places; what is left lies back to back again."""
    kept = np.ones(len(store.index), dtype=np.bool_)
    kept[places] = False
    borders = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=0, append=0))
    return merge([store.stretch(begin, end) for begin, end in borders.reshape(-1, 2).tolist()], into)


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write what `open_store` gives back as facts."""
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _write_ids(file: BinaryIO, ids: TokenIds) -> None:
    file.write(np.ascontiguousarray(ids).data)


class _Writer:
    """A file that numpy writes through: on its own it reports a full disk as an error without a number."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def _mapped_ids(folder: Path, id_type: np.dtype[Any]) -> TokenIds:
    path = folder / _TOKENS
    # An empty file cannot be mapped.
    ids = np.memmap(path, dtype=id_type, mode="r") if path.stat().st_size else np.zeros(0, id_type)
    # A plain view: slices of np.memmap itself take microseconds more.
    return np.asarray(ids)


def repeated(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Find the places whose value has occurred before, rising."""
    _, firsts = np.unique(digests, return_index=True)
    is_first = np.zeros(len(digests), dtype=np.bool_)
    is_first[firsts] = True
    return np.flatnonzero(~is_first)
