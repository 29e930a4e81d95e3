"""PiSSA and OLoRA: adapters that begin as a part of the matrix, which is taken out of it.

A matrix W becomes a residual W - s·B0·A0 that stays frozen, and B, A begin as B0, A0. B0 and A0 cannot be computed
again to the same bits (PiSSA's decomposition is random), so whoever continues needs them.
Source: PiSSA (Meng et al. 2024), eq. 2-4; OLoRA (Büyükakyüz 2024), algorithm 1; computed by peft.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infctx.adapters.base_weight import base_weight, set_base_weight_
from infctx.adapters.patterns import nearest_names
from infctx.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import peft

ADAPTER = "default"
FACTORS = ("lora_A", "lora_B")


@torch.no_grad()
def begin_from_principal_part_(
    layers: Mapping[str, nn.Module],
    *,
    kind: str,
    svd_iterations: int | None,
    start: Mapping[str, Tensor] | None,
    frozen_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Take the part out of every matrix, one at a time, and let its adapter begin with it.

    Args:
        layers: peft's LoRA layers by the names of their matrices.
        svd_iterations: of PiSSA's decomposition; None = the exact one.
        start: what an earlier call returned; None = decompose.
        frozen_dtype: of the residuals, computed in float32; None = float32.
    Returns:
        A0 and B0 of every matrix, float32, by "<matrix>.lora_A" and "<matrix>.lora_B".
    Raises:
        CheckpointError: `start` is of other matrices or ranks. RecipeError: a matrix is not stored as numbers.
    """
    if start is not None:
        _check_start(layers, start)
    parts: dict[str, Tensor] = {}
    # What comes after draws the same random numbers, whether there was something to decompose or not.
    with torch.random.fork_rng(devices=[]):
        for name, layer in layers.items():
            base = layer.get_base_layer()
            weight = base_weight(base)
            factors = _FACTORIES[kind](layer, weight, svd_iterations) if start is None else _of(start, name, weight)
            for factor, values in zip(FACTORS, factors, strict=True):
                getattr(layer, factor)[ADAPTER].weight.data = values.clone()
                parts[f"{name}.{factor}"] = values
            down, up = factors
            set_base_weight_(base, weight - layer.scaling[ADAPTER] * (up @ down), dtype=frozen_dtype or weight.dtype)
    return parts


def as_plain_lora(
    tensors: Mapping[str, Tensor], config: peft.LoraConfig, start: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], peft.LoraConfig]:
    """The adapter as a LoRA of twice the rank on the matrices as they were: s·(B·A - B0·A0) = s·[B, -B0]·[A; A0].

    Args:
        tensors: of peft's state dict, "base_model.model.<matrix>.lora_A.weight".
        start: what `begin_from_principal_part_` returned.
    """
    doubled = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        begun = start[name].to(tensor)
        doubled[key] = torch.cat([tensor, begun]) if name.endswith("lora_A") else torch.cat([tensor, -begun], dim=1)
    config = copy.deepcopy(config)
    # Twice the rank and twice alpha: the same scale.
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    return doubled, config


def _decompose(layer: nn.Module, weight: Tensor, how: str | None) -> tuple[Tensor, Tensor]:
    """peft's own initialisation, which works on the layer, in the precision of `weight`."""
    base = layer.get_base_layer()
    if not base.weight.is_floating_point() or base.weight.shape != weight.shape:
        raise RecipeError(
            "adapter.kind: pissa and olora change the matrices they are put on, which are stored quantised here. Use "
            "another kind, or a base that is not quantised."
        )
    stored = base.weight.data
    # In place of the stored one: peft would round the factors to its dtype, and may write over it.
    base.weight.data = weight.float().clone()
    try:
        if how is None:
            layer.olora_init(ADAPTER)
        else:
            layer.pissa_init(ADAPTER, how)
    finally:
        base.weight.data = stored
    down, up = (getattr(layer, factor)[ADAPTER].weight.data for factor in FACTORS)
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()


def _pissa(layer: nn.Module, weight: Tensor, svd_iterations: int | None) -> tuple[Tensor, Tensor]:
    return _decompose(layer, weight, "pissa" if svd_iterations is None else f"pissa_niter_{svd_iterations}")


def _olora(layer: nn.Module, weight: Tensor, svd_iterations: int | None) -> tuple[Tensor, Tensor]:
    return _decompose(layer, weight, None)


_FACTORIES = {"pissa": _pissa, "olora": _olora}


def _of(start: Mapping[str, Tensor], name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    down, up = (start[f"{name}.{factor}"].to(weight) for factor in FACTORS)
    return down, up


def _check_start(layers: Mapping[str, nn.Module], start: Mapping[str, Tensor]) -> None:
    expected = {
        f"{name}.{factor}": getattr(layer, factor)[ADAPTER].weight.shape
        for name, layer in layers.items()
        for factor in FACTORS
    }
    for name in sorted(expected.keys() ^ start.keys()):
        where = "is missing" if name in expected else "belongs to none of the targets"
        raise CheckpointError(f"adapter start: tensor {name} {where}. {nearest_names(name, start)}")
    for name, shape in expected.items():
        if start[name].shape != shape:
            raise CheckpointError(
                f"adapter start: tensor {name}: expected {list(shape)}, found {list(start[name].shape)}."
            )
