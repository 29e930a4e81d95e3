"""A model as a run would have it, on the meta device: shapes, dtypes and what is trained, without a single value."""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.adapters.quantized_base import QUANTIZED
from infctx.errors import RecipeError
from infctx.model.bitsandbytes_linear import NF4_BLOCK, BnbInt8Linear, Nf4Linear
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.linear import Linear
from infctx.model.quantized_linear import GROUP_INPUTS, Int8Linear, QuantizedLinear
from infctx.recipe.adapter_section import AdapterSection
from infctx.recipe.schema import Recipe
from infctx.run_adapter import attach_adapter
from infctx.surgery.info import RELEASED
from infctx.training.precision import Precision, apply_precision_

_WORLD_IDS = 65536
_NF4_LEVELS = 16


def released_shapes() -> dict[str, FinchConfig]:
    """Sizes of the released models by short names: 1.6b, 3b, 7b, 14b for Finch, eagle-7b and so on for Eagle."""
    shapes = {}
    for name, version, n_layer, n_embd, _ in RELEASED:
        family, size = name.lower().split()
        short = size if family == "finch" else f"{family}-{size}"
        shapes[short] = new_config(version=version, n_layer=n_layer, n_embd=n_embd, vocab_size=_WORLD_IDS)
    return shapes


def released_shape(name: str) -> FinchConfig:
    """Sizes of a released model.

    Args:
        name: as `released_shapes` has it; 1b6 stands for 1.6b, too.
    Raises:
        RecipeError: there is no such model; names those there are.
    """
    shapes = released_shapes()
    wanted = name.lower().removeprefix("finch-").replace("1b6", "1.6b").replace("1b5", "1.5b")
    if wanted not in shapes:
        raise RecipeError(f"--shape {name}: expected one of {', '.join(shapes)}.")
    return shapes[wanted]


def planned_model(recipe: Recipe, config: FinchConfig, *, precision: Precision) -> Finch:
    """The model of a resolved recipe with its adapter attached, on the meta device.

    Args:
        config: of the model file, or of a released model.
        precision: what `run.precision` comes to on the device that is planned for.
    Raises:
        RecipeError: the adapter does not fit a model of these sizes.
    """
    with torch.device("meta"):
        model = Finch(config)
        if recipe.model.quantize != "none":
            _quantize_on_meta(model, recipe.model.quantize)
        attach_adapter(adapter_of_the_same_sizes(recipe.adapter), model)
    # New modules of an adapter may have been made elsewhere; what they hold is of no interest.
    model.to("meta")
    apply_precision_(model, precision)
    return model.train()


def adapter_of_the_same_sizes(section: AdapterSection) -> AdapterSection:
    """An adapter of the same tensors that is attached without looking at values."""
    # They are LoRA from another beginning, which is decomposed out of the weights.
    if section.kind in ("pissa", "olora"):
        return section.model_copy(update={"kind": "lora"})
    return section


def _quantize_on_meta(model: Finch, kind: str) -> None:
    """Put the layers of `quantize_` in the place of the blocks' matrices, without values."""
    for name in [name for name, module in model.blocks.named_modules() if type(module) is Linear]:
        parent, _, last = name.rpartition(".")
        matrix = model.blocks.get_submodule(name).weight
        setattr(model.blocks.get_submodule(parent), last, _quantized_on_meta(matrix, kind))


def _quantized_on_meta(matrix: Tensor, kind: str) -> QuantizedLinear:
    rows, columns = matrix.shape
    quantized = QUANTIZED[kind]
    codes = torch.empty(rows, columns, dtype=torch.int8, device="meta")
    if quantized is Int8Linear:
        return Int8Linear(codes, torch.empty(rows, -(-columns // GROUP_INPUTS), device="meta"))
    if quantized is BnbInt8Linear:
        return BnbInt8Linear(codes, torch.empty(rows, device="meta"))
    num_blocks = -(-rows * columns // NF4_BLOCK)
    return Nf4Linear(
        columns,
        rows,
        torch.empty(num_blocks * NF4_BLOCK // 2, 1, dtype=torch.uint8, device="meta"),
        largest=torch.empty(num_blocks, device="meta"),
        levels=torch.empty(_NF4_LEVELS, device="meta"),
    )
