"""The frozen matrices that bitsandbytes stores: NF4, and LLM.int8(). The only file that imports it.

Its quantisers, dequantisers and integer product are used; its layers are not. `Linear4bit` repacks its weight in place
the first time it is called without training, on CPUs with bf16 instructions: from then on another function is computed,
rounded to bf16, whose gradient does not reach its input. `Linear8bitLt` computes another function in training than in
validation on a CPU, and keeps the input of every matrix where recomputing layers cannot free it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.errors import RecipeError
from infctx.model.quantized_linear import LARGEST_CODE, ROWS_AT_ONCE, QuantizedLinear

NF4_BLOCK = 64
LARGEST_HALF = torch.finfo(torch.float16).max


@contextlib.contextmanager
def without_its_advice() -> Iterator[None]:
    """Hold back what bitsandbytes says when it is imported, by us or by peft: to install a kernel nobody here uses."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def import_bitsandbytes() -> ModuleType:
    """The library.

    Raises:
        RecipeError: it is not installed, or cannot be imported.
    """
    try:
        with without_its_advice():
            import bitsandbytes
    except ImportError as error:
        raise RecipeError(
            f"model.quantize: this kind needs bitsandbytes, which cannot be imported here ({error}). "
            "Run pip install 'infctx[bitsandbytes]', or use int8, which needs nothing."
        ) from error
    return bitsandbytes


class Nf4Linear(QuantizedLinear):
    """4-bit codes, two to a byte, and a float32 scale for every 64 values in row order: 4.5 bits a weight.

    Source: QLoRA paper, 4-bit NormalFloat; without its double quantisation of the scales, which saves 0.37 bits.
    """

    largest: Tensor
    levels: Tensor

    def __init__(self, num_inputs: int, num_outputs: int, codes: Tensor, *, largest: Tensor, levels: Tensor) -> None:
        super().__init__(num_inputs, num_outputs, codes)
        self.register_buffer("largest", largest)
        self.register_buffer("levels", levels)

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Nf4Linear:
        """The nearest of 16 levels, in units of the largest magnitude of each block."""
        num_outputs, num_inputs = matrix.shape
        functional = import_bitsandbytes().functional
        parts = []
        for rows in matrix.detach().split(ROWS_AT_ONCE):
            # One row of whole blocks: 0.50.2 reads wrong values back from rows of other lengths on CPUs with AVX-512.
            # The last of the rows may have to be filled up; a multiple of 64 rows has none.
            flat = F.pad(rows.float().flatten(), (0, -rows.numel() % NF4_BLOCK))
            parts.append(functional.quantize_4bit(flat[None], blocksize=NF4_BLOCK, quant_type="nf4"))
        codes = torch.cat([part for part, _ in parts])
        largest = torch.cat([state.absmax for _, state in parts])
        return cls(num_inputs, num_outputs, codes, largest=largest, levels=parts[0][1].code)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Level times largest magnitude, as bitsandbytes rounds it; a float64 model gets the float32 values."""
        functional = import_bitsandbytes().functional
        state = functional.QuantState(
            absmax=self.largest.float(),
            shape=torch.Size((1, self.largest.numel() * NF4_BLOCK)),
            code=self.levels.float(),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=torch.float32 if dtype == torch.float64 else dtype,
        )
        flat = functional.dequantize_4bit(self.weight.data, state).flatten()[: self.out_features * self.in_features]
        return flat.view(self.out_features, self.in_features).to(dtype)


class BnbInt8Linear(QuantizedLinear):
    """int8 codes [out, in] and the largest magnitude of each row; the product is one of integers.

    The inputs are rounded to 255 values, too, each token by its own largest magnitude, in training and in validation
    alike. The gradient takes that rounding for the identity.
    Source: LLM.int8() paper, vector-wise quantisation, without its separate treatment of outliers.
    """

    largest: Tensor

    def __init__(self, codes: Tensor, largest: Tensor) -> None:
        super().__init__(codes.shape[1], codes.shape[0], codes)
        self.register_buffer("largest", largest)

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> BnbInt8Linear:
        """Round to 255 values between ± the largest magnitude of each row."""
        largest_value = float(torch.stack(torch.aminmax(matrix.detach())).abs().amax())
        # The library's quantiser takes float16, in which larger values would be infinite.
        if largest_value > LARGEST_HALF:
            raise RecipeError(
                f"model.quantize: bnb-int8 holds weights up to {LARGEST_HALF:,.0f}, and this model has one of "
                f"{largest_value:,.0f}. Use int8."
            )
        functional = import_bitsandbytes().functional
        parts = [
            functional.int8_vectorwise_quant(rows.half().contiguous()) for rows in matrix.detach().split(ROWS_AT_ONCE)
        ]
        return cls(torch.cat([codes for codes, *_ in parts]), torch.cat([largest for _, largest, _ in parts]).float())

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes times largest magnitude / 127."""
        return (self.weight.to(self.largest.dtype) * (self.largest / LARGEST_CODE)[:, None]).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """The product of the rounded inputs with the codes, exact in integers, then scaled."""
        functional = import_bitsandbytes().functional
        codes, largest_inputs, _ = functional.int8_vectorwise_quant(x.to(torch.float16).contiguous())
        sums = functional.int8_linear_matmul(codes, self.weight.data).to(self.largest.dtype)
        scale = self.largest / LARGEST_CODE
        return (sums * (largest_inputs.to(scale.dtype) / LARGEST_CODE)[:, None] * scale).to(x.dtype)
