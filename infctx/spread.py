"""How the run section of a recipe spreads a run over processes, and what of that cannot be had here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from infctx.errors import RecipeError
from infctx.model.config import FinchConfig
from infctx.recipe.schema import Recipe
from infctx.training.ranks import count_devices


def is_spread(recipe: Recipe) -> bool:
    """Whether a run of the recipe has more than one process, or an engine made for that."""
    run = recipe.run
    return run.strategy not in ("auto", "single") or run.num_nodes > 1 or num_processes(recipe) > 1


def num_processes(recipe: Recipe) -> int:
    """Processes on each machine."""
    return 1 if recipe.run.strategy == "single" else count_devices(recipe.run.devices)


def data_ranks(recipe: Recipe) -> int:
    """Processes, or groups of them that share each chunk, with rows of their own."""
    return max(1, num_processes(recipe) * recipe.run.num_nodes // recipe.run.time_parallel)


def check_alone(environ: Mapping[str, str]) -> None:
    """Refuse a process that torchrun has started as one of several, for a recipe that wants one.

    Raises: RecipeError.
    """
    started = environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in environ and started != "1":
        raise RecipeError(
            f"run.devices: torchrun has started {started} processes, and the recipe asks for one. Set run.devices and "
            "run.num_nodes to what was started."
        )


def check_model_spread(recipe: Recipe, config: FinchConfig) -> None:
    """Refuse a spread that the model cannot have.

    Raises: RecipeError saying what is missing.
    """
    if recipe.run.time_parallel > 1 and config.n_attention:
        raise RecipeError(
            f"run.time_parallel: expected 1, got {recipe.run.time_parallel}: the layers behind the first "
            f"{config.n_recurrent} of this {config.name} attend to all tokens before, and ranks that share a chunk do "
            "not send each other what they cache. More ranks with rows of their own, FSDP and DeepSpeed work."
        )


def check_spread(recipe: Recipe) -> None:
    """Refuse what this machine cannot do, before a process is started.

    Raises: RecipeError saying what is missing.
    """
    run, num_gpus = recipe.run, torch.cuda.device_count()
    if run.strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            f"run.strategy: {run.strategy} needs the package deepspeed. Install it with "
            "`pip install 'infctx[deepspeed]'`, or set fsdp or ddp."
        )
    if num_gpus and num_processes(recipe) > num_gpus:
        raise RecipeError(
            f"run.devices: expected at most the {num_gpus} GPUs of this machine, got {num_processes(recipe)}."
        )
    ranks = num_processes(recipe) * run.num_nodes
    if ranks % run.time_parallel:
        divisors = ", ".join(str(size) for size in range(1, ranks + 1) if ranks % size == 0)
        raise RecipeError(
            f"run.time_parallel: expected a divisor of the {ranks} processes that run.devices: {run.devices} and "
            f"run.num_nodes: {run.num_nodes} come to here ({divisors}), got {run.time_parallel}."
        )
