"""The official layout: one file of all tensors under official names, as .pth or as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch

from infctx.checkpoint.model_file import TOKENIZER_KEY, official_tensors
from infctx.checkpoint.weights import write_pth, write_safetensors
from infctx.errors import CheckpointError
from infctx.model.finch import Finch


def write_official_pth(model: Finch, path: Path, *, dtype: torch.dtype, tokenizer: str | None) -> None:
    """A .pth as the official trainer writes it; the format has no place for the tokenizer's name.

    Raises:
        CheckpointError: the model has tuned vectors for the token before a document's first, which no runtime reads.
    """
    shifts = {name for name, value in model.named_parameters() if name.endswith("initial_shift") and bool(value.any())}
    if shifts:
        raise CheckpointError(
            f"{path}: the model has {len(shifts)} tuned token-shift start vectors (adapter.initial_shifts), first "
            f"{min(shifts)}. A .pth has no place for them and no runtime reads them; without them it would be another "
            "model. Write it as safetensors, which infctx reads, or train without adapter.initial_shifts."
        )
    tensors = official_tensors(model, with_initial_shifts=False)
    write_pth(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def write_official_safetensors(model: Finch, path: Path, *, dtype: torch.dtype, tokenizer: str | None) -> None:
    """The same tensors as safetensors, with the tokenizer's name in the metadata."""
    metadata = {"format": "pt", "infctx.version": model.config.version}
    if tokenizer is not None:
        metadata[TOKENIZER_KEY] = tokenizer
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in official_tensors(model).items()}
    write_safetensors(path, tensors, metadata)
