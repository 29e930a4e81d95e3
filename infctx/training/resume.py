"""What a checkpoint of a run holds, and how a run is put back where one left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from infctx.checkpoint.run_state import RunState, load_run_state, save_run_state
from infctx.errors import CheckpointError
from infctx.model.state import ModelState
from infctx.training.run import Done, Place, Run


def save_run(run: Run, done: Done, place: Place) -> None:
    """Write a checkpoint from which the next step begins at `place`, and the adapter folder."""
    rows = {
        f"{group}.{name}": tensor.cpu()
        for group, state in enumerate(place.row_states)
        for name, tensor in zip(ModelState._fields, state, strict=True)
    }
    optimizer = {
        f"{index}.{name}": value.cpu()
        for index, values in run.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    state = RunState(
        step=done.step,
        tensors={
            "trainable": {name: p.detach().cpu() for name, p in run.model.named_parameters() if p.requires_grad},
            "optimizer": optimizer,
            "rows": rows,
            "random": place.random_state,
        },
        facts={**run.facts, "done": asdict(done), "cursor": place.cursor, "row_groups": len(place.row_states)},
    )
    save_run_state(run.folder, state, keep=run.settings.keep_checkpoints)
    run.save_adapter()


def resume_run(run: Run) -> tuple[Done, list[ModelState]]:
    """Put weights, optimizer, random numbers, data and row states where the newest checkpoint left them."""
    loaded = load_run_state(run.folder)
    if loaded is None:
        if run.metrics.path.exists():
            run.progress.message("this run folder has no checkpoint: beginning from the start")
        run.metrics.truncate_after(-1)
        return Done(), []
    for reason in loaded.skipped:
        run.progress.message(f"skipped a damaged checkpoint: {reason}")
    state = loaded.state
    if state.facts.get("base_fingerprint") != run.facts["base_fingerprint"]:
        raise CheckpointError(
            f"{run.folder}: the model file is not the one this run began with: its weights differ. Put the original "
            "back, or start beside this run with --fresh."
        )
    done = Done(**state.facts["done"])
    parameters = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.tensors["trainable"].items():
            parameters[name].copy_(tensor)
    _restore_optimizer(run.optimizer, state.tensors["optimizer"])
    run.source.restore(state.facts["cursor"])
    torch.set_rng_state(state.tensors["random"]["cpu"])
    if "device" in state.tensors["random"] and run.device.type == "cuda":
        torch.cuda.set_rng_state(state.tensors["random"]["device"], run.device)
    rows = state.tensors["rows"]
    row_states = [
        ModelState(*(rows[f"{group}.{name}"].to(run.device) for name in ModelState._fields))
        for group in range(state.facts["row_groups"])
    ]
    run.metrics.truncate_after(done.step if done.owed is None else done.step - 1)
    run.progress.message(f"continuing after step {done.step}")
    return done, row_states


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    if state:
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators' state: "cpu", and "device" on a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states
