"""A saved adapter folder, of ours or of peft, back on a base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from infctx.adapters.adapter import Adapter
from infctx.adapters.adapter_folder import (
    CHANGE_THE_BASE,
    FACTS_FILE,
    PEFT_CONFIG,
    PEFT_TENSORS,
    TRAINED_PARAMETERS,
    AdapterFacts,
    read_facts,
    read_peft_config,
    read_tensors,
)
from infctx.adapters.patterns import nearest_names
from infctx.adapters.peft_adapters import wrap
from infctx.adapters.peft_library import import_peft
from infctx.adapters.state_tuning import StateTuning, add_start_parameters_
from infctx.errors import CheckpointError
from infctx.model.finch import Finch

_PEFT_TYPES = {"LORA": "lora", "MISS": "miss"}
# What peft knows and nothing here merges, by the key of its config.
_FOREIGN_PARTS = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "lora_bias")


def load_adapter(model: Finch, folder: str | Path, *, base_fingerprint: str | None) -> Adapter:
    """Put a saved adapter on a base model; what was trained is trainable again, the rest is frozen.

    Args:
        model: as `load_model` returned it; when an error is raised it may be left half changed.
        folder: what `Adapter.save` or peft's save_pretrained wrote.
        base_fingerprint: of the model's file; None = do not compare.
    Returns:
        An adapter with the saved values. PiSSA and OLoRA come back as the LoRA they are saved as.
    Raises:
        CheckpointError: not an adapter folder, another base, or a tensor that does not fit; names the tensor, what was
            expected and what was found.
    """
    folder = Path(folder)
    facts, config = read_facts(folder), read_peft_config(folder)
    if facts is not None:
        _check_base(folder, facts, base_fingerprint)
    has_trained = (folder / TRAINED_PARAMETERS).is_file()
    if config is None and not has_trained:
        raise CheckpointError(
            f"{folder}: not an adapter folder: it has neither {PEFT_CONFIG} nor {TRAINED_PARAMETERS}."
        )
    trained = _put_trained(model, folder / TRAINED_PARAMETERS) if has_trained else set()
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return StateTuning(model, trained)
    return _load_peft(model, folder, config, trained, facts)


def _load_peft(
    model: Finch, folder: Path, content: Mapping[str, object], trained: Iterable[str], facts: AdapterFacts | None
) -> Adapter:
    kind = _peft_kind(folder, content)
    peft = import_peft()

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.task_type = False, None
    # The values are read; drawing or computing them first would be for nothing.
    tensors = read_tensors(folder / PEFT_TENSORS)
    facts = replace(facts, kind=kind) if facts is not None else AdapterFacts(kind=kind, base_fingerprint=None)
    try:
        adapter = wrap(model, config, trained, facts)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG}: does not fit the model: {error}") from error
    peft_model = adapter.peft_model
    expected = peft.get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    _check_fit(folder / PEFT_TENSORS, expected, tensors)
    peft.set_peft_model_state_dict(peft_model, tensors)
    return adapter


def _peft_kind(folder: Path, content: Mapping[str, object]) -> str:
    """The kind, as in a recipe; refuses what could not be loaded or merged rightly."""
    path = folder / PEFT_CONFIG
    peft_type = str(content.get("peft_type"))
    if peft_type not in _PEFT_TYPES:
        raise CheckpointError(f"{path}: peft_type {peft_type}: expected one of {', '.join(_PEFT_TYPES)}.")
    for key in _FOREIGN_PARTS:
        if content.get(key):
            raise CheckpointError(f"{path}: {key} {content[key]}: infctx does not read adapters that have it.")
    if content.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias {content['bias']}: the model's matrices have no biases; expected none.")
    init = str(content.get("init_lora_weights", "")).lower()
    if init.startswith(CHANGE_THE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights {init}: the adapter belongs to a base that was changed when it began. Let peft "
            "write it as a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if not (folder / PEFT_TENSORS).is_file():
        raise CheckpointError(
            f"{folder}: {PEFT_TENSORS} is missing. A .bin is not read; let peft write it with safe_serialization."
        )
    if content.get("use_dora"):
        return "dora"
    return "rslora" if content.get("use_rslora") else _PEFT_TYPES[peft_type]


@torch.no_grad()
def _put_trained(model: Finch, path: Path) -> set[str]:
    """Copy the parameters that were trained as they are into the model; returns their names."""
    tensors = read_tensors(path)
    add_start_parameters_(
        model,
        initial_state=any(name.endswith(".initial_state") for name in tensors),
        initial_shifts=any(name.endswith(".initial_shift") for name in tensors),
    )
    parameters = dict(model.named_parameters())
    _check_fit(path, {name: parameters[name] for name in tensors if name in parameters}, tensors, among=parameters)
    for name, tensor in tensors.items():
        # Trained parameters are float32, whatever the base is stored in.
        parameters[name].data = tensor.to(parameters[name].device, torch.promote_types(tensor.dtype, torch.float32))
    return set(tensors)


def _check_fit(
    path: Path,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    among: Mapping[str, Tensor] | None = None,
) -> None:
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{path}: tensor {name} is missing. {nearest_names(name, found)}")
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{path}: tensor {name} belongs to nothing in the model. {nearest_names(name, among or expected)}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name}: expected {list(expected[name].shape)}, found {list(tensor.shape)}. The "
                "adapter was trained on a model of other sizes."
            )


def _check_base(folder: Path, facts: AdapterFacts, base_fingerprint: str | None) -> None:
    theirs = facts.base_fingerprint
    if theirs is not None and base_fingerprint is not None and theirs != base_fingerprint:
        raise CheckpointError(
            f"{folder / FACTS_FILE}: the adapter belongs to the base model with fingerprint {theirs}; this one has "
            f"{base_fingerprint}. Give the model file it was trained on."
        )
