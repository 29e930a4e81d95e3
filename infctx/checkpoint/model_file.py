"""A model file on disk -> a model; sizes and version are read from its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infctx.checkpoint.weights import read_tensors
from infctx.errors import CheckpointError
from infctx.model import finch_keys
from infctx.model.finch import Finch
from infctx.model.quantized_linear import QuantizedLinear

# Key of our safetensors metadata: which tokenizer the model's ids belong to.
TOKENIZER_KEY = "infctx.tokenizer"
# Enough of every tensor to tell two models apart, little enough to take no time at 14 B parameters.
FINGERPRINT_VALUES = 64


class ModelFile(NamedTuple):
    """What a file holds. tokenizer: its name, where the file records it. fingerprint: tells other weights apart."""

    model: Finch
    tokenizer: str | None
    fingerprint: str


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Finch:
    """Read a Finch or Eagle model.

    Args:
        path: an official .pth, our .safetensors, or a folder of safetensors.
        dtype: of the parameters.
        device: where they go.
    Returns:
        A module whose parameters are exactly the file's tensors, in evaluation mode.
    Raises:
        CheckpointError: names the file, the tensor, what was expected and what was found.
    """
    return read_model_file(path, dtype=dtype, device=device).model


def read_model_file(
    path: str | Path, *, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> ModelFile:
    """`load_model` and what else the file says; dtype None = as stored."""
    stored, metadata = read_tensors(path)
    tensors = finch_keys.strip_prefix(stored)
    model = _model_from_tensors(tensors, file=str(path), dtype=dtype, device=torch.device(device))
    return ModelFile(model, metadata.get(TOKENIZER_KEY), _fingerprint(tensors))


def official_tensors(model: Finch) -> dict[str, Tensor]:
    """The model's parameters under official names and in official shapes and order, sharing memory where possible."""
    has_state = model.blocks[0].time_mix.initial_state is not None
    return {
        row.official: finch_keys.to_official(row, _values(model, row.ours))
        for row in finch_keys.key_rows(model.config, has_initial_state=has_state)
    }


def _values(model: Finch, name: str) -> Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    # What is stored in such a layer are codes.
    return owner.dequantized() if isinstance(owner, QuantizedLinear) else model.get_parameter(name).detach()


def _model_from_tensors(
    tensors: Mapping[str, Tensor], *, file: str, dtype: torch.dtype | None, device: torch.device
) -> Finch:
    config = finch_keys.read_config(tensors, file=file)
    has_state = finch_keys.has_initial_state(tensors)
    with torch.device("meta"):
        model = Finch(config, has_initial_state=has_state)
    rows = list(finch_keys.key_rows(config, has_initial_state=has_state))
    _check_keys({row.official for row in rows}, set(tensors), file=file)
    for row in rows:
        expected = model.get_parameter(row.ours).shape
        tensor = finch_keys.from_official(row, tensors[row.official], expected, file=file)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file}: tensor {row.official}: expected a float dtype, found {tensor.dtype}.")
        owner, _, last = row.ours.rpartition(".")
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype).contiguous()
        setattr(model.get_submodule(owner), last, nn.Parameter(tensor))
    return model.eval()


def _check_keys(expected: set[str], found: set[str], *, file: str) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing:
        raise CheckpointError(
            f"{file}: {len(missing)} tensors are missing, first {missing[0]}; the file is incomplete."
        )
    if unexpected:
        raise CheckpointError(
            f"{file}: {len(unexpected)} tensors do not belong to this architecture, first {unexpected[0]}. "
            "Expected exactly a model's own tensors; adapters are loaded on top of a model."
        )


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        values = tensor.flatten()
        spread = values[:: max(1, values.numel() // FINGERPRINT_VALUES)]
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(spread.double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
