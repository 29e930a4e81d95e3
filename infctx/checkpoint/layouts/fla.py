"""The layout of flash-linear-attention's RWKV6ForCausalLM (Finch only).

Its low-rank pairs are stored the other way round, and its five mixes in another order. Its group norm has the epsilon
of the other norms, 1e-5, where RWKV has 64e-5. The values are linear in what is normed, so values divided by 8 give the
same numbers with the smaller epsilon, and division by 8 rounds nothing: what we write says so in its metadata. Folders
of others hold the values as they are. Source: fla/models/rwkv6 and fla/layers/rwkv6 of that project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from infctx.checkpoint.layouts.rows import LayoutRow, norm_rows, one_to_one, transposed_row, vector_row
from infctx.model.config import FinchConfig
from infctx.model.tensors import StoredTensor

LAYOUT = "flash-linear-attention"
_LAYERS = "model.layers."
# Official order of the mixes is decay, key, value, receptance, gate; there receptance comes first.
_TO_THEIRS = [3, 0, 1, 2, 4]
_TO_OFFICIAL = [1, 2, 3, 0, 4]
_MIXES = ("r", "w", "k", "v", "g")
# The metadata key of what the values are multiplied by, and what we write.
VALUE_SCALE_KEY = "infctx.fla_value_scale"
VALUE_SCALE = 0.125


def is_fla(names: Mapping[str, StoredTensor]) -> bool:
    """Whether these are the names of this layout."""
    return any(name.startswith(_LAYERS) and name.endswith("attn.x_bias") for name in names)


def fla_num_layers(names: Mapping[str, StoredTensor]) -> int:
    """Number of layers, from the names."""
    return len({name.split(".")[2] for name in names if name.startswith(_LAYERS)})


def fla_rows(config: FinchConfig, *, value_scale: float) -> list[LayoutRow]:
    """Every tensor of a Finch. value_scale: what the values are multiplied by there."""
    return list(_rows(config, value_scale))


def _rows(config: FinchConfig, value_scale: float) -> Iterator[LayoutRow]:
    yield one_to_one("model.embeddings.weight", "emb.weight")
    for i in range(config.n_layer):
        theirs, official = f"{_LAYERS}{i}", f"blocks.{i}"
        if i == 0:
            yield from norm_rows(f"{theirs}.pre_norm", f"{official}.ln0")
        yield from norm_rows(f"{theirs}.attn_norm", f"{official}.ln1")
        yield from _time_mix(f"{theirs}.attn", f"{official}.att", value_scale)
        yield from norm_rows(f"{theirs}.ffn_norm", f"{official}.ln2")
        yield from _channel_mix(f"{theirs}.ffn", f"{official}.ffn")
    yield from norm_rows("model.norm", "ln_out")
    yield one_to_one("lm_head.weight", "head.weight")


def _time_mix(theirs: str, official: str, value_scale: float) -> Iterator[LayoutRow]:
    yield vector_row(f"{theirs}.x_proj.0.mu", f"{official}.time_maa_x")
    yield one_to_one(
        f"{theirs}.x_proj.0.linear.weight",
        f"{official}.time_maa_w1",
        write=lambda x: _regrouped(x, _TO_THEIRS).t(),
        read=lambda x: _regrouped(x.t(), _TO_OFFICIAL),
    )
    yield one_to_one(
        f"{theirs}.x_proj.2.weight",
        f"{official}.time_maa_w2",
        write=lambda x: x[_TO_THEIRS].flatten(0, 1).t(),
        read=lambda x: x.t().unflatten(0, (5, -1))[_TO_OFFICIAL],
    )
    yield LayoutRow(
        f"{theirs}.x_bias",
        tuple(f"{official}.time_maa_{mix}" for mix in _MIXES),
        lambda tensors: torch.stack([tensor.reshape(-1) for tensor in tensors]),
        lambda tensor: list(tensor.unbind(0)),
    )
    for short, long in (("r", "receptance"), ("k", "key"), ("g", "gate")):
        yield one_to_one(f"{theirs}.{short}_proj.linear.weight", f"{official}.{long}.weight")
    yield one_to_one(
        f"{theirs}.v_proj.linear.weight",
        f"{official}.value.weight",
        write=lambda x: x * value_scale,
        read=lambda x: x / value_scale,
    )
    yield transposed_row(f"{theirs}.w_proj.linear.lora.0.weight", f"{official}.time_decay_w1")
    yield transposed_row(f"{theirs}.w_proj.linear.lora.2.weight", f"{official}.time_decay_w2")
    yield vector_row(f"{theirs}.w_proj.linear.lora.2.bias", f"{official}.time_decay")
    yield one_to_one(f"{theirs}.bonus", f"{official}.time_faaaa")
    yield from norm_rows(f"{theirs}.g_norm", f"{official}.ln_x")
    yield one_to_one(f"{theirs}.o_proj.weight", f"{official}.output.weight")


def _channel_mix(theirs: str, official: str) -> Iterator[LayoutRow]:
    for name, mix in (("key", "k"), ("receptance", "r")):
        yield one_to_one(f"{theirs}.{name}.linear.weight", f"{official}.{name}.weight")
        yield vector_row(f"{theirs}.{name}.mu", f"{official}.time_maa_{mix}")
    yield one_to_one(f"{theirs}.value.weight", f"{official}.value.weight")


def _regrouped(x: Tensor, order: list[int]) -> Tensor:
    """[C, 5·D] with its five groups of columns in another order."""
    return x.unflatten(1, (5, -1))[:, order].flatten(1)
