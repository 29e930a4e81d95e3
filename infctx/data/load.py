"""The sets of a run as documents: read at once where they are small, through a prepared cache where they are not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infctx.data.document_set import DocumentSet
from infctx.data.prepare import OnProgress, Prepared, prepare, read_in_memory
from infctx.data.reading import Reading
from infctx.data.rows import OnBadRow, RowRules
from infctx.data.sources.catalog import ReadOptions, find_files, format_of, num_input_bytes, whole
from infctx.data.sources.records import Rejection
from infctx.data.template_catalog import make_template
from infctx.data.templates import Template
from infctx.data.token_store import repeated
from infctx.data.tokenizer import Tokenizer
from infctx.errors import DataError

IN_MEMORY_BYTES = 2**26
"""Input above this is prepared, where the recipe leaves it open."""

OnDuplicate = Literal["keep", "skip", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetSpec:
    """One set of documents, as a recipe names it.

    Attributes:
        name: for metrics and messages.
        paths, exclude: see `find_files`.
        format: of every file; "auto" = each by its name.
        on_duplicate: what becomes of a document whose tokens and weights have occurred before in the set.
        rechunk_tokens: join all documents and cut them every so many tokens; None = documents as they are.
    """

    name: str = "documents"
    paths: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    format: str = "auto"
    options: ReadOptions = field(default_factory=ReadOptions)
    template: Template
    rules: RowRules = field(default_factory=RowRules)
    on_duplicate: OnDuplicate = "keep"
    rechunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedData:
    """All documents in file order, and what was left out.

    Attributes:
        dropped: tokens by reason.
        duplicates: of each set, documents that had occurred before in it.
        caches: folders that documents are mapped from.
    """

    documents: DocumentSet
    rejected: list[Rejection] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    duplicates: tuple[int, ...] = ()
    caches: tuple[Path, ...] = ()

    @property
    def tokens_dropped(self) -> int:
        """For any reason."""
        return sum(self.dropped.values())


def load_sets(
    sets: Sequence[SetSpec],
    *,
    tokenizer: Tokenizer,
    vocab_size: int | None = None,
    cache: Path | Literal["auto", "memory"] = "memory",
    cache_root: Path | None = None,
    workers: int = 1,
    on_progress: OnProgress = lambda done, total: None,
) -> LoadedData:
    """Read every row of every file of every set into a document.

    Args:
        vocab_size: rows of the model's embedding; ids beyond are refused. None = that of the tokenizer.
        cache: the folder of prepared caches; auto = `cache_root`, above IN_MEMORY_BYTES of input; memory = none.
        workers: processes that prepare.
    Raises: DataError naming file and line, and where a set has no documents.
    """
    loaded = []
    for spec in sets:
        reading = Reading(
            template=spec.template,
            rules=spec.rules,
            tokenizer=tokenizer.name,
            vocab_size=vocab_size,
            options=spec.options,
            drops_duplicates=spec.on_duplicate == "skip",
        )
        files = [
            (path, format_of(path) if spec.format == "auto" else spec.format)
            for path in find_files(spec.paths, exclude=spec.exclude, format=spec.format)
        ]
        folder = _cache_folder(files, cache, cache_root)
        if folder is None:
            prepared = read_in_memory([whole(path, format=kind) for path, kind in files], reading)
        else:
            prepared = prepare(files, reading, cache=folder, workers=workers, on_progress=on_progress)
        loaded.append(_checked(spec, prepared, [path for path, _ in files]))
    dropped: Counter[str] = Counter()
    for part in loaded:
        dropped.update(part.dropped)
    return LoadedData(
        documents=DocumentSet.joined([part.documents for part in loaded]) if len(loaded) > 1 else loaded[0].documents,
        rejected=[row for part in loaded for row in part.rejected],
        dropped=dict(dropped),
        duplicates=tuple(count for part in loaded for count in part.duplicates),
        caches=tuple(folder for part in loaded for folder in part.caches),
    )


def _cache_folder(
    files: Sequence[tuple[str, str]], cache: Path | Literal["auto", "memory"], root: Path | None
) -> Path | None:
    if isinstance(cache, Path):
        return cache
    if cache == "memory" or root is None or num_input_bytes(files) <= IN_MEMORY_BYTES:
        return None
    return root


def _checked(spec: SetSpec, prepared: Prepared, files: Sequence[str]) -> LoadedData:
    """The documents of one set, if there are any, with what the rules say about duplicates and pieces."""
    store, account = prepared.store, prepared.account
    documents = DocumentSet(
        stores=(store,),
        files=(tuple(files),),
        entries=np.asarray(store.index),
        set_indices=np.zeros(len(store.index), dtype=np.uint8),
        set_names=(spec.name,),
    )
    if len(documents) == 0:
        raise _no_documents(spec, account.rejected)
    if spec.on_duplicate == "stop" and prepared.num_duplicates:
        place = int(repeated(documents.entries["digest"])[0])
        raise DataError(
            f"{documents.origin(place)}: the same as an earlier row, and {prepared.num_duplicates - 1:,} more are. Set "
            "data.on_duplicate to skip, or to keep."
        )
    if spec.rechunk_tokens is not None:
        documents = documents.rechunked(spec.rechunk_tokens)
    return LoadedData(
        documents=documents,
        rejected=account.rejected,
        dropped=dict(account.dropped),
        duplicates=(prepared.num_duplicates,),
        caches=(prepared.folder,) if prepared.folder is not None else (),
    )


def _no_documents(spec: SetSpec, rejected: Sequence[Rejection]) -> DataError:
    where = "data.path=" + (spec.paths[0] if len(spec.paths) == 1 else str(list(spec.paths)))
    if not rejected:
        return DataError(f"{where}: expected at least one document, got none: the files have no rows.")
    first = rejected[0]
    return DataError(
        f"{where}: expected at least one document, got none: all {len(rejected)} rows were rejected, "
        f"the first ({first.file}:{first.line}) because: {first.reason}."
    )


def load_documents(
    paths: Sequence[str],
    *,
    tokenizer: Tokenizer,
    exclude: Sequence[str] = (),
    template: str = "text",
    on_bad_row: OnBadRow = "stop",
    vocab_size: int | None = None,
) -> LoadedData:
    """Read one set into memory; see `load_sets`."""
    spec = SetSpec(
        paths=tuple(paths),
        exclude=tuple(exclude),
        template=make_template(template),
        rules=RowRules(on_bad_row=on_bad_row),
    )
    return load_sets([spec], tokenizer=tokenizer, vocab_size=vocab_size)


def default_workers() -> int:
    """One process for each core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ledger(documents: DocumentSet, loaded: LoadedData) -> dict[str, Any]:
    """Account for every token: in = trained + masked + dropped. A document's first token counts as masked."""
    trained, kept = int(documents.num_trained.sum()), documents.num_tokens
    sets = []
    for number, name in enumerate(documents.set_names):
        mine = documents.set_indices == number
        num_tokens = int(documents.lengths[mine].sum())
        num_trained = int(documents.num_trained[mine].sum())
        counts = {"documents": int(mine.sum()), "tokens": num_tokens, "trained": num_trained}
        sets.append({"name": name, **counts, "masked": num_tokens - num_trained})
    dropped = loaded.tokens_dropped
    return {
        "documents": len(documents),
        "tokens": {"in": kept + dropped, "trained": trained, "masked": kept - trained, "dropped": dropped},
        "dropped_tokens": {reason: count for reason, count in loaded.dropped.items() if count},
        "duplicate_documents": sum(loaded.duplicates),
        "sets": sets,
        "rejected_rows": [{"file": row.file, "line": row.line, "reason": row.reason} for row in loaded.rejected],
    }
