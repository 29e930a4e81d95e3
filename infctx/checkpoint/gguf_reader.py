"""Read GGUF files, the format of llama.cpp, versions 2 and 3: the tensors stay on disk until they are asked for.

Nothing a header says is believed before it is compared with the size of the file. Source of the format: docs/gguf.md of
the ggml project.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from infctx.checkpoint.gguf_types import TYPES, GgufType, dequantiser
from infctx.checkpoint.mapped_memory import map_file, streamed
from infctx.data.tokenizer import TOKENIZER_OF_VOCAB_SIZE
from infctx.errors import CheckpointError
from infctx.model.tensors import StoredTensor

MAGIC = b"GGUF"
ARCHITECTURE_KEY = "general.architecture"
VERSIONS = (2, 3)
# Far above what any model has, low enough to walk through in well under a second and a few MB.
MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 8192
MAX_KEYS = 4096
MAX_ARRAY_STRINGS = 1 << 20
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
# A longer text is passed over: no size and no name is one.
MAX_KEPT_TEXT_BYTES = 4096
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT_KEY, _SPLIT_KEY = "general.alignment", "split.count"
_TOKENIZER_KEY, _TOKENS_KEY = "tokenizer.ggml.model", "tokenizer.ggml.tokens"
# What the shortest key with its value, and the shortest description of a tensor, take.
_LEAST_KEY_BYTES, _LEAST_TENSOR_BYTES = 13, 33


class SkippedArray(NamedTuple):
    """Stands for an array of the metadata, which is passed over."""

    length: int


GgufValue = str | int | float | bool | SkippedArray


def read_gguf(path: Path, *, is_streamed: bool = False) -> tuple[dict[str, StoredTensor], dict[str, GgufValue]]:
    """Read the header of one file.

    Args:
        is_streamed: reading a tensor gives a copy and leaves no memory behind.
    Returns:
        The tensors under the file's names, their axes in torch's order (the reverse of the file's). F32, F16, BF16, F64
        and integers are mapped from the file; quantised ones become float32 when read. And the metadata, without long
        texts and the contents of arrays.
    Raises:
        CheckpointError: anything but a whole little-endian GGUF file, with the reason in one line; a quantised type for
            which the gguf package is missing.
    """
    data = map_file(path, expected="a GGUF file")
    header = _Header(data, path)
    num_tensors, num_keys = _read_start(header)
    metadata: dict[str, GgufValue] = {}
    for _ in range(num_keys):
        key = header.text(MAX_NAME_BYTES, "a key")
        if key in metadata:
            raise header.damaged(f"the key {key!r} is given twice")
        metadata[key] = _read_value(header, key)
    if ARCHITECTURE_KEY not in metadata:
        raise header.damaged(f"it has no {ARCHITECTURE_KEY}")
    infos = [_read_info(header) for _ in range(num_tensors)]
    alignment = _alignment(header, metadata)
    start = -(-header.position // alignment) * alignment
    _check_places(header, infos, start, alignment)
    if metadata.get(_SPLIT_KEY, 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: is one of {metadata[_SPLIT_KEY]} parts of a model. Join them with llama-gguf-split --merge."
        )
    return {info.name: _stored(data, info, start, path, is_streamed=is_streamed) for info in infos}, metadata


def tokenizer_of_vocabulary(metadata: Mapping[str, GgufValue]) -> str | None:
    """The name of the tokenizer whose vocabulary a file carries, as far as its kind and size tell."""
    tokens = metadata.get(_TOKENS_KEY)
    if metadata.get(_TOKENIZER_KEY) != "rwkv" or not isinstance(tokens, SkippedArray):
        return None
    return TOKENIZER_OF_VOCAB_SIZE.get(tokens.length)


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: GgufType
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Header:
    """A place in the header that moves forward and never leaves the file."""

    data: mmap.mmap
    path: Path
    position: int = 0
    num_array_strings: int = 0

    def take(self, num_bytes: int, what: str) -> int:
        """Move on; gives where the bytes start."""
        start, end = self.position, min(len(self.data), MAX_HEADER_BYTES)
        if num_bytes > end - start:
            if end < len(self.data):
                raise self.refused(f"{what} of {num_bytes} bytes; a header of at most {MAX_HEADER_BYTES} is read")
            raise CheckpointError(
                f"{self.path}: truncated: {what} needs {num_bytes} bytes at byte {start}; the file has {end}. "
                "Fetch the file again."
            )
        self.position = start + num_bytes
        return start

    def number(self, form: str, what: str) -> int:
        """One number in struct's notation."""
        form = f"<{form}"
        value: int = struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))[0]
        return value

    def text(self, max_bytes: int, what: str) -> str:
        """A text and its length in front of it."""
        length = self.number("Q", what)
        if length > max_bytes:
            raise self.refused(f"{what} of {length} bytes; at most {max_bytes} are read")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged: {what[:300]}. Fetch the file again.")

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: refused: {what[:300]}. No model file needs that; it is damaged.")


def _read_start(header: _Header) -> tuple[int, int]:
    """Numbers of tensors and of keys."""
    magic = header.data[:4]
    if magic != MAGIC:
        raise CheckpointError(
            f"{header.path}: not a GGUF file, or damaged: it starts with {magic!r}; expected {MAGIC!r}."
        )
    header.take(4, "the magic")
    version = header.number("I", "the version")
    if version not in VERSIONS:
        is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        kind = "a big-endian file" if is_swapped else f"version {version}"
        raise CheckpointError(
            f"{header.path}: GGUF of {kind}; expected a little-endian file of version {VERSIONS[0]} or {VERSIONS[1]}. "
            "Convert the model again with a current tool."
        )
    num_tensors, num_keys = header.number("Q", "a count"), header.number("Q", "a count")
    left = len(header.data) - header.position
    for count, most, least_bytes, what in (
        (num_tensors, MAX_TENSORS, _LEAST_TENSOR_BYTES, "tensors"),
        (num_keys, MAX_KEYS, _LEAST_KEY_BYTES, "keys of metadata"),
    ):
        if count > most:
            raise header.refused(f"{count} {what}; at most {most} are read")
        if count * least_bytes > left:
            raise CheckpointError(
                f"{header.path}: truncated: {count} {what} do not fit into the {len(header.data)} bytes of the file. "
                "Fetch the file again."
            )
    return num_tensors, num_keys


def _read_value(header: _Header, key: str) -> GgufValue:
    what = f"the value of {key!r}"
    code = header.number("I", what)
    if code in _SCALARS:
        return header.number(_SCALARS[code], what)
    if code == _STRING:
        return _short_text(header, what)
    if code != _ARRAY:
        raise header.damaged(f"{what} has the unknown type {code}")
    code, length = header.number("I", what), header.number("Q", what)
    if code in _SCALARS:
        header.take(length * struct.calcsize("<" + _SCALARS[code]), what)
    elif code == _STRING:
        _skip_strings(header, length, what)
    else:
        raise header.damaged(f"{what} is an array of the unknown or nested type {code}")
    return SkippedArray(length)


def _short_text(header: _Header, what: str) -> str:
    """A text, or "" in place of a long one."""
    length = header.number("Q", what)
    if length > MAX_KEPT_TEXT_BYTES:
        header.take(length, what)
        return ""
    header.position -= 8
    return header.text(MAX_KEPT_TEXT_BYTES, what)


def _skip_strings(header: _Header, length: int, what: str) -> None:
    header.num_array_strings += length
    if header.num_array_strings > MAX_ARRAY_STRINGS:
        raise header.refused(f"{what} has {length} texts; at most {MAX_ARRAY_STRINGS} are read")
    data, position, unpack = header.data, header.position, struct.Struct("<Q").unpack_from
    last = min(len(data), MAX_HEADER_BYTES) - 8
    for _ in range(length):
        if position > last:
            break
        position += 8 + unpack(data, position)[0]
    else:
        header.take(position - header.position, what)
        return
    # Broken off inside: the message of a text that does not fit.
    header.take(position + 8 - header.position, what)


def _read_info(header: _Header) -> _Info:
    name = header.text(MAX_NAME_BYTES, "a tensor's name")
    num_dimensions = header.number("I", f"tensor {name!r}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise header.damaged(f"tensor {name!r} has {num_dimensions} axes; expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(header.number("Q", f"tensor {name!r}") for _ in range(num_dimensions))[::-1]
    code, offset = header.number("I", f"tensor {name!r}"), header.number("Q", f"tensor {name!r}")
    if code not in TYPES:
        raise header.damaged(f"tensor {name!r} has the unknown type {code}")
    kind = TYPES[code]
    num_elements = 1
    for length in shape:
        num_elements *= length
    if num_elements == 0 or shape[-1] % kind.block_elements:
        raise header.damaged(
            f"tensor {name!r}: shape {list(shape)} has no elements, or rows that are not whole blocks of {kind.name}"
        )
    return _Info(name, shape, kind, offset, kind.num_bytes(num_elements))


def _alignment(header: _Header, metadata: dict[str, GgufValue]) -> int:
    alignment = metadata.get(_ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    is_power_of_two = type(alignment) is int and 8 <= alignment <= MAX_ALIGNMENT and not alignment & (alignment - 1)
    if not is_power_of_two:
        raise header.damaged(f"{_ALIGNMENT_KEY} is {alignment!r}; expected a power of two from 8 to {MAX_ALIGNMENT}")
    assert type(alignment) is int
    return alignment


def _check_places(header: _Header, infos: list[_Info], start: int, alignment: int) -> None:
    """Every tensor is inside the file, at a multiple of the alignment, and by itself."""
    if len({info.name for info in infos}) != len(infos):
        names = sorted(info.name for info in infos)
        twice = next(left for left, right in pairwise(names) if left == right)
        raise header.damaged(f"the tensor {twice!r} is given twice")
    ordered = sorted(infos, key=lambda info: info.offset)
    for info in ordered:
        if info.offset % alignment:
            raise header.damaged(f"tensor {info.name!r} starts at {info.offset}, no multiple of {alignment}")
        if start + info.offset + info.num_bytes > len(header.data):
            raise CheckpointError(
                f"{header.path}: truncated or damaged: tensor {info.name[:80]!r} of shape {list(info.shape)} ends at "
                f"byte {start + info.offset + info.num_bytes}; the file has {len(header.data)}. Fetch the file again."
            )
    for left, right in pairwise(ordered):
        if left.offset + left.num_bytes > right.offset:
            raise header.damaged(f"the tensors {left.name[:80]!r} and {right.name[:80]!r} overlap")


def _stored(data: mmap.mmap, info: _Info, start: int, path: Path, *, is_streamed: bool) -> StoredTensor:
    wrap = streamed if is_streamed else StoredTensor.of
    dtype = info.kind.dtype or torch.uint8
    count = info.num_bytes // dtype.itemsize
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + info.offset)
    if info.kind.dtype is not None:
        return wrap(flat.view(info.shape))
    blocks = wrap(flat.view(-1, info.kind.block_bytes))
    dequantise = dequantiser(info.kind, needed_for=f"{path}: tensor {info.name} of type {info.kind.name}")
    return StoredTensor(info.shape, torch.float32, lambda: dequantise(blocks.read()).view(info.shape))
