"""The number types of GGUF files: how many bytes they take, and how their tensors become torch's.

Source of the codes and block sizes: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.errors import CheckpointError


class GgufType(NamedTuple):
    """One type: rows are cut into blocks of `block_elements`, which take `block_bytes` each."""

    name: str
    block_elements: int
    block_bytes: int
    dtype: torch.dtype | None = None

    def num_bytes(self, num_elements: int) -> int:
        """Bytes of a tensor whose rows are whole blocks."""
        return num_elements // self.block_elements * self.block_bytes


# dtype: of the types that torch has, too; the others are quantised.
TYPES = {
    0: GgufType("F32", 1, 4, torch.float32),
    1: GgufType("F16", 1, 2, torch.float16),
    2: GgufType("Q4_0", 32, 18),
    3: GgufType("Q4_1", 32, 20),
    6: GgufType("Q5_0", 32, 22),
    7: GgufType("Q5_1", 32, 24),
    8: GgufType("Q8_0", 32, 34),
    9: GgufType("Q8_1", 32, 40),
    10: GgufType("Q2_K", 256, 84),
    11: GgufType("Q3_K", 256, 110),
    12: GgufType("Q4_K", 256, 144),
    13: GgufType("Q5_K", 256, 176),
    14: GgufType("Q6_K", 256, 210),
    15: GgufType("Q8_K", 256, 292),
    16: GgufType("IQ2_XXS", 256, 66),
    17: GgufType("IQ2_XS", 256, 74),
    18: GgufType("IQ3_XXS", 256, 98),
    19: GgufType("IQ1_S", 256, 50),
    20: GgufType("IQ4_NL", 32, 18),
    21: GgufType("IQ3_S", 256, 110),
    22: GgufType("IQ2_S", 256, 82),
    23: GgufType("IQ4_XS", 256, 136),
    24: GgufType("I8", 1, 1, torch.int8),
    25: GgufType("I16", 1, 2, torch.int16),
    26: GgufType("I32", 1, 4, torch.int32),
    27: GgufType("I64", 1, 8, torch.int64),
    28: GgufType("F64", 1, 8, torch.float64),
    29: GgufType("IQ1_M", 256, 56),
    30: GgufType("BF16", 1, 2, torch.bfloat16),
    34: GgufType("TQ1_0", 256, 54),
    35: GgufType("TQ2_0", 256, 66),
    39: GgufType("MXFP4", 32, 17),
}


def import_gguf(*, needed_for: str) -> ModuleType:
    """The gguf package.

    Args: needed_for: a file and what of it, for the message.
    Raises: CheckpointError with the command that installs it.
    """
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{needed_for} needs the gguf package. Run: pip install 'infctx[gguf]'") from error


def dequantiser(kind: GgufType, *, needed_for: str) -> Callable[[Tensor], Tensor]:
    """What turns the bytes of a quantised tensor, uint8 [blocks, block_bytes], into float32 [blocks, block_elements].

    Raises: CheckpointError if the gguf package is needed and missing, or does not know the type.
    """
    if kind.name == "Q8_0":
        return dequantise_q8_0
    gguf = import_gguf(needed_for=needed_for)
    code = getattr(gguf.GGMLQuantizationType, kind.name, None)
    try:
        gguf.quants.dequantize(torch.zeros(1, kind.block_bytes, dtype=torch.uint8).numpy(), code)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{needed_for}: the installed gguf package cannot turn {kind.name} into numbers. "
            "Give a file of F32, F16, BF16, Q8_0 or another usual type."
        ) from error
    return lambda blocks: torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), code))


def dequantise_q8_0(blocks: Tensor) -> Tensor:
    """Q8_0: a block is a float16 scale and 32 signed bytes."""
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(scales)
