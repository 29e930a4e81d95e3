"""Many documents as one sequence, over token stores that may be far larger than the memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from infctx.data.document import Document
from infctx.data.token_store import INDEX_TYPE, Index, StoreBuilder, TokenStore


@dataclass(frozen=True, eq=False)
class DocumentSet(Sequence[Document]):
    """Documents of one or several sets; each is made when it is asked for, in microseconds.

    Attributes:
        stores: of each set, its tokens.
        files: of each set, the names that the index numbers.
        entries: of all documents, INDEX_TYPE [n].
        set_indices: uint8 [n], the set of each.
        set_names: one for each set.
    """

    stores: tuple[TokenStore, ...]
    files: tuple[tuple[str, ...], ...]
    entries: Index
    set_indices: npt.NDArray[np.uint8]
    set_names: tuple[str, ...]

    @classmethod
    def of(cls, documents: Iterable[Document]) -> DocumentSet:
        """Collect documents that are already in memory."""
        documents = list(documents)
        builder = StoreBuilder(np.result_type(np.uint16, *{document.tokens.dtype for document in documents}))
        for number, document in enumerate(documents):
            entry = np.zeros(1, dtype=INDEX_TYPE)
            entry["end"], entry["file"] = len(document), number
            builder.add(document.tokens, document.weights, entry)
        store = builder.finish()
        num_sets = 1 + max((document.set_index for document in documents), default=0)
        files = tuple(document.origin for document in documents)
        return cls(
            stores=(store,) * num_sets,
            files=(files,) * num_sets,
            entries=store.index,
            set_indices=np.array([document.set_index for document in documents], dtype=np.uint8),
            set_names=tuple(str(number) for number in range(num_sets)),
        )

    @classmethod
    def joined(cls, parts: Sequence[DocumentSet]) -> DocumentSet:
        """Put sets behind each other."""
        shifts = np.cumsum([0, *(len(part.stores) for part in parts)]).tolist()
        return cls(
            stores=tuple(store for part in parts for store in part.stores),
            files=tuple(files for part in parts for files in part.files),
            entries=np.concatenate([np.zeros(0, INDEX_TYPE), *(part.entries for part in parts)]),
            set_indices=np.concatenate(
                [np.zeros(0, np.uint8)]
                + [(part.set_indices + shift).astype(np.uint8) for part, shift in zip(parts, shifts, strict=False)]
            ),
            set_names=tuple(name for part in parts for name in part.set_names),
        )

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, place: int) -> Document: ...
    @overload
    def __getitem__(self, place: slice) -> DocumentSet: ...
    def __getitem__(self, place: int | slice) -> Document | DocumentSet:
        if isinstance(place, slice):
            return self.subset(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(f"document {place} of {len(self)}")
        begin, end, *_ = self.entries[place].item()
        number = int(self.set_indices[place])
        tokens, weights = self.stores[number].read(begin, end)
        return Document(tokens=tokens, weights=weights, origin=self.origin(place), set_index=number)

    def __iter__(self) -> Iterator[Document]:
        return (self[place] for place in range(len(self)))

    def origin(self, place: int) -> str:
        """Where a document comes from: "file.jsonl:12", with its tokens where it is a piece of that row."""
        begin, end, file, line, offset, is_piece, _ = self.entries[place].item()
        name = self.files[int(self.set_indices[place])][file]
        where = f"{name}:{line}" if line else name
        return f"{where} [tokens {offset}-{offset + end - begin - 1}]" if is_piece else where

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each document."""
        return np.asarray(self.entries["end"] - self.entries["begin"])

    @functools.cached_property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int(self.lengths.sum())

    @functools.cached_property
    def num_trained(self) -> npt.NDArray[np.int64]:
        """Of each document, the number of tokens with a weight above 0."""
        counts = np.zeros(len(self), dtype=np.int64)
        for number, store in enumerate(self.stores):
            mine = self.set_indices == number
            counts[mine] = store.num_trained(self.entries["begin"][mine], self.entries["end"][mine])
        return counts

    @functools.cached_property
    def fingerprint(self) -> str:
        """What changes when a document, its weights, its extent or its place in the order changes; 16 hex digits."""
        digest = hashlib.sha256()
        # The digests are of whole rows; the extent of a piece is its offset and length.
        for values in (self.entries["digest"], self.entries["offset"], self.lengths, self.set_indices):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]

    def subset(self, places: npt.NDArray[np.int64]) -> DocumentSet:
        """The documents of these places, in this order."""
        return self._with(self.entries[places], self.set_indices[places])

    def pieces(
        self, places: npt.NDArray[np.int64], begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> DocumentSet:
        """Parts of documents, each a document of its own; begins and ends count from the document's first token."""
        index = self.entries[places]
        lengths = index["end"] - index["begin"]
        assert bool(np.all((begins >= 0) & (begins < ends) & (ends <= lengths))), "a piece outside of its document"
        index["is_piece"] |= ends - begins < lengths
        index["offset"] += begins
        index["end"] = index["begin"] + ends
        index["begin"] += begins
        return self._with(index, self.set_indices[places])

    def rechunked(self, num_tokens: int) -> DocumentSet:
        """All documents, which lie back to back, cut every so many tokens; a last piece may be shorter."""
        if len(self) == 0:
            return self
        ends = self.entries["end"]
        assert len(self.stores) == 1, "rechunked before it is mixed"
        assert bool(np.all(self.entries["begin"][1:] == ends[:-1])), "documents with others between them"
        first, last = int(self.entries["begin"][0]), int(ends[-1])
        begins = np.arange(first, last, num_tokens)
        holders = np.searchsorted(ends, begins, "right")
        index = self.entries[holders]
        index["offset"] += begins - index["begin"]
        index["begin"], index["end"] = begins, np.minimum(begins + num_tokens, last)
        index["is_piece"] = True
        return self._with(index, self.set_indices[holders])

    def _with(self, index: Index, set_indices: npt.NDArray[np.uint8]) -> DocumentSet:
        return DocumentSet(
            stores=self.stores, files=self.files, entries=index, set_indices=set_indices, set_names=self.set_names
        )
