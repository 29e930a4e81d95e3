"""From a model to one of a later architecture, by as many steps as it takes."""

from __future__ import annotations

from infctx.errors import CheckpointError
from infctx.model.tensors import ModelTensors
from infctx.surgery.to_finch_c2 import upgrade_to_finch_c2
from infctx.surgery.to_goldfinch import UPGRADE_RATIO, upgrade_to_goldfinch
from infctx.surgery.upgrade import upgrade_to_finch

TARGETS = ("finch", "finch-c2", "goldfinch")


def upgrade(
    source: ModelTensors,
    *,
    to: str,
    lerp_rank: int | None = None,
    decay_rank: int | None = None,
    ratio: int | None = None,
    layers: str | None = None,
    seed: int = 0,
) -> ModelTensors:
    """A model of another architecture with the weights of an older one; an Eagle is made a Finch first.

    Args:
        to: a name of TARGETS.
        lerp_rank, decay_rank: of an Eagle, see `upgrade_to_finch`.
        ratio, layers: of a GoldFinch, see `upgrade_to_goldfinch`; None = 6, and "keep".
        seed: of the random values.
    Raises:
        CheckpointError: an unknown target, an argument that goes with another one, or a source it cannot be made of.
    """
    if to not in TARGETS:
        raise CheckpointError(f"--to {to}: expected one of {', '.join(TARGETS)}.")
    if to != "goldfinch" and (ratio is not None or layers is not None):
        raise CheckpointError(f"--ratio and --layers: expected with --to goldfinch only, found --to {to}.")
    is_eagle = source.config.version == "5.2"
    if not is_eagle and to != "finch" and (lerp_rank is not None or decay_rank is not None):
        raise CheckpointError(
            f"--lerp-rank and --decay-rank: expected with an Eagle only, which has no such ranks; {source.origin} is a "
            f"{source.config.name}. infctx model grow widens those of a Finch."
        )
    if to == "finch" or is_eagle:
        source = upgrade_to_finch(source, lerp_rank=lerp_rank, decay_rank=decay_rank, seed=seed)
    if to == "finch-c2":
        return upgrade_to_finch_c2(source, seed=seed)
    if to == "goldfinch":
        ratio = UPGRADE_RATIO if ratio is None else ratio
        return upgrade_to_goldfinch(source, ratio=ratio, layers=layers or "keep", seed=seed)
    return source
