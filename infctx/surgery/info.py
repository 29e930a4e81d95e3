"""What a model is: sizes, counts by part and dtype, values that are no numbers."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from infctx.errors import CheckpointError
from infctx.model.config import BlockKind, FinchConfig
from infctx.model.finch_keys import TOKEN_CAT_ROWS, has_initial_state
from infctx.model.init import new_config
from infctx.model.tensors import ModelTensors, StoredTensor

# Name, version, layers, channels, parameters without a tuned state. All have a World vocabulary and heads of 64.
RELEASED = (
    ("Finch 1.6B", "6", 24, 2048, 1_599_873_024),
    ("Finch 3B", "6", 32, 2560, 3_099_863_040),
    ("Finch 7B", "6", 32, 4096, 7_635_746_816),
    ("Finch 14B", "6", 61, 4096, 14_069_088_256),
    ("Eagle 0.1B", "5.2", 12, 768, 192_807_936),
    ("Eagle 0.4B", "5.2", 24, 1024, 461_721_600),
    ("Eagle 1.5B", "5.2", 24, 2048, 1_577_754_624),
    ("Eagle 3B", "5.2", 32, 2560, 3_062_999_040),
    ("Eagle 7B", "5.2", 32, 4096, 7_518_044_160),
)
_WORLD_ROWS = 65536
_KIND_NAMES: dict[BlockKind, str] = {
    "5.2": "Eagle",
    "6": "Finch",
    "6c2": "Finch-C2",
    "gold": "GOLD (attention)",
    "gptalpha": "GPTAlpha (attention)",
}


class BadTensor(NamedTuple):
    """A tensor with values that are no finite numbers."""

    name: str
    num_nan: int
    num_infinite: int


def model_facts(source: ModelTensors) -> dict[str, object]:
    """Sizes and counts of a model; no tensor is read.

    Returns: the fields of FinchConfig, and "parameters", "parts" (parameters by part), "bytes" (by dtype), "dtypes",
    "released" (the released model of these sizes, or None), "tokenizer", "initial_state" (whether one was tuned),
    "layers" (their kinds in words); of a model with attention "cache_bytes_per_token", and what a transformer of the
    same sizes would cache, "transformer_cache_bytes_per_token", both in the dtype of the embedding.
    """
    num_bytes: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for name, stored in source.tensors.items():
        num_bytes[dtype_name(stored.dtype)] += stored.num_bytes
        parts[_part_of(name)] += stored.num_elements
    return {
        **dataclasses.asdict(source.config),
        "parameters": source.num_parameters,
        "released": released_name(source.config),
        "parts": dict(parts),
        "dtypes": sorted(num_bytes),
        "bytes": dict(sorted(num_bytes.items())),
        "tokenizer": source.tokenizer,
        "initial_state": has_initial_state(source.tensors),
        "layers": layers_in_words(source.config),
        **_cache_facts(source.config, source.tensors["emb.weight"].dtype),
    }


def layers_in_words(config: FinchConfig) -> str:
    """As "1 to 5: Finch; 6: GOLD"."""
    kinds = [config.kind(layer) for layer in range(config.n_layer)]
    spans = []
    for kind in config.kinds:
        first = kinds.index(kind) + 1
        last = first + kinds.count(kind) - 1
        spans.append(f"{first} to {last}: {_KIND_NAMES[kind]}" if last > first else f"{first}: {_KIND_NAMES[kind]}")
    return "; ".join(spans)


def _cache_facts(config: FinchConfig, dtype: torch.dtype) -> dict[str, object]:
    """What is kept of every token, and what keys and values in every layer would take."""
    if not config.n_attention:
        return {}
    return {
        # The id of a token takes 4 bytes.
        "cache_bytes_per_token": 4 + config.cache_width * dtype.itemsize,
        "transformer_cache_bytes_per_token": 2 * config.n_layer * config.dim_att * dtype.itemsize,
    }


def released_name(config: FinchConfig) -> str | None:
    """The released model that has these sizes, perhaps but for the number of layers or ids; None if none has."""
    for name, version, n_layer, n_embd, _ in RELEASED:
        theirs = new_config(version=version, n_layer=n_layer, n_embd=n_embd, vocab_size=_WORLD_ROWS)
        if dataclasses.replace(config, vocab_size=theirs.vocab_size) == theirs:
            return name if config.vocab_size == theirs.vocab_size else f"{name} with another vocabulary"
    return None


def tensor_table(source: ModelTensors, pattern: str = "*") -> list[dict[str, object]]:
    """Name, shape and dtype of every tensor whose name matches a pattern with *, ? and [].

    Raises:
        CheckpointError: no name matches.
    """
    rows = [
        {"name": name, "shape": list(stored.shape), "dtype": dtype_name(stored.dtype)}
        for name, stored in source.tensors.items()
        if fnmatch.fnmatchcase(name, pattern)
    ]
    if not rows:
        raise CheckpointError(f"{source.origin}: no tensor matches {pattern!r}. Quoted, '*' shows the names of all.")
    return rows


def find_bad_tensors(source: ModelTensors, tell: Callable[[str], None] = lambda name: None) -> Iterator[BadTensor]:
    """Read every tensor once and give those that hold a NaN or an infinity. tell: called with each name before."""
    for name, stored in source.tensors.items():
        tell(name)
        if (bad := _examined(name, stored)) is not None:
            yield bad


def dtype_name(dtype: torch.dtype) -> str:
    """As "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _examined(name: str, stored: StoredTensor) -> BadTensor | None:
    values = stored.read().reshape(-1)
    num_nan = num_infinite = 0
    # In blocks: masks of a whole embedding would take as much memory again.
    for block in values.split(1 << 22):
        if not bool(torch.isfinite(block).all()):
            num_nan += int(torch.isnan(block).sum())
            num_infinite += int(torch.isinf(block).sum())
    return BadTensor(name, num_nan, num_infinite) if num_nan or num_infinite else None


def _part_of(name: str) -> str:
    if name == "emb.weight":
        return "embedding"
    if name == "head.weight":
        return "head"
    if name.endswith(".att.time_state"):
        return "tuned state"
    if any(name == row.official for row in TOKEN_CAT_ROWS):
        return "cache"
    if ".att." in name:
        return "time mix"
    return "channel mix" if ".ffn." in name else "norms"
