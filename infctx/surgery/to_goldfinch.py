"""Finch or Finch-C2 -> GoldFinch: GOLD layers in the place of the last layers, or behind all of them.

Source: GoldFinch paper (arXiv 2407.12077); its code upgrades a Finch with 5 of 6 layers kept as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.block import AttentionBlock
from infctx.model.config import FinchConfig
from infctx.model.finch_keys import KeyRow, is_initial_shift, is_time_state, key_rows, start_parameters, to_official
from infctx.model.gold import TokenCat
from infctx.model.init import (
    attention_sizes,
    initialise_channel_mix_,
    initialise_time_mix_,
    initialise_token_cat_,
)
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.fresh import fresh, generator_for, zeros

# Layers to GOLD layers, as published for a Finch that is there already.
UPGRADE_RATIO = 6
LAYER_CHOICES = ("keep", "add")


def upgrade_to_goldfinch(
    source: ModelTensors, *, ratio: int = UPGRADE_RATIO, layers: str = "keep", seed: int = 0
) -> ModelTensors:
    """A GoldFinch whose layers with a recurrence are those of a Finch or Finch-C2, unchanged.

    Args:
        ratio: layers to layers that attend, at least 2.
        layers: "keep": as many layers as there are; the first floor(L · (ratio - 1) / ratio) stay, the others become
            GOLD, of which norms and channel mix are what they were, and attention begins with an output of zero: what
            the recurrence of these layers did is lost. "add": all layers stay, and behind them come as many GOLD layers
            as the ratio wants, which add nothing yet and train at once: exactly the same function.
        seed: of the random values.
    Raises:
        CheckpointError: another kind of model; sizes that leave no layer with a recurrence, or that GOLD cannot have;
            a tuned initial state of a layer that would go.
    """
    config = _config(source, ratio=ratio, layers=layers)
    num_kept = config.n_recurrent
    lost = [name for name in source.tensors if is_time_state(name) and int(name.split(".")[1]) >= num_kept]
    if lost:
        raise CheckpointError(
            f"{source.origin}: has tuned initial states, also of the layers that become GOLD, which has no recurrence "
            f"to begin with one: {lost[0]}{' and more' if len(lost) > 1 else ''}. Add the GOLD layers behind all "
            "others (--layers add), or start from the model without a tuned state."
        )
    values = _FreshValues(config, seed=seed)
    dtype = source.tensors["blocks.0.att.receptance.weight"].dtype
    tensors = {}
    for row in key_rows(config, **start_parameters(source.tensors)):
        stays = row.official in source.tensors and not _is_of_gold(row.official, num_kept)
        tensors[row.official] = source.tensors[row.official] if stays else values.tensor(row, dtype)
    return dataclasses.replace(source, config=config, tensors=tensors)


def _is_of_gold(name: str, num_kept: int) -> bool:
    """Whether a tensor of this name is of GOLD's own, whatever else may have had the name."""
    if not name.startswith("blocks.") or is_initial_shift(name):
        return False
    _, layer, part, *_ = name.split(".")
    return part == "att" and int(layer) >= num_kept


def _config(source: ModelTensors, *, ratio: int, layers: str) -> FinchConfig:
    """The sizes of the result."""
    config = source.config
    if layers not in LAYER_CHOICES:
        raise CheckpointError(f"layers {layers!r}: expected one of {', '.join(LAYER_CHOICES)}.")
    if config.version not in ("6", "6c2"):
        hint = " It has attention already." if config.n_attention else " Make it a Finch first."
        raise CheckpointError(
            f"{source.origin}: expected a Finch or a Finch-C2 to make a GoldFinch of, found version "
            f"{config.version}, {config.name}.{hint}"
        )
    if config.dim_att != config.n_embd:
        raise CheckpointError(
            f"{source.origin}: has {config.n_head} heads of {config.head_size} at width {config.n_embd}; expected "
            "heads that fill the width: GOLD makes its values of embeddings."
        )
    if ratio < 2:
        raise CheckpointError(f"ratio {ratio}: expected 2 or more layers for each that attends.")
    old = config.n_layer
    # The fewest layers of which the ratio keeps all there are.
    num_layers = old if layers == "keep" else -(-old * ratio // (ratio - 1))
    if num_layers * (ratio - 1) // ratio == 0:
        raise CheckpointError(
            f"{source.origin}: ratio {ratio} would make GOLD of all {old} layers; expected at least one that stays. "
            "Give a larger ratio, or add the GOLD layers behind (--layers add)."
        )
    front: Literal["6", "6c2"] = "6c2" if config.version == "6c2" else "6"
    sizes = attention_sizes("goldfinch", n_layer=num_layers, n_embd=config.n_embd, ratio=ratio)
    return dataclasses.replace(config, version="goldfinch", front=front, n_layer=num_layers, **sizes)


class _FreshValues:
    """Initial values of GOLD layers and of what they share; those of one part are in memory at a time."""

    def __init__(self, config: FinchConfig, *, seed: int) -> None:
        self._config, self._seed = config, seed
        self._part: str | None = None
        self._values: Mapping[str, Tensor] = {}
        with torch.device("meta"):
            self._block, self._token_cat = AttentionBlock(config, "gold"), TokenCat(config)

    def tensor(self, row: KeyRow, dtype: torch.dtype) -> StoredTensor:
        """One of them, in its official shape."""
        prefix, part = _part_of(row.ours)
        name = row.ours.removeprefix(f"{prefix}.")
        if name.endswith("initial_shift"):
            return zeros((self._config.n_embd,), dtype)
        module = self._token_cat if prefix == "token_cat" else self._block
        shape = tuple(to_official(row, module.get_parameter(name)).shape)
        return fresh(shape, dtype, lambda: self._read(prefix, part, name))

    def _read(self, prefix: str, part: str, name: str) -> Tensor:
        if self._part != f"{prefix}.{part}":
            self._part, self._values = None, {}
            self._values, self._part = self._made(prefix, part), f"{prefix}.{part}"
        return self._values[name].detach()

    def _made(self, prefix: str, part: str) -> Mapping[str, Tensor]:
        """All values of a part of a block, or of what the blocks share, under our names."""
        generator = generator_for(self._seed, f"{prefix}.{part}")
        if prefix == "token_cat":
            token_cat = TokenCat(self._config)
            initialise_token_cat_(token_cat, generator)
            return dict(token_cat.named_parameters())
        layer = int(prefix.split(".")[1])
        with torch.device("meta"):
            block = AttentionBlock(self._config, "gold")
        module = getattr(block, part).to_empty(device="cpu")
        for one in module.modules():
            if isinstance(one, torch.nn.LayerNorm):
                one.reset_parameters()
        if part == "time_mix":
            initialise_time_mix_(module, self._config, layer, generator)
        elif part == "channel_mix":
            initialise_channel_mix_(module, self._config, layer, generator)
        return {f"{part}.{name}": parameter for name, parameter in module.named_parameters()}


def _part_of(ours: str) -> tuple[str, str]:
    """ "blocks.3" and "time_mix" of "blocks.3.time_mix.query.weight"."""
    names = ours.split(".")
    return (names[0], names[1]) if names[0] != "blocks" else (".".join(names[:2]), names[2])
