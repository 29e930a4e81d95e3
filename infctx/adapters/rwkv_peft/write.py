"""Write adapters as RWKV-PEFT's files hold them; see `read.py` for the names."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from infctx.adapters.model_changes import ModelChanges
from infctx.adapters.peft_folder.contents import OTHER_BAT
from infctx.adapters.weight_updates import LowRank, SharedRows, TileProduct
from infctx.errors import CheckpointError
from infctx.model.finch_keys import BLOCK_MATRICES, is_initial_shift, is_time_state

_WHY_NOT = {
    "dora": "RWKV-PEFT's files have no place for DoRA's magnitudes. Merge it with infctx export.",
    "miss_bat": OTHER_BAT + ".",
    "miss_mini": "RWKV-PEFT's DiSHA has rows of full width. Merge it with infctx export.",
    "parameters": "it holds whole tensors alone; RWKV-PEFT's files hold them beside a LoRA or DiSHA.",
}


class RwkvPeftFile(NamedTuple):
    """kind: as the file's reader will see it. alpha: what its readers have to be told; None where it means nothing."""

    kind: str
    tensors: dict[str, Tensor]
    alpha: float | None


def to_rwkv_peft(changes: ModelChanges, *, file: str) -> RwkvPeftFile:
    """The tensors of a file that changes a model in the same way.

    A PiSSA becomes a plain LoRA of twice the rank. Where alpha / rank cannot say a LoRA's scale with a whole alpha, as
    for rsLoRA, the scale is folded into lora_B.
    Args: file: what the changes are from, for messages.
    Raises: CheckpointError for what the format cannot hold, with the reason.
    """
    if changes.kind in _WHY_NOT:
        raise CheckpointError(f"{file}: an adapter of kind {changes.kind} cannot be written: {_WHY_NOT[changes.kind]}")
    for name in changes.updates:
        if name.split(".", 2)[-1] not in BLOCK_MATRICES:
            raise CheckpointError(
                f"{file}: the adapter on {name} cannot be written: RWKV-PEFT has them in the blocks only, on "
                f"{', '.join(BLOCK_MATRICES)}. Merge it with infctx export."
            )
    whole = {name: tensor.contiguous() for name, tensor in changes.replaced.items() if not is_initial_shift(name)}
    shifts = [name for name in changes.replaced if is_initial_shift(name) and bool(changes.replaced[name].any())]
    if shifts:
        raise CheckpointError(
            f"{file}: {shifts[0]}, a tuned start of the token shift, cannot be written: no other program reads it. "
            "Train without adapter.initial_shifts."
        )
    if changes.kind == "state":
        assert all(map(is_time_state, whole))
        return RwkvPeftFile("state", whole, None)
    low_rank = {name: update.plain() for name, update in changes.updates.items() if isinstance(update, LowRank)}
    if not low_rank:
        others = {f"{name}.disha": _disha(update) for name, update in changes.updates.items()}
        return RwkvPeftFile(changes.kind, {**others, **whole}, None)
    assert low_rank.keys() == changes.updates.keys()
    common = _common_alpha(list(low_rank.values()))
    alpha = float(max(update.rank for update in low_rank.values())) if common is None else common
    tensors = {}
    for name, update in low_rank.items():
        assert update.scale is not None
        up = update.up * (update.scale * update.rank / alpha) if common is None else update.up
        tensors[f"{name}.lora_A"] = update.down.contiguous()
        tensors[f"{name}.lora_B"] = up.contiguous()
    return RwkvPeftFile("lora", {**tensors, **whole}, alpha)


def _disha(update: object) -> Tensor:
    assert isinstance(update, SharedRows | TileProduct)
    return (update.rows if isinstance(update, SharedRows) else update.tiles).contiguous()


def _common_alpha(updates: list[LowRank]) -> float | None:
    """The whole number that is alpha of every matrix, if there is one: what people can type exactly."""
    assert all(update.scale is not None for update in updates)
    alphas = [update.scale * update.rank for update in updates if update.scale is not None]
    whole = float(round(alphas[0]))
    # scale is alpha / rank, rounded.
    return whole if whole > 0 and all(math.isclose(alpha, whole, rel_tol=1e-14) for alpha in alphas) else None
