"""The frozen matrices under an adapter, stored quantised: which they are, and back to plain ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from infctx.errors import CheckpointError, RecipeError
from infctx.model.bitsandbytes_linear import BnbInt8Linear, Nf4Linear, import_bitsandbytes
from infctx.model.finch import Finch
from infctx.model.linear import Linear
from infctx.model.quantized_linear import Int8Linear, QuantizedLinear

QUANTIZED: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear, "bnb-int8": BnbInt8Linear}
FROM_BITSANDBYTES = ("nf4", "bnb-int8")
# Relative; what a kind's product may differ from that with its dequantised matrix. bnb-int8 rounds its inputs, too.
TRIAL_BOUND = 0.05


def quantize_(model: Finch, kind: str, *, device: torch.device | str = "cpu") -> None:
    """Store every matrix of the blocks quantised, frozen; embedding, head, vectors and low-rank pairs stay as they are.

    One matrix after another, so that a model mapped from its file needs the quantised size and a part of one matrix.
    The same file gives the same codes, whatever dtype it is read in that holds its values.

    Args:
        kind: a name of QUANTIZED.
        device: where the model is going to run.
    Raises:
        RecipeError: bitsandbytes is missing, or does not run there. CheckpointError: a weight is not finite.
    """
    quantized = QUANTIZED[kind]
    if kind in FROM_BITSANDBYTES:
        import_bitsandbytes()
        _try_out(kind, torch.device(device))
    # By name: a list of the modules would keep every matrix alive to the end.
    names = [name for name, module in model.blocks.named_modules() if type(module) is Linear]
    for name in names:
        matrix = model.blocks.get_submodule(name).weight.detach()
        if not all(bool(torch.isfinite(value)) for value in torch.aminmax(matrix)):
            raise CheckpointError(f"blocks.{name}.weight: some values are not finite and cannot be quantised.")
        _replace(model.blocks, name, quantized.from_matrix(matrix))


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


def _try_out(kind: str, device: torch.device) -> None:
    """A small product there and back: the library has kernels for some devices and processors, and none for others."""
    generator = torch.Generator().manual_seed(0)
    try:
        layer = QUANTIZED[kind].from_matrix(torch.randn(64, 128, generator=generator)).to(device)
        x = torch.randn(32, 128, generator=generator).to(device).requires_grad_()
        found = layer(x)
        found.sum().backward()
        matrix = layer.dequantized()
        pairs = ((found.detach(), x.detach() @ matrix.t()), (x.grad, matrix.sum(0).expand_as(x)))
        errors = [float((output - expected).norm() / expected.norm()) for output, expected in pairs]
    # Whatever a library raises that has no kernel for this device.
    except Exception as error:
        raise RecipeError(f"model.quantize: {kind} does not run on {device}: {error}. Use int8.") from error
    if not max(errors) < TRIAL_BOUND:
        raise RecipeError(
            f"model.quantize: {kind} computes wrong products on {device}: relative errors {errors[0]:.2g} and "
            f"{errors[1]:.2g} of output and gradient, at most {TRIAL_BOUND} expected. Use int8."
        )
