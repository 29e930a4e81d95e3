"""From a recipe and the sizes of a model to what a run of it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from infctx.checkpoint.model_file import open_model
from infctx.errors import RecipeError
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.planning.activations import activation_bytes_per_token
from infctx.planning.memory import ChunkPlan, MemoryPlan, OptimizerPlan, plan_memory
from infctx.planning.planned_model import planned_model, released_shape, released_shapes
from infctx.planning.spread import Spread, spread_of
from infctx.planning.time_model import Machine, TimePlan, Work, plan_time
from infctx.recipe.schema import Recipe
from infctx.training.activation_memory import ACTIVATION_SHARE
from infctx.training.boundary_store import DEVICE_SHARE, BoundaryPlan
from infctx.training.precision import Precision

# Documents whose time is told.
DOCUMENT_TOKENS = (65_536, 1_048_576, 10_485_760)
# Of the document whose boundary states are counted, where nothing is said.
USUAL_DOCUMENT_TOKENS = 131_072
_STAYS = ("frozen weights", "trained weights", "averaged weights", "gradients", "optimizer moments")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipePlan:
    """What a run of a recipe needs.

    document_tokens: of the document whose boundary states are counted. memory_if_recomputed: with bptt.activations:
    recompute, None where that is planned. device_memory: bytes of a device, None = not told. times: by tokens of a
    document.
    """

    config: FinchConfig
    num_parameters: int
    num_trained: int
    precision: Precision
    spread: Spread
    chunk: ChunkPlan
    document_tokens: int
    memory: MemoryPlan
    memory_if_recomputed: MemoryPlan | None
    device_memory: int | None
    machine: Machine
    times: dict[int, TimePlan]

    @property
    def fits(self) -> bool | None:
        """Whether the device has room; None where its memory was not told."""
        return None if self.device_memory is None else self.memory.device_bytes <= self.device_memory


def config_for(recipe: Recipe, *, shape: str | None) -> FinchConfig:
    """The sizes of the recipe's model: of a released model where its name is given, else of the file; reads no weights.

    Raises:
        RecipeError: the file is not there, or there is no released model of this name.
    """
    if shape is not None:
        return released_shape(shape)
    path = Path(recipe.model.path).expanduser()
    if not path.exists():
        raise RecipeError(
            f"model.path: {recipe.model.path} is not there. To plan before it is downloaded, give the sizes of "
            f"a released model: --shape {', '.join(released_shapes())}."
        )
    return open_model(path).config


def plan_recipe(
    recipe: Recipe,
    config: FinchConfig,
    *,
    ranks: int | None = None,
    device_memory: int | None = None,
    document_tokens: int | None = None,
    machine: Machine = Machine(),  # noqa: B008 (frozen)
) -> RecipePlan:
    """Predict memory and time of a run on GPUs.

    Args:
        config: of the model.
        ranks: in place of what the recipe says; the part that shares a chunk stays as it is.
        device_memory: bytes of each device; decides what the recipe leaves to auto. None = room for everything.
        document_tokens: of the longest document; None = data.pack_tokens, or 131,072.
        machine: rates of devices and links.
    Raises:
        RecipeError: the adapter does not fit the model, or the ranks do not fit the recipe.
    """
    recipe = recipe.resolved()
    spread = _checked(spread_of(recipe, ranks=ranks))
    precision: Precision = "fp32" if recipe.run.precision == "fp32" else "bf16"
    model = planned_model(recipe, config, precision=precision)
    document_tokens = document_tokens or recipe.data.pack_tokens or USUAL_DOCUMENT_TOKENS
    optimizer = OptimizerPlan(name=recipe.optimizer.name, is_averaged=recipe.optimizer.ema_decay is not None)
    chunk = _placed(recipe, _chunk_plan(recipe, document_tokens), device_memory, config)
    memory = plan_memory(model, chunk, spread=spread, optimizer=optimizer)
    again = replace(chunk, is_recomputed=True)
    memory_again = plan_memory(model, again, spread=spread, optimizer=optimizer)
    is_auto = recipe.bptt.activations == "auto"
    if chunk.is_recomputed or (is_auto and _has_no_room(model, chunk, memory, spread, device_memory)):
        chunk, memory, memory_again = again, memory_again, None
    return RecipePlan(
        config=config,
        num_parameters=_count_parameters(config),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        precision=precision,
        spread=spread,
        chunk=chunk,
        document_tokens=document_tokens,
        memory=memory,
        memory_if_recomputed=memory_again,
        device_memory=device_memory,
        machine=machine,
        times={
            tokens: plan_time(model, _work(recipe, chunk, tokens), spread=spread, machine=machine)
            for tokens in DOCUMENT_TOKENS
        },
    )


def _count_parameters(config: FinchConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Finch(config).parameters())


def _checked(spread: Spread) -> Spread:
    if spread.ranks < 1:
        raise RecipeError(f"--ranks: expected at least 1, got {spread.ranks}.")
    if spread.ranks % spread.time_parallel:
        raise RecipeError(
            f"--ranks {spread.ranks}: run.time_parallel = {spread.time_parallel} does not divide it. Give a multiple, "
            "or set run.time_parallel behind the recipe."
        )
    if spread.strategy == "single" and spread.ranks > 1:
        raise RecipeError(
            f"run.strategy: single is for one rank, got {spread.ranks}. Set run.strategy: ddp, fsdp, deepspeed_1, _2 "
            "or _3."
        )
    return spread


def _chunk_plan(recipe: Recipe, document_tokens: int) -> ChunkPlan:
    bptt = recipe.bptt
    num_chunks = -(-document_tokens // bptt.chunk_tokens)
    if bptt.window != "document":
        num_chunks = min(bptt.window, num_chunks)
    # A stream has documents one after another, however short.
    is_stream = recipe.data.mode == "stream"
    return ChunkPlan(
        chunk_tokens=bptt.chunk_tokens if is_stream else min(bptt.chunk_tokens, document_tokens),
        rows=recipe.run.rows,
        boundary_states=BoundaryPlan(is_thinned=bptt.thin_boundaries).most_kept(num_chunks),
        boundaries="device" if bptt.boundaries == "auto" else bptt.boundaries,
        is_recomputed=bptt.activations == "recompute",
    )


def _placed(recipe: Recipe, chunk: ChunkPlan, device_memory: int | None, config: FinchConfig) -> ChunkPlan:
    """The same with boundary states in host memory where a run would put them there."""
    if device_memory is None or recipe.bptt.boundaries != "auto":
        return chunk
    numbers = config.n_layer * (config.dim_att * config.head_size + 2 * config.n_embd)
    needed = chunk.boundary_states * chunk.rows * numbers * 4
    return replace(chunk, boundaries="device" if needed <= DEVICE_SHARE * device_memory else "host")


def _has_no_room(model: Finch, chunk: ChunkPlan, memory: MemoryPlan, spread: Spread, device_memory: int | None) -> bool:
    """Whether a run would recompute layers, by its own rule."""
    if device_memory is None:
        return False
    hidden_bytes = 2 if model.compute_dtype is not None and model.compute_dtype.itemsize == 2 else 4
    per_token = activation_bytes_per_token(model, hidden_bytes=hidden_bytes)
    kept = sum(per_token.blocks) + per_token.embedding + per_token.last_norm + per_token.hidden
    stays = sum(memory.device.get(part, 0) for part in (*_STAYS, "runtime"))
    return kept * chunk.tokens_at_once(spread) > ACTIVATION_SHARE * max(0, device_memory - stays)


def _work(recipe: Recipe, chunk: ChunkPlan, document_tokens: int) -> Work:
    return Work(
        document_tokens=document_tokens,
        chunk_tokens=recipe.bptt.chunk_tokens,
        rows=chunk.rows,
        has_sweep_1=recipe.bptt.window != 1,
        is_recomputed=chunk.is_recomputed,
    )
