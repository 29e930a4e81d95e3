"""A model file on disk -> its tensors, or a model; sizes, version and layout are read from the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infctx.checkpoint.layouts.catalog import to_official
from infctx.checkpoint.layouts.rows import check_names
from infctx.checkpoint.switches import find_switches, with_switches
from infctx.checkpoint.weights import TOKENIZER_KEY, read_stored
from infctx.errors import CheckpointError
from infctx.model import finch_keys
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.quantized_linear import QuantizedLinear
from infctx.model.tensors import ModelTensors, StoredTensor

# Enough of every tensor to tell two models apart, little enough to take no time at 14 B parameters.
FINGERPRINT_VALUES = 64


class ModelFile(NamedTuple):
    """What a file holds. tokenizer: its name, where the file records it. fingerprint: tells other weights apart."""

    model: Finch
    tokenizer: str | None
    fingerprint: str


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Finch:
    """Read a Finch, Eagle, Finch-C2, GoldFinch or GPTAlpha model.

    Args:
        path: an official .pth, our .safetensors, a GGUF file, or a folder in a Hugging Face layout (that of the RWKV
            models there, or flash-linear-attention's).
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
    """`load_model` and what else the file says; dtype None = as stored, mapped from the file where that is possible."""
    opened = open_model(path)
    return ModelFile(build_model(opened, dtype=dtype, device=device), opened.tokenizer, fingerprint(opened))


def open_model(path: str | Path, *, is_streamed: bool = False) -> ModelTensors:
    """The tensors of a model file of any layout, under official names, none of them read yet.

    Args:
        is_streamed: reading a tensor gives a copy and leaves no memory behind, for one pass over a large file.
    Raises:
        CheckpointError: names the file, the tensor, what was expected and what was found.
    """
    stored, metadata = read_stored(path, is_streamed=is_streamed)
    tensors = to_official(stored, metadata, file=str(path))
    switches = find_switches(Path(path), metadata)
    config = with_switches(finch_keys.read_config(tensors, file=str(path), head_size=switches.head_size), switches)
    return ModelTensors(
        config=config,
        tensors=_in_official_form(config, tensors, file=str(path)),
        tokenizer=metadata.get(TOKENIZER_KEY),
        origin=str(path),
    )


def build_model(
    source: ModelTensors, *, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Finch:
    """A model of these tensors, in evaluation mode; dtype None = as stored."""
    starts = finch_keys.start_parameters(source.tensors)
    with torch.device("meta"):
        model = Finch(source.config, **starts)
    for row in finch_keys.key_rows(source.config, **starts):
        shape = model.get_parameter(row.ours).shape
        tensor = finch_keys.from_official(row, source.tensors[row.official].read(), shape, file=source.origin)
        owner, _, last = row.ours.rpartition(".")
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype).contiguous()
        setattr(model.get_submodule(owner), last, nn.Parameter(tensor))
    return model.eval()


def tensors_of(model: Finch, *, tokenizer: str | None = None, origin: str = "the model") -> ModelTensors:
    """A model's parameters as a stream of tensors, sharing memory where possible."""
    stored = {name: StoredTensor.of(tensor) for name, tensor in official_tensors(model).items()}
    return ModelTensors(config=model.config, tensors=stored, tokenizer=tokenizer, origin=origin)


def official_tensors(model: Finch) -> dict[str, Tensor]:
    """The model's parameters under official names and in official shapes and order, sharing memory where possible.

    Vectors that stand for the token before a document's first, which only this project reads, are among them.
    """
    rows = finch_keys.key_rows(
        model.config, has_initial_state=model.has_initial_state, has_initial_shifts=model.has_initial_shifts
    )
    return {row.official: finch_keys.to_official(row, _values(model, row.ours)) for row in rows}


def _values(model: Finch, name: str) -> Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    # What is stored in such a layer are codes.
    return owner.dequantized() if isinstance(owner, QuantizedLinear) else model.get_parameter(name).detach()


def fingerprint(source: ModelTensors) -> str:
    """Tells other weights apart, from a part of each tensor's values; the same in every layout."""
    digest = hashlib.sha256()
    for name in sorted(source.tensors):
        stored = source.tensors[name]
        values = stored.read().reshape(-1)
        spread = values[:: max(1, values.numel() // FINGERPRINT_VALUES)]
        digest.update(f"{name} {list(stored.shape)}".encode())
        digest.update(spread.double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _in_official_form(
    config: FinchConfig, tensors: Mapping[str, StoredTensor], *, file: str
) -> dict[str, StoredTensor]:
    """Every tensor that belongs to the model and no other, in official order; squeezed ones in official shape."""
    starts = finch_keys.start_parameters(tensors)
    with torch.device("meta"):
        model = Finch(config, **starts)
    rows = list(finch_keys.key_rows(config, **starts))
    check_names({row.official for row in rows}, set(tensors), file=file, what="this architecture")
    formed: dict[str, StoredTensor] = {}
    for row in rows:
        stored = tensors[row.official]
        if not stored.dtype.is_floating_point:
            raise CheckpointError(f"{file}: tensor {row.official}: expected a float dtype, found {stored.dtype}.")
        ours = model.get_parameter(row.ours)
        without_values = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        finch_keys.from_official(row, without_values, ours.shape, file=file)
        expected = finch_keys.to_official(row, ours).shape
        formed[row.official] = (
            stored if stored.shape == tuple(expected) else stored.map(lambda x, shape=expected: x.reshape(shape))
        )
    return formed
