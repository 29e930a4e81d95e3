"""The stops from the file to the place in the step."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from infctx.data.chunking import RowChunks
from infctx.data.sources.catalog import FORMATS, find_files
from infctx.data.templates import make_documents
from infctx.data.tokenizer import Tokenizer
from infctx.data_view.excerpts import bytes_of, visible
from infctx.data_view.first_step import token_text
from infctx.recipe.load import load_recipe
from infctx.recipe.schema import Recipe
from infctx.token_trace.file_row import FileRow, shown_fields
from infctx.token_trace.place import TokenPlace
from infctx.token_trace.stop import Stop
from infctx.token_trace.traced_run import RunToTrace

AROUND_TOKENS = 40


def file_stop(place: TokenPlace, file_row: FileRow, tokenizer: Tokenizer) -> Stop:
    """1: the row in the file, and the text around the token."""
    at, tokens = place.document_token, place.document.tokens
    pieces = (tokens[max(0, at - AROUND_TOKENS) : at], tokens[at : at + 1], tokens[at + 1 : at + 1 + AROUND_TOKENS])
    # A character that a border cuts is shown as one that is not known.
    texts = [visible(bytes_of(piece, tokenizer).decode(errors="replace")) for piece in pieces]
    values = {
        "path": _shown_path(place.file),
        "line": place.line,
        "format": file_row.format,
        "before": texts[0],
        "token": texts[1],
        "behind": texts[2],
    }
    return Stop(number=1, title="the file", code=find_files, values=values)


def _shown_path(path: str) -> str:
    """A path below the working directory without it."""
    here = os.getcwd().rstrip("/") + "/"
    return path.removeprefix(here)


def key_stop(run: RunToTrace, place: TokenPlace) -> Stop:
    """2: what of the recipe names the file."""
    section = run.written.data
    name, source = section.sources()[place.set_index]
    key = "data.path" if section.sets is None else f"data.sets[{place.set_index}].path"
    values = {"key": key, "set": None if section.sets is None else name, "path": source.path}
    return Stop(number=2, title="the recipe's key", code=load_recipe, values=values)


def section_stop(run: RunToTrace, place: TokenPlace) -> Stop:
    """3: the settings that matter here, with what was left open filled in."""
    recipe = run.recipe
    _, source = recipe.data.sources()[place.set_index]
    values = {
        "data.template": source.template if isinstance(source.template, str) else "pieces",
        "data.tokenizer": run.data.tokenizer,
        "data.mode": recipe.data.mode,
        "data.order": recipe.data.order,
        "data.pack_tokens": recipe.data.pack_tokens,
        "bptt.chunk_tokens": recipe.bptt.chunk_tokens,
        "bptt.window": recipe.bptt.window,
        "run.rows": recipe.run.rows,
        "run.accumulate": recipe.run.accumulate,
        "run.seed": recipe.run.seed,
    }
    return Stop(number=3, title="the section, resolved", code=Recipe.resolved, values=values)


def record_stop(file_row: FileRow) -> Stop:
    """4: the row as its reader gives it."""
    record = file_row.record
    values: dict[str, Any] = {"origin": _shown_path(record.origin)}
    if record.tokens is not None:
        values["tokens"] = len(record.tokens)
    else:
        values["fields"] = shown_fields(record)
    return Stop(number=4, title="the record", code=FORMATS[file_row.format].read, values=values)


def document_stop(place: TokenPlace, file_row: FileRow, tokenizer: Tokenizer) -> Stop:
    """5: the token in its document, and whether and why it is trained on."""
    weight = float(place.document.weights[place.document_token])
    if place.document_token == 0:
        why = "a document's first token is nobody's target"
    else:
        why = f"in {file_row.part}, which is {'trained' if file_row.weight > 0 else 'masked'}"
    values = {
        "id": place.token_id,
        "text": token_text(place.token_id, tokenizer),
        "is_trained": weight > 0,
        "weight": weight,
        "why": why,
        "bytes": None if file_row.bytes is None else list(file_row.bytes),
        "document": _shown_path(place.document.origin),
        "document_token": place.document_token,
        "document_tokens": len(place.document),
        "document_trained_tokens": place.document.num_trained_tokens,
    }
    return Stop(number=5, title="the document", code=make_documents, values=values)


def place_stop(run: RunToTrace, place: TokenPlace, tokenizer: Tokenizer) -> Stop:
    """6: where the token is in the step, and what it has to predict."""
    target, weights = place.target_id, place.row_slice.weights
    why = None
    if target is None:
        why = "the document ends here: nothing is predicted"
    elif place.target_weight == 0:
        is_dropped = place.document.weights[place.document_token + 1] > 0
        why = "left out of this step by optimizer.token_dropout" if is_dropped else "the target is masked"
    trained = np.flatnonzero(weights)
    values = {
        "row": place.row,
        "group": place.group,
        "b": place.group_row,
        "chunk": place.chunk,
        "t": place.chunk_token,
        "starts": bool(place.row_slice.starts[place.token]),
        "row_tokens": len(place.row_slice),
        "row_documents": int(place.row_slice.starts.sum()),
        "document_begin": place.document_begin,
        "target_id": target,
        "target": None if target is None else token_text(target, tokenizer),
        "target_weight": place.target_weight,
        "why_no_weight": why,
        "trained_places": len(trained),
        "next_trained_place": next((int(at) for at in trained if at >= place.token), None),
    }
    return Stop(number=6, title="the place in the step", code=RowChunks.cut, values=values)
