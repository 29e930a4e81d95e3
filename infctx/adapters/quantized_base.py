"""The frozen matrices under an adapter, stored quantised: which they are, and back to plain ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from infctx.errors import CheckpointError, RecipeError
from infctx.model.bitsandbytes_linear import BnbInt8Linear, Nf4Linear, import_bitsandbytes
from infctx.model.finch import Finch
from infctx.model.linear import Linear
from infctx.model.quantized_linear import ROWS_AT_ONCE, Int8Linear, QuantizedLinear

QUANTIZED: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear, "bnb-int8": BnbInt8Linear}
FROM_BITSANDBYTES = ("nf4", "bnb-int8")
# Relative errors beyond which a kind computes something else than it should, on normal weights: that of the matrix is
# 0.09 for nf4; that of a product beside the dequantised matrix is 0.006 for bnb-int8, which rounds its inputs.
MATRIX_BOUND = 0.12
PRODUCT_BOUND = 0.05


def quantize_(model: Finch, kind: str, *, device: torch.device | str = "cpu") -> float:
    """Store every matrix of the blocks quantised, frozen; embedding, head, vectors and low-rank pairs stay as they are.

    One matrix after another, so that a model mapped from its file needs the quantised size and a part of one matrix.
    The same file gives the same codes, whatever dtype it is read in that holds its values.

    Args:
        kind: a name of QUANTIZED.
        device: where the model is going to run.
    Returns:
        The largest relative error of a matrix, norm over norm.
    Raises:
        RecipeError: bitsandbytes is missing, or does not run there. CheckpointError: a weight is not finite.
    """
    quantized = QUANTIZED[kind]
    if kind in FROM_BITSANDBYTES:
        import_bitsandbytes()
        _try_out(kind, torch.device(device))
    # By name: a list of the modules would keep every matrix alive to the end.
    names = [name for name, module in model.blocks.named_modules() if type(module) is Linear]
    largest_error = 0.0
    for name in names:
        matrix = model.blocks.get_submodule(name).weight.detach()
        if not all(bool(torch.isfinite(value)) for value in torch.aminmax(matrix)):
            raise CheckpointError(f"blocks.{name}.weight: some values are not finite and cannot be quantised.")
        layer = quantized.from_matrix(matrix)
        largest_error = max(largest_error, _relative_error(layer, matrix))
        _replace(model.blocks, name, layer)
    # Off the file, which is unmapped with its last tensor: its pages that were read count as this process's memory.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    return largest_error


def dequantize_(model: nn.Module) -> None:
    """Put plain float32 matrices in the place of the quantised ones, also under an adapter: the same function."""
    for name in [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]:
        layer = model.get_submodule(name)
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features)
        plain.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
        _replace(model, name, plain)


def refuse_quantized(parameters: Iterable[tuple[str, Tensor]], *, key: str) -> None:
    """Refuse to train what is stored quantised.

    Args:
        parameters: what is to be trained as it is, by name.
        key: the recipe key that named them, for the message.
    Raises:
        RecipeError: one of them is stored as codes.
    """
    for name, parameter in parameters:
        if not parameter.is_floating_point():
            raise RecipeError(
                f"{key}: {name} is stored quantised and cannot be trained as it is. Leave it out, put an addition on "
                "it (adapter.targets), or set model.quantize: none."
            )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of what belongs to them: scales, levels."""
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.train(model.training))


def _relative_error(layer: QuantizedLinear, matrix: Tensor) -> float:
    squares = [
        ((found - rows).norm() ** 2, rows.float().norm() ** 2)
        for found, rows in zip(layer.dequantized().split(ROWS_AT_ONCE), matrix.split(ROWS_AT_ONCE), strict=True)
    ]
    of_errors, of_values = (float(sum(parts)) for parts in zip(*squares, strict=True))
    return (of_errors / of_values) ** 0.5 if of_values else 0.0


def _try_out(kind: str, device: torch.device) -> None:
    """A small product there and back: the library has kernels for some devices and processors, and none for others."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(64, 96, generator=generator)
    x = torch.randn(32, 96, generator=generator).to(device).requires_grad_()
    try:
        layer = QUANTIZED[kind].from_matrix(original).to(device)
        output = layer(x)
        output.sum().backward()
        matrix = layer.dequantized()
    # Whatever a library raises that has no kernel for this device.
    except Exception as error:
        raise RecipeError(f"model.quantize: {kind} does not run on {device}: {error}. Use int8.") from error
    trials = (
        ("matrices", matrix, original.to(device), MATRIX_BOUND),
        ("products", output.detach(), x.detach() @ matrix.t(), PRODUCT_BOUND),
        ("gradients", x.grad, matrix.sum(0).expand_as(x), PRODUCT_BOUND),
    )
    for what, found, expected, bound in trials:
        error = float((found - expected).norm() / expected.norm())
        if not error < bound:
            raise RecipeError(
                f"model.quantize: {kind} computes wrong {what} on {device}: a relative error of {error:.2g}, at most "
                f"{bound} expected. Use int8."
            )
