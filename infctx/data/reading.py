"""How the files of a set become documents, as workers are told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from infctx.data.rows import Account, RowReader, RowRules
from infctx.data.sources.catalog import ReadOptions, read_unit
from infctx.data.sources.records import Unit
from infctx.data.templates import Template
from infctx.data.token_store import StoreBuilder
from infctx.data.tokenizer import tokenizer_by_name

# Raised whenever the same input would give other tokens, or files another layout.
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the files of a set become documents; what a worker needs to know.

    Attributes:
        tokenizer: its name.
        vocab_size: rows of the embedding; None = that of the tokenizer.
        drops_duplicates: whether a document that has occurred before is left out.
    """

    template: Template
    rules: RowRules
    tokenizer: str
    vocab_size: int | None = None
    options: ReadOptions = field(default_factory=ReadOptions)
    drops_duplicates: bool = False

    @property
    def id_type(self) -> np.dtype[Any]:
        """Of the stored ids."""
        num_ids = max(tokenizer_by_name(self.tokenizer).vocab_size, self.vocab_size or 0)
        return np.dtype(np.uint16 if num_ids <= 2**16 else np.int32)

    def key(self) -> dict[str, Any]:
        """Everything here that changes tokens."""
        return {
            "format": FORMAT,
            "template": self.template.key(),
            "rules": asdict(self.rules),
            "tokenizer": tokenizer_by_name(self.tokenizer).digest,
            "vocab_size": self.vocab_size,
            "options": asdict(self.options),
            "drops_duplicates": self.drops_duplicates,
        }


def read_rows(unit: Unit, reading: Reading, builder: StoreBuilder, *, file_number: int) -> Account:
    reader = RowReader(
        reading.template,
        tokenizer_by_name(reading.tokenizer),
        reading.rules,
        builder,
        file_number=file_number,
        vocab_size=reading.vocab_size,
    )
    reader.read(read_unit(unit, options=reading.options, on_reject=reader.reject))
    return reader.account
