"""What a run writes: checkpoints, the adapter folder, boundary states, by part."""

from __future__ import annotations

import math

from infctx.model.finch import Finch
from infctx.planning.memory import ChunkPlan, OptimizerPlan, moment_bytes_of
from infctx.planning.spread import Spread
from infctx.recipe.schema import Recipe

# Kept in a checkpoint inside a step, beside its boundary states: gradients of states, the state behind the last chunk.
_STATES_UNDER_WAY = 3


def disk_bytes(recipe: Recipe, model: Finch, chunk: ChunkPlan, *, one_state: int, spread: Spread) -> dict[str, int]:
    """Bytes in the run folder when it holds most, by part.

    A checkpoint has the trained weights, their averages if there are any, the optimizer's moments and in a stream the
    rows' states; one written inside a step the gradient and about the square root of the boundary states, too. The new
    one is whole before the oldest goes. Prepared data is not the run's own, and not in it.

    Args:
        recipe: resolved.
        model: with its adapter attached, on the meta device or any other.
        one_state: bytes of one boundary, all rows.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = 4 * sum(p.numel() for p in trained)
    optimizer = OptimizerPlan(name="adamw" if recipe.optimizer.name == "adamw-offloaded" else recipe.optimizer.name)
    checkpoint = weights + moment_bytes_of(trained, Spread(), optimizer, "cpu")
    if recipe.optimizer.ema_decay is not None:
        checkpoint += weights
    one_cache = chunk.cache.vectors(model.config, chunk.rows)
    rows_states = (recipe.run.accumulate * one_state + one_cache) * spread.groups
    if recipe.data.mode == "stream":
        checkpoint += rows_states
    held = 2 * math.isqrt(chunk.boundary_states) + _STATES_UNDER_WAY
    under_way = (
        weights + (held * one_state + chunk.cache.gradient(model.config, chunk.rows)) * spread.ranks + rows_states
    )
    parts = {
        "checkpoints kept": recipe.run.keep_checkpoints * checkpoint,
        "checkpoint being written": checkpoint + under_way,
    }
    if recipe.adapter.kind != "full":
        # Those of a decomposed matrix are saved as a LoRA of twice the rank; and one is there while another is written.
        is_decomposed = recipe.adapter.kind in ("pissa", "olora")
        parts["adapter folder"] = 2 * weights * (2 if is_decomposed else 1) + (weights if is_decomposed else 0)
    if chunk.boundaries == "disk":
        parts["boundary states"] = chunk.boundary_states * one_state * min(spread.ranks, spread.devices_per_node)
    return {part: size for part, size in parts.items() if size}
