"""The official names and shapes: as a .pth, as one safetensors file, or as a folder of safetensors shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from infctx.checkpoint.model_file import TOKENIZER_KEY
from infctx.checkpoint.shards import write_shards
from infctx.checkpoint.switches import remove_switches, switches_as_metadata, write_switches_beside
from infctx.checkpoint.weights import write_pth, write_safetensors
from infctx.errors import CheckpointError
from infctx.export.options import ExportOptions, in_dtype
from infctx.model import finch_keys
from infctx.model.tensors import ModelTensors


def prepare_pth(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """The tensors a .pth will hold.

    Raises:
        CheckpointError: the model has tuned vectors for the token before a document's first, which no runtime reads.
    """
    shifts = [name for name in source.tensors if finch_keys.is_initial_shift(name)]
    if any(bool(source.tensors[name].read().any()) for name in shifts):
        raise CheckpointError(
            f"{source.origin}: the model has {len(shifts)} tuned token-shift start vectors (adapter.initial_shifts), "
            f"first {shifts[0]}. A .pth has no place for them and no runtime reads them; without them it would be "
            "another model. Write it as safetensors, which infctx reads, or train without adapter.initial_shifts."
        )
    # Zeros are what every runtime begins with.
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in shifts}
    return in_dtype(replace(source, tensors=tensors), options.dtype, format="pth")


def write_official_pth(source: ModelTensors, path: Path, options: ExportOptions) -> list[str]:
    """A .pth as the official trainer writes it; the format has no place for the tokenizer's name or for switches."""
    write_switches_beside(path, source.config)
    write_pth(path, source.tensors)
    return []


def prepare_safetensors(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """The tensors a safetensors file will hold."""
    return in_dtype(source, options.dtype, format="safetensors")


def write_official_safetensors(source: ModelTensors, path: Path, options: ExportOptions) -> list[str]:
    """The same tensors as safetensors, with the tokenizer's name in the metadata; a folder that exists gets shards."""
    metadata = {"format": "pt", "infctx.version": source.config.version, **switches_as_metadata(source.config)}
    if source.tokenizer is not None:
        metadata[TOKENIZER_KEY] = source.tokenizer
    if path.is_dir():
        write_shards(path, source.tensors, metadata, shard_bytes=options.shard_bytes)
    else:
        # Of the model that was there: it would be believed before the metadata.
        remove_switches(path)
        write_safetensors(path, source.tensors, metadata)
    return []
