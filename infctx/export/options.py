"""What may be asked of an export, and the tensors it will hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from infctx.checkpoint.shards import SHARD_BYTES
from infctx.errors import CheckpointError
from infctx.model import finch_keys
from infctx.model.tensors import ModelTensors

Q8_0 = "q8_0"
ExportDtype = torch.dtype | Literal["q8_0"] | None
DTYPES: dict[str, ExportDtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    Q8_0: Q8_0,
    "keep": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """dtype: of the file's tensors; None = as they are. shard_bytes: most of one file of a folder. code: a folder with
    the model code that a Hugging Face folder carries along."""

    dtype: ExportDtype = torch.bfloat16
    shard_bytes: int = SHARD_BYTES
    code: Path | None = None


def in_dtype(source: ModelTensors, dtype: ExportDtype, *, format: str) -> ModelTensors:
    """Every tensor in one dtype.

    Raises: CheckpointError for a dtype that only GGUF has.
    """
    if dtype is None:
        return source
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"dtype {dtype}: {format} does not know it; only gguf does. Give fp32, fp16 or bf16.")
    return replace(source, tensors={name: tensor.to(dtype) for name, tensor in source.tensors.items()})


def refuse_initial_state(source: ModelTensors, *, format: str) -> None:
    """Refuse what the format has no place for.

    Raises: CheckpointError if the model starts its documents from a tuned state.
    """
    if any(finch_keys.start_parameters(source.tensors).values()):
        raise CheckpointError(
            f"{source.origin}: the model has a tuned initial state, and the {format} format has no place for one. "
            "Export it as pth or safetensors."
        )
