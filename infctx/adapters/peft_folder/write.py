"""A peft adapter folder that changes a model in a given way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infctx.adapters.model_changes import ModelChanges
from infctx.adapters.peft_folder.contents import OTHER_BAT, PREFIX, PeftFolder, our_matrix
from infctx.adapters.peft_library import import_peft
from infctx.adapters.weight_updates import LowRank, SharedRows, Update
from infctx.errors import CheckpointError
from infctx.model.finch_keys import find_row, from_official


def to_peft(changes: ModelChanges, shapes: Mapping[str, torch.Size], *, file: str) -> PeftFolder:
    """The contents of a folder that changes a model in the same way. A PiSSA becomes a LoRA of twice the rank.

    Args: shapes: of the base's parameters, by our names, the initial states' included.
    Raises: CheckpointError for what peft has no counterpart of, with the reason.
    """
    trained = _our_tensors(changes, shapes, file=file)
    if not changes.updates:
        return PeftFolder(None, {}, trained)
    if changes.kind == "disha_bat":
        raise CheckpointError(
            f"{file}: cannot become a peft adapter: {OTHER_BAT}. Merge it: infctx export MODEL --adapter."
        )
    if changes.kind in ("dora", "miss_bat", "miss_mini") or "emb" in changes.updates:
        raise CheckpointError(
            f"{file}: only peft has such adapters, so this one is in its layout already. Use it as it is."
        )
    updates = {our_matrix(name): update for name, update in changes.updates.items()}
    targets = _targets(list(updates), num_layers=_num_layers(shapes))
    if changes.kind == "disha":
        return PeftFolder(_miss_config(changes, targets, file=file), _miss_tensors(updates), trained)
    plain = {name: update.plain() for name, update in updates.items() if isinstance(update, LowRank)}
    assert plain.keys() == updates.keys()
    return PeftFolder(_lora_config(plain, targets), _lora_tensors(plain), trained)


def _our_tensors(changes: ModelChanges, shapes: Mapping[str, torch.Size], *, file: str) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in changes.replaced.items():
        row = find_row(name, is_official=True)
        assert row is not None
        ours[row.ours] = from_official(row, tensor, shapes[row.ours], file=file).contiguous()
    return ours


def _num_layers(shapes: Mapping[str, torch.Size]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))


def _targets(matrices: list[str], *, num_layers: int) -> list[str]:
    """Last parts of names where a matrix is meant in every layer, else whole names."""
    parts = {name: name.split(".", 2)[2] for name in matrices if name.startswith("blocks.")}
    counts = {part: sum(other == part for other in parts.values()) for part in parts.values()}
    return sorted({parts[name] if counts.get(parts.get(name, ""), 0) == num_layers else name for name in matrices})


def _lora_config(updates: Mapping[str, LowRank], targets: list[str]) -> dict[str, Any]:
    peft = import_peft()

    alphas = {name: _alpha_of(update) for name, update in updates.items()}
    rank, alpha = max(update.rank for update in updates.values()), next(iter(alphas.values()))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        rank_pattern={name: update.rank for name, update in updates.items() if update.rank != rank},
        alpha_pattern={name: other for name, other in alphas.items() if other != alpha},
        inference_mode=True,
    )
    return _as_json(config.to_dict())


def _alpha_of(update: LowRank) -> float:
    """scale · rank, a whole number as such: scale is alpha / rank, rounded."""
    assert update.scale is not None
    alpha = update.scale * update.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-14) else alpha


def _lora_tensors(updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for name, update in updates.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = update.down.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = update.up.contiguous()
    return tensors


def _miss_config(changes: ModelChanges, targets: list[str], *, file: str) -> dict[str, Any]:
    peft = import_peft()

    if len(changes.ranks) > 1:
        raise CheckpointError(f"{file}: has ranks {changes.ranks}; peft's MiSS has one for all matrices. Merge it.")
    config = peft.MissConfig(r=changes.ranks[0], target_modules=targets, inference_mode=True)
    return _as_json(config.to_dict())


def _miss_tensors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    tensors = {}
    for name, update in updates.items():
        assert isinstance(update, SharedRows)
        tensors[f"{PREFIX}{name}.miss_block"] = update.rows.contiguous()
    return tensors


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """As peft writes it; sets in order, so that the same adapter gives the same file."""
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return {**plain, "peft_type": str(config["peft_type"].value)}
