"""The layout of GGUF files of the architecture "rwkv6", which llama.cpp runs (Finch only).

Low-rank pairs lie the other way round there, and five of the mixes are one tensor. Source: the conversion script and
the model loader of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from infctx.checkpoint.layouts.rows import LayoutRow, from_layout, norm_rows, one_to_one, transposed_row, vector_row
from infctx.errors import CheckpointError
from infctx.model.config import FinchConfig
from infctx.model.finch_keys import read_config
from infctx.model.tensors import StoredTensor

LAYOUT = "GGUF"
ARCHITECTURE = "rwkv6"
ARCHITECTURE_KEY = "general.architecture"
RESCALE_KEY = f"{ARCHITECTURE}.rescale_every_n_layers"
LAYER_NORM_KEY = f"{ARCHITECTURE}.attention.layer_norm_epsilon"
TOKEN_SHIFT_KEY = f"{ARCHITECTURE}.token_shift_count"
# Metadata that repeats sizes of the tensors -> the size.
SIZE_KEYS = {
    f"{ARCHITECTURE}.embedding_length": "n_embd",
    f"{ARCHITECTURE}.block_count": "n_layer",
    f"{ARCHITECTURE}.feed_forward_length": "dim_ffn",
    f"{ARCHITECTURE}.wkv.head_size": "head_size",
    f"{ARCHITECTURE}.time_mix_extra_dim": "lerp_rank",
    f"{ARCHITECTURE}.time_decay_extra_dim": "decay_rank",
    f"{ARCHITECTURE}.vocab_size": "vocab_size",
}
# The attention and the feed-forward half, each with the token before.
TOKEN_SHIFTS = 2
# The largest Finch has 61 layers, files halve every 6; float32 must hold what is doubled as often.
MAX_HALVINGS = 64

_LAYERS = "blk."
_LEAST_TENSORS_A_LAYER = 24
_FUSED = "time_mix_lerp_fused.weight"
_MIXES = ("w", "k", "v", "r", "g")
_ATTENTION = ("receptance", "key", "value", "output", "gate")
_FEED_FORWARD = ("key", "receptance", "value")


def is_gguf(names: Mapping[str, StoredTensor]) -> bool:
    """Whether these are the names of this layout."""
    return any(name.startswith(_LAYERS) for name in names)


def is_matrix(name: str) -> bool:
    """Whether llama.cpp takes this tensor in another type than float32."""
    if name in ("token_embd.weight", "output.weight"):
        return True
    last = name.rpartition(".weight")[0].rpartition(".")[2]
    return last in {f"time_mix_{x}" for x in _ATTENTION} | {f"channel_mix_{x}" for x in _FEED_FORWARD}


def gguf_rows(config: FinchConfig) -> list[LayoutRow]:
    """Every tensor of a Finch, as files are written: five mixes in one tensor, nothing rescaled."""
    return list(_rows(config.n_layer, is_fused=True, layers_a_halving=0))


def from_gguf(stored: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, file: str) -> dict[str, StoredTensor]:
    """The tensors under official names, in float32 where halvings had to be undone.

    Raises:
        CheckpointError: another architecture, by its name; a tensor that is missing, unknown or of an impossible shape;
            metadata that says other than the tensors, or what no Finch has.
    """
    architecture = metadata.get(ARCHITECTURE_KEY)
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{file}: this is a GGUF file of the architecture {architecture!r}; expected {ARCHITECTURE!r}. "
            "Of GGUF files, infctx reads RWKV-6 (Finch) models."
        )
    layers = {name.split(".")[1] for name in stored if name.startswith(_LAYERS)}
    # More than there are tensors for would only be a longer list of what is missing.
    num_layers = min(len(layers), len(stored) // _LEAST_TENSORS_A_LAYER + 1)
    layers_a_halving = _integer(metadata, RESCALE_KEY, 0, file=file)
    if layers_a_halving < 0 or num_layers > MAX_HALVINGS * layers_a_halving > 0:
        raise CheckpointError(
            f"{file}: {RESCALE_KEY} is {layers_a_halving} in a model of {num_layers} layers; expected 0, or a number "
            f"that divides them into at most {MAX_HALVINGS} groups. The file is damaged."
        )
    is_fused = not any(name.endswith("time_mix_lerp_w.weight") for name in stored)
    rows = list(_rows(num_layers, is_fused=is_fused, layers_a_halving=layers_a_halving))
    official = from_layout(rows, stored, file=file, layout=LAYOUT)
    _check_metadata(metadata, read_config(official, file=file), file=file)
    return official


def _check_metadata(metadata: Mapping[str, str], config: FinchConfig, *, file: str) -> None:
    for key, size in SIZE_KEYS.items():
        found = getattr(config, size)
        if _integer(metadata, key, found, file=file) != found:
            raise CheckpointError(
                f"{file}: {key} is {metadata[key]}, but the tensors have {size} = {found}. "
                "The file is damaged; convert the model again."
            )
    shifts = _integer(metadata, TOKEN_SHIFT_KEY, TOKEN_SHIFTS, file=file)
    if shifts != TOKEN_SHIFTS:
        raise CheckpointError(f"{file}: {TOKEN_SHIFT_KEY} is {shifts}; expected {TOKEN_SHIFTS}, as every Finch has.")
    epsilon = metadata.get(LAYER_NORM_KEY, str(config.layer_norm_eps))
    # There it is a float32.
    if not _is_number(epsilon) or not abs(float(epsilon) / config.layer_norm_eps - 1) < 1e-6:
        raise CheckpointError(
            f"{file}: {LAYER_NORM_KEY} is {epsilon}; expected {config.layer_norm_eps}, which every Finch has."
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _integer(metadata: Mapping[str, str], key: str, default: int, *, file: str) -> int:
    text = metadata.get(key, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: {key} is {text[:80]!r}; expected a whole number. The file is damaged."
        ) from error


def _rows(n_layer: int, *, is_fused: bool, layers_a_halving: int) -> Iterator[LayoutRow]:
    yield one_to_one("token_embd.weight", "emb.weight")
    yield from norm_rows("token_embd_norm", "blocks.0.ln0")
    for i in range(n_layer):
        theirs, official = f"{_LAYERS}{i}", f"blocks.{i}"
        halvings = i // layers_a_halving if layers_a_halving else 0
        yield from norm_rows(f"{theirs}.attn_norm", f"{official}.ln1")
        yield from norm_rows(f"{theirs}.attn_norm_2", f"{official}.ln2")
        yield from _mixes(theirs, f"{official}.att", is_fused=is_fused)
        yield from _time_mix(theirs, f"{official}.att", halvings)
        yield from _channel_mix(theirs, f"{official}.ffn", halvings)
    yield from norm_rows("output_norm", "ln_out")
    yield one_to_one("output.weight", "head.weight")


def _mixes(theirs: str, official: str, *, is_fused: bool) -> Iterator[LayoutRow]:
    yield vector_row(f"{theirs}.time_mix_lerp_x.weight", f"{official}.time_maa_x")
    names = [f"{official}.time_maa_{mix}" for mix in _MIXES]
    if is_fused:
        yield LayoutRow(
            f"{theirs}.{_FUSED}",
            tuple(names),
            lambda tensors: torch.stack([tensor.reshape(1, 1, -1) for tensor in tensors]),
            _separate,
        )
    else:  # as files were written before 2025
        for mix, name in zip(_MIXES, names, strict=True):
            yield vector_row(f"{theirs}.time_mix_lerp_{mix}.weight", name)
    yield transposed_row(f"{theirs}.time_mix_w1.weight", f"{official}.time_maa_w1")
    yield transposed_row(f"{theirs}.time_mix_w2.weight", f"{official}.time_maa_w2")


def _time_mix(theirs: str, official: str, halvings: int) -> Iterator[LayoutRow]:
    yield one_to_one(f"{theirs}.time_mix_first.weight", f"{official}.time_faaaa")
    yield vector_row(f"{theirs}.time_mix_decay.weight", f"{official}.time_decay")
    yield transposed_row(f"{theirs}.time_mix_decay_w1.weight", f"{official}.time_decay_w1")
    yield transposed_row(f"{theirs}.time_mix_decay_w2.weight", f"{official}.time_decay_w2")
    for name in _ATTENTION:
        times = halvings if name == "output" else 0
        yield _halved(f"{theirs}.time_mix_{name}.weight", f"{official}.{name}.weight", times)
    yield from norm_rows(f"{theirs}.time_mix_ln", f"{official}.ln_x")


def _channel_mix(theirs: str, official: str, halvings: int) -> Iterator[LayoutRow]:
    for mix in ("k", "r"):
        yield vector_row(f"{theirs}.channel_mix_lerp_{mix}.weight", f"{official}.time_maa_{mix}")
    for name in _FEED_FORWARD:
        times = halvings if name == "value" else 0
        yield _halved(f"{theirs}.channel_mix_{name}.weight", f"{official}.{name}.weight", times)


def _separate(fused: Tensor) -> list[Tensor]:
    """The mixes of [5, 1, 1, C]."""
    if fused.shape[0] != len(_MIXES):
        raise ValueError(f"expected {len(_MIXES)} mixes")
    return list(fused.unbind(0))


def _halved(theirs: str, official: str, times: int) -> LayoutRow:
    """A matrix that was divided by 2**times; float16 could not hold what it was before."""
    if times == 0:
        return one_to_one(theirs, official)
    factor = float(2**times)
    return one_to_one(theirs, official, write=lambda x: x.float() / factor, read=lambda x: x.float() * factor)
