"""What there is to look at: the documents of a run and how they will be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infctx.data.document_set import DocumentSet
from infctx.data.load import LoadedData
from infctx.data.order import DocumentOrder
from infctx.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from infctx.data.step_source import StepSource
    from infctx.run_data import SampledRow


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DataToView:
    """The data of a run, opened and not yet read.

    Attributes:
        training, validation: the documents; validation None = nothing is held out.
        loaded: what was read, and what was left out.
        account: the ledger of `loaded`, with what is held out.
        source: the steps of the run; the first is read from it.
        order: of the training documents.
        chunk_tokens: tokens in a chunk.
        pack_tokens: document mode: short documents share a row up to this many tokens; None = they do not.
        samples: rows from the beginning of each set, as their templates render them.
    """

    training: DocumentSet
    validation: DocumentSet | None
    loaded: LoadedData
    account: Mapping[str, Any]
    tokenizer: Tokenizer
    source: StepSource
    order: DocumentOrder
    chunk_tokens: int
    pack_tokens: int | None
    samples: Sequence[SampledRow]
