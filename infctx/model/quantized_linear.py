"""Frozen matrices that are stored smaller than they are multiplied: int8 here, others in bitsandbytes_linear.py.

The matrix is made anew for each product, forward and backward, and nothing of it is kept in between: memory holds the
stored form of every matrix and one matrix in the dtype of the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infctx_kernels.linear import linear

# Inputs that share a scale. Measured: with one scale a row the error is 1.4 times as large on normal weights and 5
# times on weights with outliers, for half a bit less a weight; making the matrix takes the same time.
GROUP_INPUTS = 64
LARGEST_CODE = 127
# Rows quantised at once: what that needs in float32 is small beside the matrix.
ROWS_AT_ONCE = 512
CACHED_ROWS = 128


class QuantizedLinear(nn.Linear):
    """A frozen matrix without bias, stored as codes in `weight`. Kinds differ in what the codes mean.

    It is an `nn.Linear` so that adapters take it for the matrix it stands for; its weight is no matrix of floats.
    """

    def __init__(self, num_inputs: int, num_outputs: int, codes: Tensor) -> None:
        super().__init__(num_inputs, num_outputs, bias=False, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> QuantizedLinear:
        """Quantise a matrix [out, in] of finite floats, where it is."""
        raise AssertionError("one of the kinds")

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that is computed with, [out, in]: a new tensor."""
        raise AssertionError("one of the kinds")

    def product(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], without autograd."""
        return linear(x, self.dequantized(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]. The gradient goes to x alone, through the dequantised matrix."""
        return _FrozenProduct.apply(x.reshape(-1, self.in_features), self).view(*x.shape[:-1], -1)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        # No tensor is saved: the layer is frozen and makes its matrix again.
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return linear(gradient, ctx.layer.dequantized(gradient.dtype).t()), None


class Int8Linear(QuantizedLinear):
    """int8 codes [out, in] and a float32 scale for every 64 inputs of a row, [out, ceil(in / 64)]: 8.5 bits a weight.

    The last group of a row holds what is left.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes.shape[1], codes.shape[0], codes)
        self.register_buffer("scale", scale)

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Int8Linear:
        """Round to 255 values between ± the largest magnitude of each group."""
        parts = [_to_int8(rows) for rows in matrix.detach().split(ROWS_AT_ONCE)]
        codes, scales = zip(*parts, strict=True)
        return cls(torch.cat(codes), torch.cat(scales))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes times scales, computed in float32, then cast to dtype."""
        values = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        # A CPU has float32 products of some rows in its cache, and bf16 matrices 7 times as soon; a GPU takes them all.
        at_once = CACHED_ROWS if values.device.type == "cpu" else self.out_features
        for rows, codes, scale in zip(
            *(part.split(at_once) for part in (values, self.weight, self.scale)), strict=True
        ):
            rows.copy_(_products(codes, scale.to(torch.float32)))
        return values


def _products(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [rows, in] of codes [rows, in] and scales [rows, groups]."""
    values = codes.to(torch.float32)
    num_whole = codes.shape[1] // GROUP_INPUTS
    whole, rest = values.tensor_split([num_whole * GROUP_INPUTS], dim=1)
    whole.unflatten(1, (num_whole, GROUP_INPUTS)).mul_(scale[:, :num_whole, None])
    rest.mul_(scale[:, -1:])
    return values


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, in] and scales [rows, groups] of some rows of a matrix."""
    groups = rows.float().split(GROUP_INPUTS, dim=1)
    scale = torch.stack([group.abs().amax(1) for group in groups], dim=1) / LARGEST_CODE
    # A group of zeros has scale 0; divided by anything else it is zeros still.
    divisors = torch.where(scale > 0, scale, 1.0).split(1, dim=1)
    codes = [torch.round(group / divisor).to(torch.int8) for group, divisor in zip(groups, divisors, strict=True)]
    return torch.cat(codes, dim=1), scale
