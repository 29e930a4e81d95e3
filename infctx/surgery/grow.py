"""More layers, and wider low-rank parts, for a model that is there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.finch_keys import key_rows, start_parameters
from infctx.model.tensors import ModelTensors, StoredTensor, combined
from infctx.surgery.fresh import small_random, zeros

COPY_KINDS = ("interleave", "stack", "scaled")
# A layer adds to the residual stream through these two alone.
_OUTPUTS = ("att.output.weight", "ffn.value.weight")
_MIXES = 5


def grow_depth(
    source: ModelTensors,
    *,
    num_layers: int,
    how: str = "interleave",
    scale: float | None = None,
    layers: Sequence[int] | None = None,
) -> ModelTensors:
    """A deeper model made of copies of its own layers.

    Args:
        num_layers: of the result, more than the source has.
        how: "interleave": copies behind their originals, spread evenly, with the matrices through which a layer adds to
            the residual stream zero: exactly the same function, and those matrices have a gradient at the first step.
            "stack": all layers once more behind all layers, unchanged, as Finch 14B was made of a model of 32:
            another function. Where the copies are more than num_layers, the last layers of the first copy are left
            out, so that the first and the last layer stay what embedding and head know; which three of 64 Finch 14B
            left out is not published.
            "scaled": as interleave, with these matrices times `scale` in the copies.
        scale: for "scaled", above 0 and at most 1.
        layers: the source layer of every layer of the result, instead of the choice above; a layer that comes again is
            a copy. With "interleave" the first ones of each must be all layers in order.
    Raises:
        CheckpointError: an unknown way, a number of layers that is not greater, or a list that cannot be used; a model
            with attention, whose layers of both kinds are in a ratio that copies would change.
    """
    if source.config.n_attention:
        raise CheckpointError(
            f"{source.origin}: expected a model without attention, found a {source.config.name}, of which "
            f"{source.config.n_attention} of {source.config.n_layer} layers attend: layers are not added to it. Grow "
            "the Finch it is made of, then upgrade that: infctx model upgrade --to goldfinch."
        )
    chosen = _source_layers(source, num_layers=num_layers, how=how, layers=layers)
    if (how == "scaled") != (scale is not None) or not 0 < (1.0 if scale is None else scale) <= 1:
        raise CheckpointError(f"scale {scale}: expected a number above 0 and at most 1 for scaled copies, else none.")
    factor = {"interleave": 0.0, "stack": 1.0, "scaled": scale}[how]
    is_copy = [layer in chosen[:place] for place, layer in enumerate(chosen)]
    config = dataclasses.replace(source.config, n_layer=num_layers)
    tensors = {}
    for row in key_rows(config, **start_parameters(source.tensors)):
        name = row.official
        origin = name
        if name.startswith("blocks."):
            _, place, rest = name.split(".", 2)
            # The norm of the embedding is stored with the first layer, whichever layer that is.
            origin = name if rest.startswith("ln0.") else f"blocks.{chosen[int(place)]}.{rest}"
            if is_copy[int(place)] and rest in _OUTPUTS:
                tensors[name] = _scaled(source.tensors[origin], factor)
                continue
        tensors[name] = source.tensors[origin]
    return dataclasses.replace(source, config=config, tensors=tensors)


def is_exact(how: str) -> bool:
    """Whether a model grown in this way computes what it computed."""
    return how == "interleave"


def grow_ranks(
    source: ModelTensors, *, lerp_rank: int | None = None, decay_rank: int | None = None, seed: int = 0
) -> ModelTensors:
    """Wider low-rank parts of the same function: the new columns that begin them are zero, the new rows that end them
    small and random, so that the columns have a gradient at the first step.

    Args:
        source: a Finch or Finch-C2.
        lerp_rank, decay_rank: at least those of the source; None = as they are.
        seed: of the random rows.
    Raises:
        CheckpointError: the source is neither, or a rank would shrink.
    """
    config = source.config
    if config.n_attention:
        raise CheckpointError(
            f"{source.origin}: expected a Finch or a Finch-C2, found a {config.name}, whose ranks stay as they are. "
            "Grow the Finch it is made of, then upgrade that: infctx model upgrade --to goldfinch."
        )
    if config.version not in ("6", "6c2"):
        raise CheckpointError(
            f"{source.origin}: expected a Finch, found version {config.version}, which has no low-rank parts. "
            "Upgrade it first."
        )
    wanted = (lerp_rank or config.lerp_rank, decay_rank or config.decay_rank)
    if wanted[0] < config.lerp_rank or wanted[1] < config.decay_rank:
        raise CheckpointError(
            f"{source.origin}: ranks {wanted[0]} (mixes) and {wanted[1]} (decay): expected at least the "
            f"{config.lerp_rank} and {config.decay_rank} that the model has; they cannot shrink."
        )
    more_lerp, more_decay = wanted[0] - config.lerp_rank, wanted[1] - config.decay_rank
    tensors = dict(source.tensors)
    for layer in range(config.n_layer):
        att = f"blocks.{layer}.att"
        for pair, num_groups, more in (("time_maa", _MIXES, more_lerp), ("time_decay", 1, more_decay)):
            if not more:
                continue
            first, second = f"{att}.{pair}_w1", f"{att}.{pair}_w2"
            tensors[first] = tensors[first].map(lambda x, n=num_groups, more=more: _with_zero_columns(x, n, more))
            tensors[second] = _with_random_rows(tensors[second], more, seed=seed, name=second)
    config = dataclasses.replace(config, lerp_rank=wanted[0], decay_rank=wanted[1])
    return dataclasses.replace(source, config=config, tensors=tensors)


def _source_layers(source: ModelTensors, *, num_layers: int, how: str, layers: Sequence[int] | None) -> list[int]:
    """The source layer of every layer of the result."""
    old = source.config.n_layer
    if how not in COPY_KINDS:
        raise CheckpointError(f"{how!r}: expected one of {', '.join(COPY_KINDS)}.")
    if num_layers <= old:
        raise CheckpointError(f"{source.origin}: {num_layers} layers: expected more than the {old} of the model.")
    if layers is None:
        if how != "stack":
            return [place * old // num_layers for place in range(num_layers)]
        num_copies = -(-num_layers // old)
        left_out = num_copies * old - num_layers
        return [*range(old - left_out), *list(range(old)) * (num_copies - 1)]
    chosen = list(layers)
    if len(chosen) != num_layers or not all(0 <= layer < old for layer in chosen):
        raise CheckpointError(
            f"source layers {chosen}: expected {num_layers} numbers, one for each layer of the result, "
            f"each from 0 to {old - 1}."
        )
    if is_exact(how) and list(dict.fromkeys(chosen)) != list(range(old)):
        raise CheckpointError(
            f"source layers {chosen}: with interleave, the first ones of each must be 0 to {old - 1} in order, so that "
            "the model computes what it computed. Use stack or scaled for another order."
        )
    return chosen


def _scaled(stored: StoredTensor, factor: float | None) -> StoredTensor:
    assert factor is not None
    if factor == 1.0:
        return stored
    return stored.map(lambda x: x * factor) if factor else zeros(stored.shape, stored.dtype)


def _with_zero_columns(matrix: Tensor, num_groups: int, more: int) -> Tensor:
    """[C, groups·D] with `more` columns of zeros at the end of each group: the mixes lie side by side."""
    grouped = matrix.unflatten(1, (num_groups, -1))
    return torch.cat([grouped, grouped.new_zeros(*grouped.shape[:2], more)], dim=2).flatten(1)


def _with_random_rows(stored: StoredTensor, more: int, *, seed: int, name: str) -> StoredTensor:
    """[…, D, C] with `more` small random rows at the end of each group."""
    rows = small_random((*stored.shape[:-2], more, stored.shape[-1]), stored.dtype, seed=seed, name=name)
    return combined([stored, rows], lambda parts: torch.cat(parts, dim=-2))
