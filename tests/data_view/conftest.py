"""Small data of a run, opened as `infctx data` opens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.load import LoadedData, ledger
from infctx.data.order import DocumentOrder, Portion
from infctx.data.stream import DocumentSource, StreamSource
from infctx.data.templates import make_template
from infctx.data.tokenizer import tokenizer_by_name
from infctx.data_view import DataToView
from infctx.errors import DataError
from infctx.run_data import SampledRow

CHUNK_TOKENS = 16


def document(text: str, *, trained: str | None = None, origin: str = "rows.jsonl:1", set_index: int = 0) -> Document:
    """A document of bytes; of its text only the part `trained` is trained, None = all with the end of text."""
    ids = np.append(tokenizer_by_name("bytes").encode(text), 0).astype(np.uint16)
    weights = np.ones(len(ids), dtype=np.float32)
    if trained is not None:
        first = text.encode().index(trained.encode())
        weights[:] = 0
        weights[first : first + len(trained.encode())] = 1
    weights[0] = 0
    return Document(tokens=ids, weights=weights, origin=origin, set_index=set_index)


def sound_documents(count: int = 12) -> list[Document]:
    """Distinct documents, all longer than a chunk."""
    return [
        document(f"{number:03} " + "abcdefghijklmnop" * 2, origin=f"rows.jsonl:{number + 1}") for number in range(count)
    ]


@dataclass(kw_only=True)
class Opening:
    """How data is opened; see DataToView."""

    documents: Sequence[Document] = field(default_factory=sound_documents)
    held_out: Sequence[Document] | DocumentSet | None = None
    set_names: tuple[str, ...] | None = None
    portions: Sequence[Portion] | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "bytes"
    mode: str = "stream"
    rows: int = 2
    accumulate: int = 1
    chunk_tokens: int = CHUNK_TOKENS
    pack_tokens: int | None = None
    order: str = "file"
    samples: Sequence[SampledRow] = ()


def open_view(**settings: Any) -> DataToView:
    how = Opening(**settings)
    training = how.documents if isinstance(how.documents, DocumentSet) else DocumentSet.of(how.documents)
    if how.set_names is not None:
        training = replace(training, set_names=how.set_names)
    validation = (
        how.held_out if how.held_out is None or isinstance(how.held_out, DocumentSet) else DocumentSet.of(how.held_out)
    )
    loaded = LoadedData(documents=training, **{"duplicates": (0,) * len(training.set_names), **how.loaded})
    order = DocumentOrder(
        training.lengths,
        set_indices=training.set_indices,
        portions=how.portions or [Portion()] * len(training.set_names),
        seed=0,
        kind=how.order,
    )
    shared: dict[str, Any] = {"rows": how.rows, "accumulate": how.accumulate, "seed": 0, "epochs": 1, "order": order}
    source: StreamSource | DocumentSource
    if how.mode == "stream":
        source = StreamSource(training, window=2, chunk_tokens=how.chunk_tokens, **shared)
    else:
        source = DocumentSource(training, pack_tokens=how.pack_tokens, chunk_tokens=how.chunk_tokens, **shared)
    held_out = {"documents": len(validation) if validation else 0, "tokens": validation.num_tokens if validation else 0}
    return DataToView(
        training=training,
        validation=validation,
        loaded=loaded,
        account={**ledger(training, loaded), "held_out": held_out},
        tokenizer=tokenizer_by_name(how.tokenizer),
        source=source,
        order=order,
        chunk_tokens=how.chunk_tokens,
        pack_tokens=how.pack_tokens,
        samples=how.samples,
    )


@pytest.fixture
def make_view() -> Callable[..., DataToView]:
    return open_view


@pytest.fixture
def byte_document() -> Callable[..., Document]:
    return document


@pytest.fixture
def make_samples() -> Callable[..., list[SampledRow]]:
    """Render rows as a set's template does."""

    def make(template: str | dict[str, Any], rows: Sequence[dict[str, Any]], set_name: str = "0") -> list[SampledRow]:
        made = make_template(template)
        samples = []
        for fields in rows:
            rendered, problem = None, None
            try:
                rendered = made.render(fields)
            except DataError as error:
                problem = str(error)
            samples.append(
                SampledRow(
                    set_name=set_name,
                    template_name=template if isinstance(template, str) else "pieces",
                    fields=fields,
                    rendered=rendered,
                    problem=problem,
                )
            )
        return samples

    return make
