"""What a peft adapter folder changes in a model.

Understood are LoRA, rsLoRA, DoRA and MiSS, and tensors trained as they are beside them. A setting that changes the
function in another way is refused by name. Source of the layout: peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from infctx.adapters.adapter_folder import CHANGE_THE_BASE
from infctx.adapters.model_changes import ModelChanges
from infctx.adapters.peft_folder.contents import PREFIX, PeftFolder, our_matrix
from infctx.adapters.weight_updates import LowRank, SharedRows, TileProduct, Update, check_numbers
from infctx.errors import CheckpointError
from infctx.model.finch_keys import KeyRow, find_row, is_start, to_official

_PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|miss_block)(?:\.weight)?"
)
# Settings that are read here, that only name things, or with which nothing is computed after training. Any other that
# is set says that the adapter is not what its tensors look like.
_UNDERSTOOD = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "r",
        "init_weights",
        "miss_dropout",
    ),
    *("mini_r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"),
    *("lora_dropout", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
}


def from_peft(folder: PeftFolder, *, file: str, base_fingerprint: str | None = None) -> ModelChanges:
    """What a folder changes; names of matrices may be ours or official ones.

    Raises: CheckpointError for a setting or tensor that is not understood, naming it.
    """
    replaced = _official_tensors(folder.trained, file=file)
    if folder.config is None:
        kind = "state" if replaced and all(map(is_start, replaced)) else "parameters"
        return ModelChanges(kind=kind, replaced=replaced, base_fingerprint=base_fingerprint)
    peft_type = folder.config.get("peft_type")
    if peft_type not in ("LORA", "MISS"):
        raise CheckpointError(f"{file}: adapter_config.json: peft_type {peft_type!r}: expected LORA or MISS.")
    _check_settings(folder.config, file=file)
    found = _by_matrix(folder.tensors, file=file)
    alpha = None
    updates: dict[str, Update]
    if peft_type == "MISS":
        start = folder.config.get("init_weights")
        kind = {"bat": "miss_bat", "mini": "miss_mini"}.get(start, "disha") if isinstance(start, str) else "disha"
        updates = {name: _miss(name, parts, kind, file=file) for name, parts in found.items()}
    else:
        scales = _Scales(folder.config, list(found), file=file)
        updates = {name: _lora(name, parts, scales, file=file) for name, parts in found.items()}
        kind = "dora" if any("lora_magnitude_vector" in parts for parts in found.values()) else "lora"
        alpha = scales.alpha
        if bool(folder.config.get("use_dora")) != (kind == "dora"):
            raise CheckpointError(
                f"{file}: use_dora and the tensors disagree: expected lora_magnitude_vector with DoRA."
            )
    return ModelChanges(kind=kind, updates=updates, replaced=replaced, alpha=alpha, base_fingerprint=base_fingerprint)


def _check_settings(config: Mapping[str, Any], *, file: str) -> None:
    """Refuse a setting that changes the function in a way that is not understood here."""
    for name in sorted(config.keys() - _UNDERSTOOD):
        if config[name] not in (None, False, [], {}, "none"):
            raise CheckpointError(
                f"{file}: adapter_config.json: {name}: {str(config[name])[:80]!r} is not understood; expected plain "
                "LoRA, rsLoRA, DoRA or MiSS. Merge it with peft, and give the merged model."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise CheckpointError(
            f"{file}: adapter_config.json: init_lora_weights {start!r} changes the base, and this folder holds the "
            "rest only. Save it as a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)."
        )


def _by_matrix(tensors: Mapping[str, Tensor], *, file: str) -> dict[str, dict[str, Tensor]]:
    """Parts of adapters by the official name of their matrix."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key.removeprefix(PREFIX))
        row = None if match is None else _any_row(f"{match[1]}.weight")
        if match is None or row is None:
            raise CheckpointError(f"{file}: tensor {key[:120]!r} is no adapter of a matrix of an RWKV model.")
        check_numbers(key, tensor, file=file)
        parts = found.setdefault(row.official.removesuffix(".weight"), {})
        if match[2] in parts:
            raise CheckpointError(f"{file}: tensor {key[:120]!r} is there twice, under two names of the matrix.")
        parts[match[2]] = tensor
    if not found:
        raise CheckpointError(f"{file}: adapter_model.safetensors holds no tensors; expected an adapter.")
    return found


class _Scales:
    """alpha / rank of each matrix, or alpha / √rank, with peft's patterns of alphas and ranks."""

    def __init__(self, config: Mapping[str, Any], matrices: list[str], *, file: str) -> None:
        self.alpha = _number(config.get("lora_alpha"), "lora_alpha", file=file)
        self._is_rslora = bool(config.get("use_rslora"))
        self._alphas: dict[str, float] = {}
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file}: adapter_config.json: alpha_pattern: expected a table of names and alphas.")
        for pattern, alpha in patterns.items():
            hits = [name for name in matrices if _is_meant(pattern, name)]
            if not hits:
                raise CheckpointError(f"{file}: adapter_config.json: alpha_pattern {pattern[:80]!r} names no matrix.")
            for name in hits:
                self._alphas.setdefault(name, _number(alpha, "alpha_pattern", file=file))

    def of(self, name: str, rank: int) -> float:
        """What B A is multiplied by."""
        return self._alphas.get(name, self.alpha) / (math.sqrt(rank) if self._is_rslora else rank)


def _is_meant(pattern: str, official: str) -> bool:
    """Whether a name, or its last parts, are those of a matrix; peft's own regular expressions are not run."""
    return any(name == pattern or name.endswith(f".{pattern}") for name in (official, our_matrix(official)))


def _number(value: object, name: str, *, file: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{file}: adapter_config.json: {name}: expected a number, found {str(value)[:80]!r}.")
    return float(value)


def _lora(name: str, parts: Mapping[str, Tensor], scales: _Scales, *, file: str) -> LowRank:
    # An embedding is stored the other way round: its change is the transpose of B A.
    is_embedding = "lora_embedding_A" in parts
    wanted = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    for part in wanted:
        if part not in parts or parts[part].dim() != 2:
            found = "none" if part not in parts else list(parts[part].shape)
            raise CheckpointError(f"{file}: tensor {our_matrix(name)}.{part}: expected 2 axes, found {found}.")
    if len(parts) > 2 + ("lora_magnitude_vector" in parts):
        raise CheckpointError(
            f"{file}: {our_matrix(name)}: expected {wanted[0]} and {wanted[1]}, found {sorted(parts)}."
        )
    down, up = (parts[part] for part in wanted)
    if down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{file}: tensor {our_matrix(name)}.{wanted[1]}: expected shape [out, {down.shape[0]}]; "
            f"found {list(up.shape)}."
        )
    scale = scales.of(name, down.shape[0])
    if is_embedding:
        down, up = up.t(), down.t()
    magnitude = parts.get("lora_magnitude_vector")
    return LowRank(down=down, up=up, scale=scale, magnitude=magnitude, length_axis=0 if is_embedding else 1)


def _miss(name: str, parts: Mapping[str, Tensor], kind: str, *, file: str) -> Update:
    block = parts.get("miss_block")
    num_axes = 3 if kind == "miss_bat" else 2
    if block is None or block.dim() != num_axes:
        found = "none" if block is None else list(block.shape)
        raise CheckpointError(f"{file}: tensor {our_matrix(name)}.miss_block: expected {num_axes} axes, found {found}.")
    if kind == "miss_bat":
        return TileProduct(tiles=block, is_by_row=True)
    return SharedRows(rows=block, is_repeated=kind == "miss_mini")


def _official_tensors(trained: Mapping[str, Tensor], *, file: str) -> dict[str, Tensor]:
    official = {}
    for name, tensor in trained.items():
        # A matrix that also has an adapter is called its base layer.
        row = find_row(name.replace(".base_layer.", "."), is_official=False)
        if row is None:
            raise CheckpointError(f"{file}: tensor {name[:120]!r} is no parameter of an RWKV model.")
        check_numbers(name, tensor, file=file)
        official[row.official] = to_official(row, tensor)
    return official


def _any_row(name: str) -> KeyRow | None:
    return find_row(name, is_official=False) or find_row(name, is_official=True)
