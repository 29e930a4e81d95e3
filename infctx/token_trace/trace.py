"""From a token's place to its ten stops."""

from __future__ import annotations

from dataclasses import replace

from infctx.data.tokenizer import tokenizer_by_name
from infctx.errors import DataError
from infctx.token_trace.data_stops import (
    document_stop,
    file_stop,
    key_stop,
    place_stop,
    record_stop,
    section_stop,
)
from infctx.token_trace.file_row import read_file_row
from infctx.token_trace.gradient import measure_step, measure_token
from infctx.token_trace.model_stops import loss_stop, model_stop, optimizer_stop, reach_stop
from infctx.token_trace.place import find_token
from infctx.token_trace.stop import Stop
from infctx.token_trace.traced_run import RunToTrace
from infctx.training.boundary_store import BoundaryPlan


def trace_token(run: RunToTrace, row: int, token: int) -> list[Stop]:
    """Follow a token of the first step from its file to the optimizer; weights and files are left as they are.

    Args:
        row: of all rows of the step, from 0. token: in the row, from 0.
    Raises:
        DataError: there is no such token, or the file has changed since it was read.
    """
    if run.step is None:
        raise DataError("--trace-token: the run has no step: the data has no document for one.")
    place = find_token(run.step, run.data.training, row, token)
    tokenizer = tokenizer_by_name(run.data.tokenizer)
    name, source = run.recipe.data.sources()[place.set_index]
    file_row = read_file_row(
        name,
        source,
        file=place.file,
        line=place.line,
        token=(place.row_token, place.token_id),
        tokenizer=tokenizer,
    )
    bptt, shared = run.recipe.bptt, {"engine": run.engine, "boundaries": run.boundaries}
    step = None
    if run.step.weight_total > 0:
        clip = run.recipe.optimizer.clip
        step = measure_step(run.objective, run.model, run.step, window=bptt.window, clip=clip, **shared)
    values = measure_token(
        run.objective,
        run.model,
        place,
        chunk_tokens=run.step.chunk_tokens,
        window=bptt.window,
        parameter=None if step is None else step.name,
        **shared,
    )
    return [
        file_stop(place, file_row, tokenizer),
        key_stop(run, place),
        section_stop(run, place),
        record_stop(file_row),
        document_stop(place, file_row, tokenizer),
        place_stop(run, place, tokenizer),
        model_stop(run, values),
        loss_stop(run, place, values, step),
        reach_stop(run, place, values),
        optimizer_stop(run, place, values, step),
    ]


def without_files(plan: BoundaryPlan) -> BoundaryPlan:
    """The same, with states in host memory where they would be written to disk."""
    return replace(plan, where="host", folder=None) if plan.where == "disk" else plan
