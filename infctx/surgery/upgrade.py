"""Eagle -> Finch, the same function: what Finch adds starts at exactly zero, and trains from the first step.

Source: the Eagle and Finch paper. Eagle takes h·mix + before·(1 − mix) for h the token's hidden vector and `before` the
last token's, Finch h + (before − h)·lerp: lerp = 1 − mix. Eagle's decay is Finch's without its low-rank term.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.config import FinchConfig
from infctx.model.finch_keys import key_rows, start_parameters
from infctx.model.init import default_ranks
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.fresh import small_random, zeros

_LERP, _MIX = "time_maa_", "time_mix_"
# Finch's inputs of the low-rank terms have no counterpart in Eagle; any value gives the same function. They are what
# the key's is: a trained mix of the same hidden vector.
_FREE = ("time_maa_x", "time_maa_w")


def upgrade_to_finch(
    source: ModelTensors, *, lerp_rank: int | None = None, decay_rank: int | None = None, seed: int = 0
) -> ModelTensors:
    """The Finch that computes what an Eagle computes.

    Its mixes are one minus Eagle's and stay float32 (float64 in a float64 file) whatever the file's dtype: one minus a
    bf16 number is seldom a bf16 number. The matrix that begins each low-rank term is zero, the one that ends it small
    and random, so that the term is exactly 0 and the first has a gradient at the first step. A tuned state carries
    over.

    Args:
        source: an RWKV-5.2 model.
        lerp_rank, decay_rank: widths of the low-rank terms, at least 1; None = 32 and 64, or 64 and 128 at 4096
            channels, which other programs take for granted.
        seed: of the random matrices.
    Raises:
        CheckpointError: the source is not an Eagle, or a rank is below 1.
    """
    if source.config.version != "5.2":
        raise CheckpointError(
            f"{source.origin}: expected an Eagle (RWKV-5.2) to upgrade, found version {source.config.version}. "
            "A Finch needs no upgrade; its low-rank parts are widened by growing the model."
        )
    usual = default_ranks(source.config.n_embd)
    ranks = (usual[0] if lerp_rank is None else lerp_rank, usual[1] if decay_rank is None else decay_rank)
    if min(ranks) < 1:
        raise CheckpointError(f"ranks {ranks[0]} and {ranks[1]}: expected at least 1 each, or none for the usual ones.")
    config = dataclasses.replace(source.config, version="6", lerp_rank=ranks[0], decay_rank=ranks[1])
    rows = key_rows(config, **start_parameters(source.tensors))
    tensors = {row.official: _finch_tensor(row.official, source, config, seed) for row in rows}
    return dataclasses.replace(source, config=config, tensors=tensors)


def _finch_tensor(name: str, source: ModelTensors, config: FinchConfig, seed: int) -> StoredTensor:
    layer, _, last = name.rpartition(".")
    channels, width = config.n_embd, config.dim_att
    new_shapes = {
        "time_maa_w1": (channels, 5 * config.lerp_rank),
        "time_maa_w2": (5, config.lerp_rank, channels),
        "time_decay_w1": (channels, config.decay_rank),
        "time_decay_w2": (config.decay_rank, width),
    }
    if last in new_shapes:
        dtype = source.tensors[f"{layer}.key.weight"].dtype
        if last.endswith("w1"):
            return zeros(new_shapes[last], dtype)
        return small_random(new_shapes[last], dtype, seed=seed, name=name)
    if last.startswith(_LERP):
        mix = "k" if last in _FREE else last.removeprefix(_LERP)
        return source.tensors[f"{layer}.{_MIX}{mix}"].map(_one_minus)
    if last == "time_decay":
        return source.tensors[name].map(lambda decay: decay.reshape(1, 1, -1))
    return source.tensors[name]


def _one_minus(mix: Tensor) -> Tensor:
    return 1.0 - mix.to(torch.promote_types(mix.dtype, torch.float32))
