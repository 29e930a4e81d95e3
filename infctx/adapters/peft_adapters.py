"""Adapters through peft, by name on the model's matrices; raw parameters are unfrozen beside them and saved beside."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infctx.adapters.adapter_folder import (
    PEFT_CONFIG,
    PEFT_TENSORS,
    TRAINED_PARAMETERS,
    AdapterFacts,
    write_facts,
    write_readme,
    write_tensors,
    write_trained,
)
from infctx.adapters.base_weight import parameter_values, set_base_weight_
from infctx.adapters.patterns import matching_parameters
from infctx.adapters.peft_kinds import EMBEDDING_KINDS, PRINCIPAL_KINDS, PeftSettings, check_ranks, peft_config
from infctx.adapters.peft_library import import_peft
from infctx.adapters.peft_merge import merged_weight, set_exact_magnitude_
from infctx.adapters.principal import ADAPTER, as_plain_lora, begin_from_principal_part_
from infctx.adapters.quantized_base import dequantize_, refuse_quantized
from infctx.adapters.state_tuning import add_start_parameters_
from infctx.adapters.targets import by_matrix, target_matrices
from infctx.errors import RecipeError
from infctx.model.finch import Finch
from infctx.model.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    import peft

# They use a base matrix as a function only, and never its values.
KINDS_ON_CODES = ("lora", "rslora")

__all__ = ["TRAINED_PARAMETERS", "PeftAdapter", "attach_lora", "attach_peft", "wrap"]


class PeftAdapter:
    """A model with an adapter of peft in it: `model` is still what it was, its matrices are wrapped.

    start: what PiSSA and OLoRA took out of the matrices, see `begin_from_principal_part_`; None with other kinds. It
    is needed to attach the adapter again.
    """

    has_files = True

    def __init__(self, peft_model: nn.Module, trained: Mapping[str, str], facts: AdapterFacts) -> None:
        self.peft_model, self._facts = peft_model, facts
        # Names without the adapter -> names with it.
        self._trained = dict(trained)
        self.layers = {name: m for name, m in self._model.named_modules() if hasattr(m, "base_layer")}
        self.start: dict[str, Tensor] | None = None

    def save(self, folder: Path, *, base_fingerprint: str | None = None) -> None:
        """Write peft's own layout into a folder that exists, and the raw parameters, if any, beside it.

        PiSSA and OLoRA are written as a LoRA of twice the rank on the matrices as they were.
        """
        peft = import_peft()

        config: peft.PeftConfig = copy.deepcopy(self.peft_model.peft_config[ADAPTER])
        tensors = peft.get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        if self.start is not None:
            tensors, config = as_plain_lora(tensors, config, self.start)
        write_tensors(folder / PEFT_TENSORS, tensors)
        _write_peft_config(folder / PEFT_CONFIG, config)
        if self._trained:
            write_trained(folder, {name: self._model.get_parameter(now) for name, now in self._trained.items()})
        write_facts(folder, dataclasses.replace(self._facts, base_fingerprint=base_fingerprint))
        write_readme(folder)

    def names(self) -> list[str]:
        """The matrices with an addition, and the parameters trained as they are."""
        matrices = [f"{name}.weight" for name in self.layers]
        return [*matrices, *(name for name in self._trained if name not in matrices)]

    def merged_parameter(self, name: str) -> Tensor:
        """The value of a parameter with the adapter folded in, float32 (float64 in a float64 model)."""
        matrix = name.removesuffix(".weight")
        if matrix in self.layers:
            return merged_weight(self.layers[matrix])
        return parameter_values(self._model, name)

    def merge_(self) -> None:
        """Fold the adapter into the weights and take it out of the model, in place.

        Quantised matrices become plain ones first: what the adapter is added to is what it was trained on.
        """
        dequantize_(self._model)
        for layer in self.layers.values():
            set_base_weight_(layer.get_base_layer(), merged_weight(layer))
        self.peft_model.unload()

    @property
    def _model(self) -> nn.Module:
        return self.peft_model.get_base_model()


def attach_lora(
    model: Finch,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str],
    train_also: Sequence[str] = (),
) -> PeftAdapter:
    """Freeze the model and put a LoRA of delta W = B A · alpha / rank on the target matrices; B starts as zeros.

    Args:
        targets: last part or parts of the matrices' names, as "key" or "channel_mix.key", or globs.
        train_also: glob patterns of parameters that are trained as they are.
    Raises:
        RecipeError: a target matches no matrix, or a pattern no parameter; names the nearest. A pattern matches a
            matrix that is stored quantised.
    """
    return attach_peft(
        model,
        PeftSettings(kind="lora", rank=rank, alpha=alpha, dropout=dropout, targets=targets, train_also=train_also),
    )


def attach_peft(
    model: Finch,
    settings: PeftSettings,
    *,
    start: Mapping[str, Tensor] | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> PeftAdapter:
    """Freeze the model and put an adapter on the target matrices, which begins without any effect.

    Args:
        start: the `start` of the adapter that this one goes on from (PiSSA, OLoRA); None = a new one.
        frozen_dtype: of the matrices that these two change; None = float32. Their new values are computed in float32.
    Raises:
        RecipeError: a name matches nothing, or a rank does not fit a matrix. CheckpointError: `start` does not fit.
    """
    kind = settings.kind
    matrices = target_matrices(model, settings.targets, with_embedding=kind in EMBEDDING_KINDS, kind=kind)
    _refuse_codes(model, matrices, kind=kind)
    ranks = by_matrix(matrices, settings.rank, settings.ranks, key="adapter.ranks")
    alphas = by_matrix(matrices, settings.alpha or 1.0, settings.alphas, key="adapter.alphas")
    check_ranks(model, settings, ranks)
    trained = add_start_parameters_(
        model, initial_state=settings.initial_state, initial_shifts=settings.initial_shifts
    ) | matching_parameters(model, settings.train_also, key="adapter.train_also")
    twice = sorted(trained & {f"{name}.weight" for name in matrices})
    if twice and kind in PRINCIPAL_KINDS:
        raise RecipeError(
            f"adapter.train_also: {twice[0]} is a target of adapter.kind {kind}, which leaves a residual in its place. "
            "Leave it out of train_also, or out of targets."
        )
    facts = AdapterFacts(
        kind=kind,
        base_fingerprint=None,
        rank=settings.rank,
        alpha=settings.alpha,
        ranks={name: rank for name, rank in ranks.items() if rank != settings.rank},
    )
    adapter = wrap(model, peft_config(settings, ranks, alphas), trained, facts)
    if kind in PRINCIPAL_KINDS:
        adapter.start = begin_from_principal_part_(
            adapter.layers,
            kind=kind,
            svd_iterations=settings.svd_iterations,
            start=start,
            frozen_dtype=frozen_dtype,
        )
    return adapter


def _refuse_codes(model: nn.Module, matrices: Iterable[str], *, kind: str) -> None:
    codes = [name for name in matrices if isinstance(model.get_submodule(name), QuantizedLinear)]
    if codes and kind not in KINDS_ON_CODES:
        raise RecipeError(
            f"adapter.kind: {kind} computes with the values of its matrices, and {codes[0]} is stored quantised; "
            f"expected {' or '.join(KINDS_ON_CODES)}, or model.quantize: none."
        )


def wrap(model: nn.Module, config: peft.PeftConfig, trained: Iterable[str], facts: AdapterFacts) -> PeftAdapter:
    """Let peft wrap the matrices that its config names, and train some parameters as they are.

    Args:
        trained: their names.
    """
    peft = import_peft()

    raw_parameters = {name: model.get_parameter(name) for name in sorted(trained)}
    refuse_quantized(raw_parameters.items(), key="adapter.train_also")
    # New modules begin in training; dropout would act in a model that is being evaluated.
    peft_model = peft.get_peft_model(model, config).train(model.training)
    for parameter in raw_parameters.values():
        parameter.requires_grad_(True)
    names_now = {id(parameter): name for name, parameter in model.named_parameters()}
    order = {name: names_now[id(parameter)] for name, parameter in raw_parameters.items()}
    adapter = PeftAdapter(peft_model, order, facts)
    for layer in adapter.layers.values():
        if getattr(layer, "lora_magnitude_vector", None):
            set_exact_magnitude_(layer)
    return adapter


def _write_peft_config(path: Path, config: peft.PeftConfig) -> None:
    config.inference_mode = True
    config.save_pretrained(str(path.parent))
    # peft writes sets in hash order; sorted, the same adapter gives the same file.
    content = json.loads(path.read_text())
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
