"""Rows to documents: the template, the tokenizer, and what happens to rows that are empty, too short or too long.

Rows are taken in batches: a row's own share of the work is then mostly its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from infctx.data.sources.records import Record, Rejection
from infctx.data.templates import EmptyRowError, Rendered, Template, make_documents
from infctx.data.token_store import INDEX_TYPE, Index, StoreBuilder
from infctx.data.tokenizer import END_OF_TEXT, TokenIds, Tokenizer
from infctx.errors import DataError

# Characters of text, and rows, that are tokenised at once.
BATCH_CHARACTERS = 2**20
BATCH_ROWS = 4096

OnBadRow = Literal["stop", "skip"]
OnLong = Literal["stop", "skip", "cut", "split"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRules:
    """What becomes of a row that is not an ordinary one.

    Attributes:
        on_bad_row: not readable, or its columns do not fit the template.
        on_empty_row: without text, or without a trained token; None = as on_bad_row.
        min_tokens, max_tokens: of a document with its end of text; None = any.
        on_long: above max_tokens: stop; skip; cut = its first max_tokens; split = documents of max_tokens.
    """

    on_bad_row: OnBadRow = "stop"
    on_empty_row: OnBadRow | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    on_long: OnLong = "stop"

    def __post_init__(self) -> None:
        for key in ("on_bad_row", "on_empty_row", "on_long"):
            policies = ("stop", "skip", "cut", "split") if key == "on_long" else ("stop", "skip")
            if getattr(self, key) not in (*policies, None):
                raise DataError(f"data.{key}={getattr(self, key)}: expected {', '.join(policies)}.")


@dataclass(kw_only=True, slots=True)
class Account:
    """What was left out: rows with their place, and tokens by reason. A row that has no tokens yet counts 0."""

    rejected: list[Rejection] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: Account) -> None:
        """Count what another account has as well."""
        self.rejected += other.rejected
        self.dropped.update(other.dropped)


class RowReader:
    """Turns the records of one file or unit into documents.

    Args:
        vocab_size: rows of the model's embedding; ids beyond are refused. None = that of the tokenizer.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        rules: RowRules,
        builder: StoreBuilder,
        *,
        file_number: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self._template, self._tokenizer, self._rules, self._builder = template, tokenizer, rules, builder
        self._file_number = file_number
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.account = Account()
        self._file = ""
        self._rendered: list[Rendered] = []
        self._lines: list[int] = []
        self._num_characters = 0

    def read(self, records: Iterable[Record]) -> None:
        """Take all records.

        Raises: DataError naming file and line, for a row that the rules do not allow to be skipped.
        """
        for record in records:
            self._file = record.file
            if record.tokens is not None:
                self._flush()
                self._take_tokens(record)
                continue
            try:
                rendered = self._template.render(record.fields)
            except EmptyRowError as error:
                self._reject(record.line, str(error), is_empty=True)
                continue
            except DataError as error:
                self._reject(record.line, str(error))
                continue
            self._rendered.append(rendered)
            self._lines.append(record.line)
            self._num_characters += len(rendered.text)
            if self._num_characters >= BATCH_CHARACTERS or len(self._lines) >= BATCH_ROWS:
                self._flush()
        self._flush()
        self.account.rejected.sort(key=lambda rejection: rejection.line)

    def reject(self, rejection: Rejection) -> None:
        """Leave out a row that its reader could not make sense of."""
        self._file = rejection.file
        self._reject(rejection.line, rejection.reason)

    def _reject(
        self, line: int, reason: str, *, is_empty: bool = False, num_tokens: int = 0, kind: str | None = None
    ) -> None:
        rules = self._rules
        policy = (rules.on_empty_row or rules.on_bad_row) if is_empty else rules.on_bad_row
        key = "on_empty_row" if is_empty and rules.on_empty_row else "on_bad_row"
        if policy == "stop" and kind is None:
            raise DataError(f"{self._file}:{line}: {reason}. Set data.{key}=skip to skip and count such rows.")
        self.account.rejected.append(Rejection(file=self._file, line=line, reason=reason))
        self.account.dropped[kind or ("empty" if is_empty else "malformed")] += num_tokens

    def _flush(self) -> None:
        if not self._rendered:
            return
        batch = make_documents(self._rendered, self._tokenizer)
        lines = np.array(self._lines, dtype=np.int64)
        self._rendered, self._lines, self._num_characters = [], [], 0
        self._add(batch.tokens, batch.weights, batch.lengths, lines)

    def _take_tokens(self, record: Record) -> None:
        """Tokens that a file holds already: all of them are trained."""
        tokens = record.tokens
        assert tokens is not None
        if len(tokens) == 0:
            self._reject(record.line, "empty document", is_empty=True)
            return
        if tokens[-1] != END_OF_TEXT:
            tokens = np.append(tokens, np.array([END_OF_TEXT], dtype=tokens.dtype))
        weights = np.ones(len(tokens), dtype=np.float32)
        weights[0] = 0
        self._add(tokens, weights, np.array([len(tokens)]), np.array([record.line]))

    def _add(
        self,
        tokens: TokenIds,
        weights: npt.NDArray[np.float32],
        lengths: npt.NDArray[np.int64],
        lines: npt.NDArray[np.int64],
    ) -> None:
        entries = np.zeros(len(lengths), dtype=INDEX_TYPE)
        entries["end"] = np.cumsum(lengths)
        entries["begin"] = entries["end"] - lengths
        entries["file"], entries["line"] = self._file_number, lines
        self._check_ids(tokens, entries)
        entries = self._kept(weights, entries)
        entries = self._shortened(entries)
        if len(entries) and int((entries["end"] - entries["begin"]).sum()) < len(tokens):
            tokens, weights, entries = _packed(tokens, weights, entries)
        if len(entries):
            self._builder.add(tokens, weights, entries)

    def _kept(self, weights: npt.NDArray[np.float32], entries: Index) -> Index:
        """Leave out documents with nothing to train on, and those that are too short."""
        lengths = entries["end"] - entries["begin"]
        # end of text alone: the row had no text
        is_empty = lengths == 1
        is_untrained = np.maximum.reduceat(weights, entries["begin"]) <= 0
        is_short = lengths < (self._rules.min_tokens or 0)
        is_left_out = is_empty | is_untrained | is_short
        if not is_left_out.any():
            return entries
        for place in np.flatnonzero(is_left_out).tolist():
            line, length = int(entries["line"][place]), int(lengths[place])
            if is_empty[place]:
                self._reject(line, "empty document", is_empty=True)
            elif is_untrained[place]:
                reason = "nothing to train on: no token but the first lies in the trained part"
                self._reject(line, reason, is_empty=True, num_tokens=length)
            else:
                reason = f"{length:,} tokens, fewer than data.min_tokens={self._rules.min_tokens:,}"
                self._reject(line, reason, num_tokens=length, kind="short")
        kept: Index = entries[~is_left_out]
        return kept

    def _shortened(self, entries: Index) -> Index:
        """Apply on_long."""
        most, policy = self._rules.max_tokens, self._rules.on_long
        lengths = entries["end"] - entries["begin"]
        if most is None or not (lengths > most).any():
            return entries
        pieces: list[Index] = []
        for place, length in enumerate(lengths.tolist()):
            entry = entries[place : place + 1]
            line = int(entry["line"][0])
            if length <= most:
                pieces.append(entry)
                continue
            reason = f"{length:,} tokens, more than data.max_tokens={most:,}"
            if policy == "stop":
                raise DataError(f"{self._file}:{line}: {reason}. Set data.on_long to skip, cut or split.")
            if policy == "skip":
                self._reject(line, reason, num_tokens=length, kind="long")
                continue
            if policy == "cut":
                self.account.dropped["cut"] += length - most
            begins = range(0, length if policy == "split" else 1, most)
            pieces += [_piece(entry, begin, min(begin + most, length)) for begin in begins]
        shortened: Index = np.concatenate([np.zeros(0, INDEX_TYPE), *pieces])
        return shortened

    def _check_ids(self, tokens: TokenIds, entries: Index) -> None:
        size = self._vocab_size
        if int(tokens.max()) >= size:
            first = int(np.argmax(tokens >= size))
            place = int(np.searchsorted(entries["end"], first, "right"))
            raise DataError(
                f"{self._file}:{entries['line'][place]}: data.tokenizer={self._tokenizer.name} gives the token id "
                f"{int(tokens[first])}, but the model's vocabulary has {size} rows (ids 0..{size - 1}). "
                "Set data.tokenizer to the tokenizer that the model was trained with."
            )


def _piece(entry: Index, begin: int, end: int) -> Index:
    piece = entry.copy()
    piece["end"] = entry["begin"] + end
    piece["begin"] += begin
    piece["offset"] = begin
    piece["is_piece"] = True
    return piece


def _packed(
    tokens: TokenIds, weights: npt.NDArray[np.float32], entries: Index
) -> tuple[TokenIds, npt.NDArray[np.float32], Index]:
    """Close the gaps between documents."""
    ranges = list(zip(entries["begin"].tolist(), entries["end"].tolist(), strict=True))
    entries = entries.copy()
    lengths = entries["end"] - entries["begin"]
    entries["end"] = np.cumsum(lengths)
    entries["begin"] = entries["end"] - lengths
    return (
        np.concatenate([tokens[begin:end] for begin, end in ranges]),
        np.concatenate([weights[begin:end] for begin, end in ranges]),
        entries,
    )
