"""The official names and shapes: as a .pth, as one safetensors file, or as a folder of safetensors shards."""

from __future__ import annotations

from pathlib import Path

from infctx.checkpoint.model_file import TOKENIZER_KEY
from infctx.checkpoint.shards import write_shards
from infctx.checkpoint.weights import write_pth, write_safetensors
from infctx.export.options import ExportOptions, in_dtype
from infctx.model.tensors import ModelTensors


def prepare_pth(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """The tensors a .pth will hold."""
    return in_dtype(source, options.dtype, format="pth")


def write_official_pth(source: ModelTensors, path: Path, options: ExportOptions) -> list[str]:
    """A .pth as the official trainer writes it; the format has no place for the tokenizer's name."""
    write_pth(path, source.tensors)
    return []


def prepare_safetensors(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """The tensors a safetensors file will hold."""
    return in_dtype(source, options.dtype, format="safetensors")


def write_official_safetensors(source: ModelTensors, path: Path, options: ExportOptions) -> list[str]:
    """The same tensors as safetensors, with the tokenizer's name in the metadata; a folder that exists gets shards."""
    metadata = {"format": "pt", "infctx.version": source.config.version}
    if source.tokenizer is not None:
        metadata[TOKENIZER_KEY] = source.tokenizer
    if path.is_dir():
        write_shards(path, source.tensors, metadata, shard_bytes=options.shard_bytes)
    else:
        write_safetensors(path, source.tensors, metadata)
    return []
