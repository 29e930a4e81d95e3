"""Finch -> Finch-C2, which has no gate: not the same function, but weights that train on from where they were.

Source: GoldFinch paper (arXiv 2407.12077), section on Finch-C2. Nothing is scaled to make up for what is lost: it was
measured, and what helps before the first step hurts after sixty; see docs/rework_models.md.
"""

from __future__ import annotations

import dataclasses

from infctx.errors import CheckpointError
from infctx.model.config import FinchConfig
from infctx.model.finch_keys import key_rows, start_parameters
from infctx.model.init import VALUE_RANK
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.fresh import small_random, zeros

# The groups of the mixes in a Finch's low-rank pair, and which of them those of a Finch-C2 begin with: its second value
# is mixed as the first.
_GROUPS = ("decay", "key", "value", "receptance", "gate")
_TAKEN = [_GROUPS.index(name) for name in ("receptance", "key", "value", "decay", "value")]


def upgrade_to_finch_c2(source: ModelTensors, *, seed: int = 0) -> ModelTensors:
    """A Finch-C2 with the weights of a Finch.

    Matrices, mixes, decay, norms and channel mix stay; the groups of the low-rank pair of the mixes change places, and
    the second value is mixed as the first. The gate goes. The norm behind the recurrence is of all channels now instead
    of each head's, and the key is weakened where the decay is slow.

    Args:
        seed: of the random matrix of the second value.
    Raises:
        CheckpointError: the source is not a Finch.
    """
    if source.config.version != "6":
        raise CheckpointError(
            f"{source.origin}: expected a Finch (RWKV-6) to make a Finch-C2 of, found version "
            f"{source.config.version}, {source.config.name}."
        )
    config = dataclasses.replace(source.config, version="6c2", value_rank=VALUE_RANK)
    rows = key_rows(config, **start_parameters(source.tensors))
    tensors = {row.official: _c2_tensor(row.official, source, config, seed) for row in rows}
    return dataclasses.replace(source, config=config, tensors=tensors)


def _c2_tensor(name: str, source: ModelTensors, config: FinchConfig, seed: int) -> StoredTensor:
    att, _, last = name.partition(".att.")
    if not last:
        return source.tensors[name]
    att = f"{att}.att"
    if last == "time_maa_v2":
        return source.tensors[f"{att}.time_maa_v"]
    if last == "time_maa_w1":
        return source.tensors[name].map(lambda down: down.unflatten(1, (5, -1))[:, _TAKEN].flatten(1))
    if last == "time_maa_w2":
        return source.tensors[name].map(lambda up: up[_TAKEN])
    dtype = source.tensors[f"{att}.value.weight"].dtype
    if last == "time_value2_w1":
        return zeros((config.n_embd, config.value_rank), dtype)
    if last == "time_value2_w2":
        return small_random((config.value_rank, config.dim_att), dtype, seed=seed, name=name)
    return source.tensors[name]
