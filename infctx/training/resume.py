"""What a checkpoint of a run holds, and how a run is put back where one left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from infctx.checkpoint.run_state import RunState, load_run_state, save_run_state
from infctx.checkpoint.writers import owners, together
from infctx.errors import CheckpointError
from infctx.model.state import ModelState
from infctx.training.engine import Engine, Part
from infctx.training.row_states import join_rows, num_rows, split_rows
from infctx.training.run import Done, Place, Run
from infctx.training.step_place import StepPlace, random_state, set_random_state

AVERAGED = "averaged"
"""The group of tensors in a checkpoint that holds the averages of the trained weights, where a run keeps them."""


def save_run(run: Run, done: Done, place: Place) -> None:
    """Write a checkpoint from which the run goes on at `place`, and the adapter folder; every rank calls this."""
    engine, ranks = run.engine, run.engine.ranks
    optimizer, numbers = engine.optimizer_state()
    parts: dict[str, Mapping[str, Part]] = {"trainable": engine.trained(), "optimizer": optimizer}
    facts = {
        **run.facts,
        "done": asdict(done),
        "cursor": place.cursor,
        "optimizer_numbers": numbers,
        "engine": _identity(run),
    }
    if run.averaged is not None:
        parts[AVERAGED] = run.averaged.averages
        facts["averaged_updates"] = run.averaged.num_updates
    # What the adapter folder is made of, the first rank needs besides.
    adapter_group = AVERAGED if run.averaged is not None else "trainable"
    needs_all = ranks.is_first and run.adapter_has_files
    tensors, of_adapter = _collect(engine, parts, also=adapter_group if needs_all else None)
    if ranks.time_rank == 0:
        num_rows = sum(state.wkv.shape[1] for state in place.row_states)
        tensors["rows"] = split_rows(place.row_states, ranks.data_rank * num_rows)
    tensors["random"] = {f"{ranks.rank}.{name}": tensor for name, tensor in place.random_state.items()}
    passes = 0
    if place.under_way is not None:
        passes = place.under_way.passes
        tensors["under_way"] = {f"{ranks.rank}.{name}": t for name, t in place.under_way.to_tensors().items()}
        tensors["gradient"] = {f"{ranks.rank}.{name}": tensor for name, tensor in engine.own_gradients().items()}
        facts["under_way"] = place.under_way.to_facts()
    state = RunState(step=done.step, passes=passes, tensors=tensors, facts=facts)
    save_run_state(run.folder, state, keep=run.settings.keep_checkpoints, writers=ranks)
    if ranks.is_first:
        run.save_adapter(of_adapter if ranks.size > 1 else None)
    # Who is stopped after this would end, and be taken for the first of all to be gone.
    ranks.wait()


def _collect(
    engine: Engine, parts: Mapping[str, Mapping[str, Part]], *, also: str | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The whole tensors that this rank owns, and all of the group `also`; collected one after the other."""
    named = [(group, name, part) for group, of_group in parts.items() for name, part in of_group.items()]
    owner_of = owners([part.numel() * part.dtype.itemsize for _, _, part in named], engine.ranks.size)
    owned: dict[str, dict[str, Tensor]] = {group: {} for group in parts}
    others: dict[str, Tensor] = {}
    for (group, name, part), owner in zip(named, owner_of, strict=True):
        is_owned = owner == engine.ranks.rank
        whole = engine.whole(part, is_wanted=is_owned or group == also)
        if whole is not None and is_owned:
            owned[group][name] = whole
        if whole is not None and group == also:
            others[name] = whole
    return owned, others


def _identity(run: Run) -> dict[str, object]:
    """What has to be the same for a run to go on inside a step: each rank's own part of the gradient is of no other."""
    ranks = run.engine.ranks
    return {"ranks": ranks.size, "time_parallel": ranks.time_size, "strategy": run.strategy}


def resume_run(run: Run) -> tuple[Done, Place]:
    """Put weights, gradients, optimizer, random numbers and data where the newest checkpoint left them.

    The number of ranks and the strategy may be others than then.
    """
    engine, ranks = run.engine, run.engine.ranks
    loaded = load_run_state(run.folder, writers=ranks)
    if loaded is None:
        if run.metrics.path.exists():
            run.progress.message("this run folder has no checkpoint: beginning from the start")
        if ranks.is_first:
            _begin_metrics(run, after=-1)
        return Done(), Place(cursor=run.source.cursor(), random_state=random_state(run.device))
    for reason in loaded.skipped:
        run.progress.message(f"skipped a damaged checkpoint: {reason}")
    state = loaded.state
    with together(ranks) as share:
        if state.facts.get("base_fingerprint") != run.facts["base_fingerprint"]:
            raise CheckpointError(
                f"{run.folder}: the model file is not the one this run began with: its weights differ. Put the "
                "original back, or start beside this run with --fresh."
            )
        check_start(state.facts, run.facts.get("adapter_start"), folder=run.folder)
        run.source.restore(state.facts["cursor"])
        share(None)
    done = Done(**state.facts["done"])
    engine.load(state.tensors["trainable"], state.tensors["optimizer"], state.facts["optimizer_numbers"])
    if run.averaged is not None:
        run.averaged.restore_(state.tensors[AVERAGED], num_updates=state.facts["averaged_updates"], put=engine.put)
    is_same = state.facts["engine"] == _identity(run)
    if not is_same:
        # Others may have the memory that was missing, and another part of each chunk.
        done.piece_tokens = None
    _restore_random_numbers(run, state.tensors["random"], is_same=is_same)
    place = Place(cursor=run.source.cursor(), random_state=random_state(run.device), row_states=_own_rows(run, state))
    if ranks.is_first:
        _begin_metrics(run, after=done.step if done.owed is None else done.step - 1)
    where = f"after step {done.step}"
    if "under_way" in state.facts and is_same and engine.stops_inside_steps:
        own = {group: _of_rank(state.tensors[group], ranks.rank) for group in ("under_way", "gradient")}
        place.under_way = StepPlace.from_parts(state.facts["under_way"], own["under_way"], run.device)
        engine.put_own_gradients(own["gradient"])
        where = f"inside step {done.step + 1}, {place.under_way.in_words()}"
    elif "under_way" in state.facts:
        where += f"; step {done.step + 1} begins again, with other processes than those that had begun it"
    run.progress.message(f"continuing {where}")
    return done, place


def _begin_metrics(run: Run, *, after: int) -> None:
    """Go on behind this step, wherever numbers go."""
    run.metrics.truncate_after(after)
    run.loggers.start(after)


def _own_rows(run: Run, state: RunState) -> list[ModelState]:
    """The states of this rank's rows, where there are any."""
    rows, ranks, per_group = state.tensors["rows"], run.engine.ranks, run.settings.rows
    own = num_rows(rows) // ranks.data_size
    return join_rows(
        rows,
        first_row=ranks.data_rank * own,
        rows_per_group=per_group,
        num_groups=own // per_group,
        device=run.device,
    )


def _of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What a rank wrote, by the names it has there."""
    return {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.split(".", 1)[0] == str(rank)}


def _restore_random_numbers(run: Run, tensors: Mapping[str, Tensor], *, is_same: bool) -> None:
    """Go on where the generators were; other ranks than then have numbers of their own that nobody had before."""
    ranks = run.engine.ranks
    if is_same:
        set_random_state(_of_rank(tensors, ranks.rank), run.device)
    else:
        set_random_state(_of_rank(tensors, 0), run.device)
        # Drawn on every rank alike, and a number for each.
        seeds = torch.randint(2**62, (ranks.size,))
        torch.manual_seed(int(seeds[ranks.rank]))


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
