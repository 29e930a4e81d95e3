"""From a recipe and the sizes of a model to what a run of it needs."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch

from infctx.checkpoint.model_file import open_model
from infctx.errors import RecipeError
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.planning.activations import Device, activation_bytes_per_token
from infctx.planning.attention_memory import CachePlan
from infctx.planning.disk import disk_bytes
from infctx.planning.memory import ChunkPlan, MemoryPlan, OptimizerPlan, plan_memory, with_boundaries
from infctx.planning.planned_model import planned_model, released_shape, released_shapes
from infctx.planning.recipe_plan import RecipePlan, Target
from infctx.planning.spread import Spread, spread_of
from infctx.planning.time_model import Flops, TimePlan, Work, flops_per_token, plan_time
from infctx.recipe.run_section import SHARDING
from infctx.recipe.schema import Recipe
from infctx.training.activation_memory import ACTIVATION_SHARE
from infctx.training.boundary_store import DEVICE_SHARE, HOST_SHARE, BoundaryPlan
from infctx.training.cache_place import bytes_with_gradient
from infctx.training.precision import Precision

# Documents whose time is told.
DOCUMENT_TOKENS = (65_536, 1_048_576, 10_485_760)
# Of the document whose boundary states are counted, where nothing is said.
USUAL_DOCUMENT_TOKENS = 131_072
_STAYS = ("frozen weights", "trained weights", "averaged weights", "gradients", "optimizer moments")


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
    target: Target = Target(),  # noqa: B008 (frozen)
    *,
    document_tokens: int | None = None,
) -> RecipePlan:
    """Predict memory, disk and time of a run.

    Args:
        config: of the model.
        target: what it runs on; its room decides what the recipe leaves to auto.
        document_tokens: of the longest document; None = data.pack_tokens, or 131,072.
    Raises:
        RecipeError: the adapter does not fit the model, or the ranks do not fit the recipe.
    """
    return Planner(recipe, config, target).plan(document_tokens)


class Planner:
    """Plans of one recipe and model for several lengths of document.

    Args:
        model: as `planned_model` makes it, where there is one already.
    """

    def __init__(self, recipe: Recipe, config: FinchConfig, target: Target, *, model: Finch | None = None) -> None:
        self.recipe, self.config, self.target = recipe.resolved(), config, target
        self.spread = _checked(spread_of(self.recipe, ranks=target.ranks))
        self.precision = planned_precision(self.recipe, target.kind)
        self.model = model or planned_model(self.recipe, config, precision=self.precision)
        self._memory_of: dict[ChunkPlan, MemoryPlan] = {}
        section = self.recipe.optimizer
        self._optimizer = OptimizerPlan(
            name=section.name,
            is_averaged=section.ema_decay is not None,
            is_fused=None if section.fused == "auto" else section.fused,
        )

    def plan(self, document_tokens: int | None = None) -> RecipePlan:
        """See `plan_recipe`."""
        tokens = document_tokens or self.recipe.data.pack_tokens or USUAL_DOCUMENT_TOKENS
        chunk = _chunk_plan(self.recipe, tokens)
        if self.config.n_attention:
            chunk = replace(chunk, cache=_cache_plan(self.recipe, tokens))
        chunk = self._placed(chunk)
        memory, memory_again = self._memory(chunk), None
        if not chunk.is_recomputed:
            again = replace(chunk, is_recomputed=True)
            memory_again = self._memory(again)
            # Whoever divides weights recomputes, as a run does.
            divides = self.recipe.run.strategy in SHARDING
            if self.recipe.bptt.activations == "auto" and (divides or self._recomputes(chunk, memory)):
                chunk, memory, memory_again = again, memory_again, None
        groups = self.recipe.run.accumulate
        # A stream's step begins in the middle of a document, on average.
        cached_before = tokens_cached(self.recipe, tokens)[0] // 2
        step_time = self.time_of(self._step_tokens(tokens), chunk, cached_before=cached_before)
        step_time = replace(
            step_time,
            computing_seconds=groups * step_time.computing_seconds,
            waiting_seconds=groups * step_time.waiting_seconds,
            documents=groups * step_time.documents,
        )
        steps = self.recipe.run.steps
        return RecipePlan(
            config=self.config,
            num_parameters=self._num_parameters,
            num_trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            precision=self.precision,
            spread=self.spread,
            chunk=chunk,
            document_tokens=tokens,
            memory=memory,
            memory_if_recomputed=memory_again,
            disk=disk_bytes(self.recipe, self.model, chunk, one_state=memory.one_state, spread=self.spread),
            target=replace(self.target, ranks=self.spread.ranks),
            times={length: self.time_of(length, chunk) for length in DOCUMENT_TOKENS},
            step_time=step_time,
            step_tokens=self._step_tokens(tokens),
            run_seconds=None if steps is None else steps * step_time.seconds,
        )

    def time_of(self, document_tokens: int, chunk: ChunkPlan, *, cached_before: int = 0) -> TimePlan:
        """Of a document of this length, or of a part of one, for each row and group of ranks.

        Args:
            cached_before: tokens before the part, which layers with attention see.
        """
        work = _work(self.recipe, chunk, document_tokens, cached_before=cached_before)
        return plan_time(self.model, work, spread=self.spread, machine=self.target.machine, flops=self._flops)

    @functools.cached_property
    def _flops(self) -> Flops:
        return flops_per_token(self.model)

    @functools.cached_property
    def _num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Finch(self.config).parameters())

    def _step_tokens(self, document_tokens: int) -> int:
        """Of a row in a step: a stream takes a window of chunks."""
        bptt = self.recipe.bptt
        if self.recipe.data.mode == "stream" and bptt.window != "document":
            return bptt.window * bptt.chunk_tokens
        return document_tokens

    def _memory(self, chunk: ChunkPlan) -> MemoryPlan:
        # All but the boundary states is the same for every length.
        alike = replace(chunk, boundary_states=1, boundaries="device")
        if alike not in self._memory_of:
            self._memory_of[alike] = plan_memory(
                self.model, alike, spread=self.spread, optimizer=self._optimizer, device=self.target.kind
            )
        return with_boundaries(self._memory_of[alike], chunk, self.target.kind)

    def _placed(self, chunk: ChunkPlan) -> ChunkPlan:
        """The same with boundary states, and the cache of layers with attention, where a run would put them."""
        room, kind = self.target.room, self.target.kind
        if kind == "cuda" and room.device is not None and self.config.n_attention:
            cached = bytes_with_gradient(self.config, rows=chunk.rows, num_tokens=chunk.cache.window_tokens)
            chunk = replace(chunk, cache=replace(chunk.cache, on_host=cached > DEVICE_SHARE * room.device))
        if room.device is None or self.recipe.bptt.boundaries != "auto":
            return chunk
        config, sharers = self.config, min(self.spread.ranks, self.spread.devices_per_node)
        numbers = config.n_recurrent * config.dim_att * config.head_size + 2 * config.n_layer * config.n_embd
        needed = chunk.boundary_states * chunk.rows * numbers * 4
        host = room.device if kind == "cpu" else room.host
        if kind == "cuda" and needed <= DEVICE_SHARE * room.device:
            return chunk
        if host is None or needed <= HOST_SHARE * host / sharers:
            return replace(chunk, boundaries="device" if kind == "cpu" else "host")
        return replace(chunk, boundaries="disk")

    def _recomputes(self, chunk: ChunkPlan, memory: MemoryPlan) -> bool:
        """Whether a run would recompute layers, by its own rule."""
        room, model = self.target.room.device, self.model
        if self.spread.shards_parameters:
            return True
        if room is None:
            return False
        hidden_bytes = 2 if model.compute_dtype is not None and model.compute_dtype.itemsize == 2 else 4
        per_token = activation_bytes_per_token(model, hidden_bytes=hidden_bytes, device=self.target.kind)
        stays = sum(memory.device.get(part, 0) for part in (*_STAYS, "runtime"))
        return per_token.kept * chunk.tokens_at_once(self.spread) > ACTIVATION_SHARE * max(0, room - stays)


def planned_precision(recipe: Recipe, kind: Device) -> Precision:
    """What run.precision comes to on this kind of device."""
    if recipe.run.precision == "auto":
        return "bf16" if kind == "cuda" else "fp32"
    return recipe.run.precision


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


def _cache_plan(recipe: Recipe, document_tokens: int) -> CachePlan:
    """Of a row; a stream's rows carry theirs from step to step, before it and behind it."""
    before, behind = tokens_cached(recipe, document_tokens)
    waiting = recipe.run.accumulate * (before + behind) - behind if before else 0
    return CachePlan(window_tokens=behind, kept_tokens=behind + waiting)


def tokens_cached(recipe: Recipe, document_tokens: int) -> tuple[int, int]:
    """Of a row: carried into a step, at most, and there behind its last chunk.

    Args:
        document_tokens: of the longest document, or the longest row that several are packed into.
    """
    bptt = recipe.bptt
    if recipe.data.mode == "stream" and bptt.window != "document":
        return document_tokens, document_tokens + bptt.window * bptt.chunk_tokens
    return 0, document_tokens


def _work(recipe: Recipe, chunk: ChunkPlan, document_tokens: int, *, cached_before: int) -> Work:
    return Work(
        document_tokens=document_tokens,
        chunk_tokens=recipe.bptt.chunk_tokens,
        rows=chunk.rows,
        window=None if recipe.bptt.window == "document" else recipe.bptt.window,
        is_thinned=recipe.bptt.thin_boundaries,
        is_recomputed=chunk.is_recomputed,
        cached_before=cached_before,
    )
