"""Folders of safetensors: one file where it fits, else shards of bounded size and an index.

Source of the names and of the index: the Hugging Face libraries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from infctx.checkpoint.safetensors_file import write_safetensors
from infctx.model.tensors import StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = "model-*-of-*.safetensors"
# What the Hub and its libraries cut at.
SHARD_BYTES = 5_000_000_000


def write_shards(
    folder: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors into a folder that exists, in their order, at most `shard_bytes` of numbers in a file.

    A tensor larger than that has a shard of its own.
    """
    shards: list[dict[str, StoredTensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.num_bytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.num_bytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, shards[0], metadata)
        return
    shard_of = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        shard_of.update(dict.fromkeys(shard, file))
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
