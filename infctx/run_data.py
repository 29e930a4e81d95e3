"""The data section of a recipe as documents, what is held out of them, and the order they are read in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from infctx.checkpoint.model_file import ModelFile
from infctx.data.document_set import DocumentSet
from infctx.data.load import LoadedData, SetSpec, default_workers, ledger, load_sets
from infctx.data.order import DocumentOrder, Portion
from infctx.data.rows import RowRules
from infctx.data.sources.binidx import pair_of, write_binidx
from infctx.data.sources.catalog import ReadOptions, find_files, format_of, read_unit, whole
from infctx.data.split import split_tail, split_validation
from infctx.data.step_source import StepSource
from infctx.data.stream import DocumentSource, StreamSource
from infctx.data.template_catalog import make_template
from infctx.data.tokenizer import Tokenizer, tokenizer_by_name, tokenizer_for_vocab
from infctx.errors import DataError, RecipeError
from infctx.recipe.data_section import DataSection, SetSection, TemplateSection
from infctx.recipe.schema import Recipe
from infctx.training.ranks import ALONE, Ranks

# Between two lines about a long preparation.
SECONDS_BETWEEN_LINES = 5.0
SAMPLED_ROWS = 200
HELD_OUT_NAME = "held out"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a recipe's data section comes to.

    Attributes:
        training, validation: of all sets; where validation is a path, a set of its own.
        loaded: what was read, and what was left out.
        tokenizer: its name.
        order: of the training documents.
    """

    training: DocumentSet
    validation: DocumentSet | None
    loaded: LoadedData
    tokenizer: str
    order: DocumentOrder

    @property
    def set_names(self) -> tuple[str, ...]:
        """Of the sets that are trained on."""
        return self.training.set_names

    @property
    def longest(self) -> int:
        """Tokens of the longest training document."""
        return int(self.training.lengths.max())

    def account(self) -> dict[str, Any]:
        """Where every token of the training data went, and what was held out."""
        held_out = self.validation
        counts = {"documents": len(held_out) if held_out else 0, "tokens": held_out.num_tokens if held_out else 0}
        return {**ledger(self.training, self.loaded), "held_out": counts}


def open_data(recipe: Recipe, *, model_file: ModelFile, say: Say = lambda line: None) -> RunData:
    """Read and split the documents for this model.

    Args: say: told how far a long preparation is.
    Raises: DataError: see `load_sets`; also where nothing says which tokenizer to use.
    """
    section = recipe.data
    vocab_size = model_file.model.config.vocab_size
    tokenizer = choose_tokenizer(section.tokenizer, model_file)
    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "cache": section.cache if section.cache in ("auto", "memory") else Path(section.cache).expanduser(),
        "cache_root": Path.home() / ".cache" / "infctx" / "data",
        "workers": default_workers() if section.workers == "auto" else section.workers,
        "on_progress": _Preparation(say).tell,
    }
    sources = section.sources()
    loaded = load_sets([set_spec(name, source) for name, source in sources], **shared)
    training: DocumentSet = loaded.documents
    validation: DocumentSet | None = None
    if section.validation_tail is not None:
        training, validation = split_tail(training, fraction=section.validation_tail)
    elif isinstance(section.validation, float):
        training, validation = split_validation(training, fraction=section.validation, seed=recipe.run.seed)
    elif section.validation is not None:
        held_out = load_sets([_held_out_spec(section)], **shared)
        validation = held_out.documents
        dropped = {
            reason: loaded.dropped.get(reason, 0) + held_out.dropped.get(reason, 0)
            for reason in {**loaded.dropped, **held_out.dropped}
        }
        loaded = replace(loaded, rejected=[*loaded.rejected, *held_out.rejected], dropped=dropped)
    return RunData(
        training=training,
        validation=validation,
        loaded=loaded,
        tokenizer=tokenizer.name,
        order=_order(training, [source for _, source in sources], recipe),
    )


def choose_tokenizer(name: str, model_file: ModelFile) -> Tokenizer:
    """The tokenizer that data.tokenizer, the model file or its vocabulary size name.

    Raises: RecipeError where the recipe and the model file disagree; DataError where nothing says it.
    """
    if name == "auto":
        name = model_file.tokenizer or tokenizer_for_vocab(model_file.model.config.vocab_size)
    elif model_file.tokenizer not in (None, name):
        raise RecipeError(
            f"data.tokenizer: expected {model_file.tokenizer}, which the model file records, got {name}. "
            "Set it to auto."
        )
    return tokenizer_by_name(name)


def set_spec(name: str, source: SetSection) -> SetSpec:
    """One set as the data package takes it."""
    assert source.path is not None, "checked by the recipe"
    template = source.template
    kind: str | Mapping[str, object] = (
        template.model_dump(mode="python") if isinstance(template, TemplateSection) else template
    )
    return SetSpec(
        name=name,
        paths=(source.path,) if isinstance(source.path, str) else tuple(source.path),
        exclude=tuple(source.exclude),
        format=source.format,
        options=ReadOptions(
            split=source.split,
            subset=source.subset,
            exclude=tuple(source.exclude) if source.format == "code_repository" else (),
        ),
        template=make_template(
            kind,
            fields=source.fields,
            roles=source.roles,
            weights=source.weights,
            weight_field=source.weight_field,
            weight=source.weight,
            train_turns=source.train_turns,
        ),
        rules=RowRules(
            on_bad_row=source.on_bad_row,
            on_empty_row=source.on_empty_row,
            min_tokens=source.min_tokens,
            max_tokens=source.max_tokens,
            on_long=source.on_long,
        ),
        on_duplicate=source.on_duplicate,
        rechunk_tokens=source.rechunk_tokens,
    )


def _held_out_spec(section: DataSection) -> SetSpec:
    """The files that data.validation names, read as `data` says."""
    alone = section.model_copy(update={"sets": None, "path": section.validation, "exclude": []})
    _, source = alone.sources()[0]
    # Every document is measured whole, however the training ones are cut.
    return set_spec(HELD_OUT_NAME, source.model_copy(update={"rechunk_tokens": None, "on_duplicate": "keep"}))


def _order(training: DocumentSet, sources: Sequence[SetSection], recipe: Recipe) -> DocumentOrder:
    portions = [Portion(share=one.share, epochs=one.epochs, tokens=one.tokens) for one in sources]
    for number, name in enumerate(training.set_names):
        if not bool(np.any(training.set_indices == number)):
            raise DataError(
                f"data.sets: the set {name!r} has no training documents left after what is held out. Remove it, or "
                "hold out less."
            )
    return DocumentOrder(
        training.lengths,
        set_indices=training.set_indices,
        portions=portions,
        seed=recipe.run.seed,
        kind=recipe.data.order,
    )


def step_source(recipe: Recipe, data: RunData, *, ranks: Ranks = ALONE) -> StepSource:
    """The steps of a run; the recipe is resolved."""
    run = recipe.run
    shared: dict[str, Any] = {
        "rows": run.rows,
        "accumulate": run.accumulate,
        "chunk_tokens": recipe.bptt.chunk_tokens,
        "seed": run.seed,
        "epochs": run.epochs,
        "steps": run.steps,
        "order": data.order,
        "token_dropout": recipe.optimizer.token_dropout,
        "rank": ranks.data_rank,
        "world": ranks.data_size,
        "part": (ranks.time_rank, ranks.time_size),
    }
    if recipe.data.mode == "stream":
        assert isinstance(recipe.bptt.window, int)
        return StreamSource(data.training, window=recipe.bptt.window, **shared)
    return DocumentSource(data.training, pack_tokens=recipe.data.pack_tokens, **shared)


class _Preparation:
    """Says now and then how far a preparation is; a short one says nothing."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._began = self._said = 0.0
        self._before = 0

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._began == 0.0 or done < self._before:
            self._began = self._said = now
            self._first = done
        self._before = done
        if now - self._said >= SECONDS_BETWEEN_LINES and done < total:
            speed = (done - self._first) / 1e6 / (now - self._began)
            self._say(f"preparing data: {done / 1e9:,.2f} of {total / 1e9:,.2f} GB, {speed:,.0f} MB/s")
            self._said = now


def data_from_anywhere(data: DataSection) -> DataSection:
    """The same section with paths that mean the same file from every working directory."""

    def located(path: str, kind: str) -> str:
        if "://" in path or path.startswith("{"):
            return path
        path = os.path.expanduser(path)
        # Else the name of a set of the hub.
        return os.path.abspath(path) if kind != "huggingface" or os.path.exists(path) else path

    def located_all(path: str | list[str] | None, kind: str) -> str | list[str] | None:
        if path is None or isinstance(path, str):
            return path and located(path, kind)
        return [located(one, kind) for one in path]

    changed: dict[str, object] = {"path": located_all(data.path, data.format)}
    if isinstance(data.validation, str):
        changed["validation"] = located(data.validation, data.format)
    if data.sets is not None:
        changed["sets"] = [
            one.model_copy(update={"path": located_all(one.path, source.format)})
            for one, (_, source) in zip(data.sets, data.sources(), strict=True)
        ]
    if data.cache not in ("auto", "memory"):
        changed["cache"] = os.path.abspath(os.path.expanduser(data.cache))
    if data.tokenizer.endswith(".json"):
        changed["tokenizer"] = os.path.abspath(os.path.expanduser(data.tokenizer))
    return data.model_copy(update=changed)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRow:
    """A row from the beginning of a set, as its template renders it, or why it does not."""

    set_name: str
    template_name: str
    fields: Mapping[str, object]
    rendered: Any
    problem: str | None


def sampled_rows(section: DataSection) -> Iterator[SampledRow]:
    """The first rows of each set."""
    for name, source in section.sources():
        spec = set_spec(name, source)
        template_name = source.template if isinstance(source.template, str) else "pieces"
        for record in islice(_records(spec), SAMPLED_ROWS):
            rendered, problem = None, None
            try:
                rendered = spec.template.render(record.fields)
            except DataError as error:
                problem = str(error)
            yield SampledRow(
                set_name=name,
                template_name=template_name,
                fields=record.fields,
                rendered=rendered,
                problem=problem,
            )


def _records(spec: SetSpec) -> Iterator[Any]:
    for path in find_files(spec.paths, exclude=spec.exclude, format=spec.format):
        kind = format_of(path) if spec.format == "auto" else spec.format
        for record in read_unit(whole(path, format=kind), options=spec.options, on_reject=lambda rejection: None):
            if record.tokens is None:
                yield record


def check_binidx(prefix: Path, *, force: bool) -> None:
    """Refuse a pair that cannot be written, before any work is done."""
    if not prefix.parent.is_dir():
        raise DataError(f"--binidx {prefix}: the folder {prefix.parent} does not exist. Create it first.")
    there = [path for path in map(Path, pair_of(str(prefix))) if path.exists()]
    if there and not force:
        raise DataError(f"--binidx {prefix}: {there[0]} exists. Give another prefix, or --force to replace it.")


def write_as_binidx(data: RunData, prefix: Path) -> str:
    """Write the training documents, in the order of the files; says what was written, and what is lost."""
    vocab_size = tokenizer_by_name(data.tokenizer).vocab_size
    tokens = (document.tokens for document in data.training)
    num_documents, num_tokens = write_binidx(str(prefix), tokens, vocab_size=vocab_size)
    masked = num_tokens - num_documents - int(data.training.num_trained.sum())
    lost = f" The format has no masks: {masked:,} masked tokens will be trained by others." if masked > 0 else ""
    return f"Wrote {prefix}.bin and .idx: {num_documents:,} documents, {num_tokens:,} tokens.{lost}"
