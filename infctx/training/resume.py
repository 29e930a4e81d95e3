"""What a checkpoint of a run holds, and how a run is put back where one left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from infctx.checkpoint.run_state import RunState, load_run_state, save_run_state
from infctx.errors import CheckpointError
from infctx.training.optimizer_state import join_state_, split_state
from infctx.training.row_states import join_rows, num_rows, split_rows
from infctx.training.run import Done, Place, Run
from infctx.training.step_place import StepPlace, random_state, set_random_state

AVERAGED = "averaged"
"""The group of tensors in a checkpoint that holds the averages of the trained weights, where a run keeps them."""


def save_run(run: Run, done: Done, place: Place) -> None:
    """Write a checkpoint from which the run goes on at `place`, and the adapter folder."""
    optimizer, numbers = split_state(run.optimizer)
    trained = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    tensors = {
        "trainable": {name: parameter.detach().cpu() for name, parameter in trained.items()},
        "optimizer": optimizer,
        "rows": split_rows(place.row_states, 0),
        "random": place.random_state,
    }
    facts = {
        **run.facts,
        "done": asdict(done),
        "cursor": place.cursor,
        "optimizer_numbers": numbers,
    }
    if run.averaged is not None:
        tensors[AVERAGED] = run.averaged.to_tensors()
        facts["averaged_updates"] = run.averaged.num_updates
    if place.under_way is not None:
        tensors["under_way"] = place.under_way.to_tensors()
        tensors["gradient"] = {name: p.grad.detach().cpu() for name, p in trained.items() if p.grad is not None}
        facts["under_way"] = place.under_way.to_facts()
    passes = place.under_way.passes if place.under_way is not None else 0
    state = RunState(step=done.step, passes=passes, tensors=tensors, facts=facts)
    save_run_state(run.folder, state, keep=run.settings.keep_checkpoints)
    run.save_adapter()


def resume_run(run: Run) -> tuple[Done, Place]:
    """Put weights, gradients, optimizer, random numbers and data where the newest checkpoint left them."""
    loaded = load_run_state(run.folder)
    if loaded is None:
        if run.metrics.path.exists():
            run.progress.message("this run folder has no checkpoint: beginning from the start")
        run.metrics.truncate_after(-1)
        return Done(), Place(cursor=run.source.cursor(), random_state=random_state(run.device))
    for reason in loaded.skipped:
        run.progress.message(f"skipped a damaged checkpoint: {reason}")
    state = loaded.state
    if state.facts.get("base_fingerprint") != run.facts["base_fingerprint"]:
        raise CheckpointError(
            f"{run.folder}: the model file is not the one this run began with: its weights differ. Put the original "
            "back, or start beside this run with --fresh."
        )
    check_start(state.facts, run.facts.get("adapter_start"), folder=run.folder)
    done = Done(**state.facts["done"])
    parameters = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.tensors["trainable"].items():
            parameters[name].copy_(tensor)
    join_state_(run.optimizer, state.tensors["optimizer"], state.facts["optimizer_numbers"])
    if run.averaged is not None:
        run.averaged.restore_(state.tensors[AVERAGED], num_updates=state.facts["averaged_updates"])
    run.source.restore(state.facts["cursor"])
    set_random_state(state.tensors["random"], run.device)
    rows = state.tensors["rows"]
    row_states = join_rows(
        rows,
        first_row=0,
        rows_per_group=run.settings.rows,
        num_groups=num_rows(rows) // run.settings.rows,
        device=run.device,
    )
    run.metrics.truncate_after(done.step if done.owed is None else done.step - 1)
    under_way = None
    if "under_way" in state.facts:
        under_way = StepPlace.from_parts(state.facts["under_way"], state.tensors["under_way"], run.device)
        for name, gradient in state.tensors["gradient"].items():
            parameters[name].grad = gradient.to(run.device, copy=True)
    where = f"after step {done.step}" if under_way is None else f"inside step {done.step + 1}, {under_way.in_words()}"
    run.progress.message(f"continuing {where}")
    place = Place(
        cursor=run.source.cursor(),
        random_state=random_state(run.device),
        row_states=row_states,
        under_way=under_way,
    )
    return done, place


def check_start(facts: Mapping[str, object], digest: object, *, folder: Path) -> None:
    """Refuse a checkpoint whose adapter began with something else than what is at hand.

    Args:
        facts: of the checkpoint. digest: of what is at hand; None where the adapter began with nothing.
    """
    if facts.get("adapter_start") != digest:
        raise CheckpointError(
            f"{folder}: the adapter of the newest checkpoint did not begin with what adapter_start.safetensors holds. "
            "Put that run's own file back, or start beside this run with --fresh."
        )
