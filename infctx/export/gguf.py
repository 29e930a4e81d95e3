"""GGUF, the format of llama.cpp and what is built on it.

The gguf package writes the header; the tensors are ours to write, one at a time. Source of names and metadata: the
conversion script and the model loader of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from infctx.checkpoint.atomic import write_file_atomically
from infctx.checkpoint.gguf_reader import DEFAULT_ALIGNMENT
from infctx.checkpoint.gguf_types import TYPES, GgufType, dequantise_q8_0, import_gguf
from infctx.checkpoint.layouts.gguf import (
    ARCHITECTURE,
    LAYER_NORM_KEY,
    RESCALE_KEY,
    SIZE_KEYS,
    TOKEN_SHIFT_KEY,
    TOKEN_SHIFTS,
    gguf_rows,
    is_matrix,
)
from infctx.checkpoint.layouts.rows import to_layout
from infctx.checkpoint.raw_bytes import raw_bytes
from infctx.errors import CheckpointError
from infctx.export.as_finch import as_finch
from infctx.export.gguf_vocabulary import vocabulary_metadata
from infctx.export.options import ExportOptions
from infctx.model.finch_keys import start_parameters
from infctx.model.tensors import ModelTensors, StoredTensor

GgufDtype = torch.dtype | Literal["q8_0"]

# A recurrent model has none; llama.cpp wants a number.
CONTEXT_TOKENS = 1 << 20
# Converted and written at once, so that a large matrix is never there twice.
BLOCK_ELEMENTS = 1 << 20

_CODES = {kind.name: code for code, kind in TYPES.items()}
_TYPE_OF_DTYPE: dict[GgufDtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    "q8_0": "Q8_0",
}
# llama.cpp's numbers for files of mostly one type, and for the present form of its quantised ones.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_QUANTISATION_VERSION = 2


def prepare_gguf(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """The tensors the file will hold, in official form; an Eagle becomes the Finch that computes the same.

    Quantised matrices are float32 here: what is read back of them is not what is written.
    """
    finch = as_finch(source)
    dtype = _stored_dtype(finch) if options.dtype is None else options.dtype
    matrix_dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    matrices = {name for row in gguf_rows(finch.config) if is_matrix(row.theirs) for name in row.official}
    tensors = {
        name: tensor.to(matrix_dtype if name in matrices else torch.float32) for name, tensor in finch.tensors.items()
    }
    return replace(finch, tensors=tensors)


def write_prepared_gguf(source: ModelTensors, path: Path, options: ExportOptions) -> list[str]:
    """`write_gguf` of what `prepare_gguf` gave."""
    return write_gguf(source, path, dtype=_stored_dtype(source) if options.dtype is None else options.dtype)


def as_read_back(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """What a file of `prepare_gguf`'s tensors is read as: of quantised matrices, the values their codes stand for."""
    if options.dtype != "q8_0":
        return source
    gguf = import_gguf(needed_for="writing GGUF")
    tensors = dict(source.tensors)
    for row in gguf_rows(source.config):
        if is_matrix(row.theirs):
            (name,) = row.official
            tensors[name] = _through_codes(tensors[name], _kind(row.theirs, tensors[name], "q8_0"), gguf)
    return replace(source, tensors=tensors)


def _through_codes(stored: StoredTensor, kind: GgufType, gguf: ModuleType) -> StoredTensor:
    def read() -> Tensor:
        tensor = stored.read()
        if kind.dtype is not None:
            return tensor.to(kind.dtype).float()
        rows = tensor.split(max(1, BLOCK_ELEMENTS // tensor.shape[-1]))
        pieces = [bytearray(_encoded(gguf, piece, kind, where="a matrix")) for piece in rows]
        codes = [torch.frombuffer(piece, dtype=torch.uint8).view(-1, kind.block_bytes) for piece in pieces]
        return torch.cat([dequantise_q8_0(blocks).view(-1, tensor.shape[-1]) for blocks in codes])

    return StoredTensor(stored.shape, torch.float32, read)


def _stored_dtype(source: ModelTensors) -> torch.dtype:
    """That of the embedding, for all matrices; GGUF has no wider type than float32."""
    dtype = source.tensors["emb.weight"].dtype
    return dtype if dtype in _TYPE_OF_DTYPE else torch.float32


def write_gguf(source: ModelTensors, path: Path, *, dtype: GgufDtype) -> list[str]:
    """Write a Finch, whole or not at all; an existing file is replaced.

    Args:
        dtype: float32, float16, bfloat16 or "q8_0", of the matrices. Vectors and low-rank pairs are always float32, as
            llama.cpp wants them.
    Returns:
        What the user should know: sentences about the tokenizer, and about matrices of another type.
    Raises:
        CheckpointError: GGUF has no place for this model; a value that the type cannot hold; the gguf package is
            missing. OSError: the disk is full or fails. Then an existing file is untouched.
    """
    gguf = import_gguf(needed_for=f"{path}: writing GGUF")
    _check_model(source, path, dtype)
    tensors = to_layout(gguf_rows(source.config), source.tensors)
    kinds = {name: _kind(name, tensor, dtype) for name, tensor in tensors.items()}
    vocabulary, notes = vocabulary_metadata(source)
    metadata = _metadata(source, path, dtype) | vocabulary

    def write(unfinished: Path) -> None:
        _write_header(gguf, unfinished, metadata, tensors, kinds)
        with unfinished.open("ab") as file:
            for name, tensor in tensors.items():
                _pad(file)
                _write_tensor(file, tensor.read(), kinds[name], gguf=gguf, where=f"{path}: tensor {name}")
            _pad(file)

    write_file_atomically(path, write)
    odd = [name for name, kind in kinds.items() if dtype == "q8_0" and kind.name == "F16"]
    if odd:
        notes.append(
            f"{len(odd)} matrices, first {odd[0]}, are stored as F16: Q8_0 takes rows of whole blocks of "
            f"{TYPES[_CODES['Q8_0']].block_elements} numbers."
        )
    return notes


def _check_model(source: ModelTensors, path: Path, dtype: GgufDtype) -> None:
    config = source.config
    if dtype not in _TYPE_OF_DTYPE:
        raise CheckpointError(f"{path}: dtype {dtype}: expected float32, float16, bfloat16 or q8_0 for GGUF.")
    if config.version != "6":
        raise CheckpointError(
            f"{path}: GGUF has no architecture for version {config.version} models ({source.origin}). "
            "Make it a Finch first, which computes the same: infctx model upgrade."
        )
    if any(start_parameters(source.tensors).values()):
        raise CheckpointError(
            f"{path}: {source.origin} has a tuned initial state, for which GGUF has no place. "
            "Export to pth or safetensors, which keep it."
        )
    if config.dim_att != config.n_embd:
        raise CheckpointError(
            f"{path}: {source.origin} has {config.n_head} heads of {config.head_size} at width {config.n_embd}; GGUF "
            "takes only models whose heads fill the width. Export to pth or safetensors."
        )


def _kind(name: str, tensor: StoredTensor, dtype: GgufDtype) -> GgufType:
    """The type of a tensor in the file; a row that is not whole blocks of Q8_0 is kept in F16, nearest in precision."""
    kind = TYPES[_CODES[_TYPE_OF_DTYPE[dtype] if is_matrix(name) else "F32"]]
    return kind if tensor.shape[-1] % kind.block_elements == 0 else TYPES[_CODES["F16"]]


def _metadata(source: ModelTensors, path: Path, dtype: GgufDtype) -> dict[str, object]:
    config = source.config
    sizes = {key: getattr(config, size) for key, size in SIZE_KEYS.items()}
    numbers: dict[str, object] = {
        f"{ARCHITECTURE}.context_length": CONTEXT_TOKENS,
        # Asked for and not used.
        f"{ARCHITECTURE}.attention.head_count": 0,
        LAYER_NORM_KEY: config.layer_norm_eps,
        RESCALE_KEY: 0,
        TOKEN_SHIFT_KEY: TOKEN_SHIFTS,
        "general.file_type": _FILE_TYPES[_TYPE_OF_DTYPE[dtype]],
        "general.quantization_version": _QUANTISATION_VERSION,
    }
    return {"general.name": path.stem, "general.type": "model", **sizes, **numbers}


def _write_header(
    gguf: ModuleType,
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, StoredTensor],
    kinds: Mapping[str, GgufType],
) -> None:
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        kind = kinds[name]
        code = gguf.GGMLQuantizationType[kind.name]
        # The dtype counts only where no code is given.
        writer.add_tensor_info(name, tensor.shape, None, kind.num_bytes(tensor.num_elements), raw_dtype=code)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_tensor(file: BinaryIO, tensor: Tensor, kind: GgufType, *, gguf: ModuleType, where: str) -> None:
    """In pieces of whole rows. By itself, so that nothing holds the tensor while the next one is read."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows_at_once = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), rows_at_once):
        file.write(_encoded(gguf, rows[start : start + rows_at_once], kind, where=where))


def _encoded(gguf: ModuleType, block: Tensor, kind: GgufType, *, where: str) -> memoryview:
    """The bytes of a piece, after a look whether the type holds every value."""
    # The scale of a block of Q8_0, a float16, is its largest value over 127.
    held = block.to(kind.dtype) if kind.dtype is not None else (block.float().abs().amax(dim=1) / 127).half()
    if not bool(torch.isfinite(held).all()):
        raise CheckpointError(
            f"{where}: {kind.name} cannot hold its largest value, {float(block.float().abs().max()):.4g}. "
            "Nothing was written. Use bf16 or fp32, or look whether the weights are damaged."
        )
    if kind.dtype is not None:
        return raw_bytes(held)
    code = gguf.GGMLQuantizationType[kind.name]
    return raw_bytes(torch.from_numpy(gguf.quants.quantize(block.float().numpy(), code)))


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))
