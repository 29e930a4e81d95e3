"""Read RWKV-PEFT's adapters: flat dicts of tensors under official names, whose kind follows from the names.

    blocks.0.att.key.lora_A        [r, in]          LoRA and PiSSA, with lora_B [out, r]
    blocks.0.att.key.disha         [r, out]         DiSHA; "bone" in older files
    blocks.0.att.key.disha         [in / r, r, r]   its "bat" mode
    blocks.0.att.time_state        [H, N, N]        state tuning, value axis before key axis
    blocks.0.att.key.init_lora_A   [r, in]          PiSSA's second file, init_pissa.pth

Source of the format: train.py, rwkvt/peft/rwkvLinear.py and merge/ of RWKV-PEFT. Alpha is in none of these files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from infctx.adapters.model_changes import ModelChanges
from infctx.adapters.patterns import nearest_names
from infctx.adapters.weight_updates import LowRank, SharedRows, Start, TileProduct, Update, check_numbers
from infctx.errors import CheckpointError
from infctx.model.finch_keys import BLOCK_MATRICES, find_row, is_initial_shift, is_time_state, official_names_of_layer_0

# Left on the names by DeepSpeed, Lightning and peft.
_PREFIXES = ("_forward_module.", "base_model.model.", "model.")
_START_DOWN, _START_UP = "init_lora_A", "init_lora_B"
_PART = re.compile(r"(.+)\.(lora_A|lora_B|init_lora_A|init_lora_B|disha|bone)(?:\.default)?(?:\.weight)?")
_KIND_OF_PART = {"lora_A": "lora", "lora_B": "lora", _START_DOWN: "start", _START_UP: "start", "disha": "disha"}
HOW_TO_FIND_ALPHA = (
    "The file does not hold it: it is lora_alpha of the lora_config, or --lora_alpha, that the training was started "
    "with; RWKV-PEFT's scripts have 32, older ones 128. The merged matrix is W + B A · alpha / rank"
)


def read_rwkv_peft(tensors: Mapping[str, Tensor], *, file: str) -> ModelChanges:
    """What a file of RWKV-PEFT changes. LoRA comes without its scale: see `with_alpha` and `with_start`.

    Args: tensors: as in the file. file: its name, for messages.
    Raises: CheckpointError for names that are unknown, twice there or of several kinds, for tensors without their
    counterpart, of another dtype, not finite or empty.
    """
    parts, whole = _sort(tensors, file=file)
    kinds = {_KIND_OF_PART[part] for found in parts.values() for part in found}
    if "start" in kinds:
        raise CheckpointError(
            f"{file}: holds init_lora_A and init_lora_B, what a PiSSA training began with. Give the trained file "
            "(rwkv-N.pth) as the adapter, and this one as --init."
        )
    if len(kinds) > 1:
        raise CheckpointError(f"{file}: expected adapters of one kind; found LoRA and DiSHA tensors in one file.")
    if not kinds:
        return _of_whole_tensors(whole, file=file)
    updates = {name: _update(name, found, file=file) for name, found in parts.items()}
    _check_all(parts, whole, file=file)
    kind = kinds.pop()
    if kind == "disha":
        forms = {type(update) for update in updates.values()}
        if len(forms) > 1:
            raise CheckpointError(f"{file}: expected DiSHA tensors of 2 axes, or all of 3; found both.")
        kind = "disha_bat" if TileProduct in forms else "disha"
    return ModelChanges(kind=kind, updates=updates, replaced=whole, is_in_every_layer=True)


def with_alpha(changes: ModelChanges, alpha: float | None, *, file: str) -> ModelChanges:
    """The same with alpha known: delta W = B A · alpha / rank, each matrix by its own rank.

    Raises: CheckpointError if it is missing, not above 0, differs from what the file's folder tells, or means nothing.
    """
    if changes.kind != "lora":
        if alpha is not None:
            raise CheckpointError(f"{file}: --alpha {alpha:g} means nothing for an adapter of kind {changes.kind}.")
        return changes
    if changes.alpha is not None:
        if alpha not in (None, changes.alpha):
            raise CheckpointError(f"{file}: --alpha {alpha:g}: what is saved with the file says {changes.alpha:g}.")
        return changes
    if alpha is None:
        raise CheckpointError(
            f"{file}: expected --alpha. {HOW_TO_FIND_ALPHA}. If this is a PiSSA, give --init init_pissa.pth instead."
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise CheckpointError(f"{file}: --alpha {alpha:g}: expected a number above 0. {HOW_TO_FIND_ALPHA}.")
    return replace(changes, updates=_rescaled(changes, alpha), alpha=alpha)


def with_start(changes: ModelChanges, start: Mapping[str, Tensor], *, file: str, start_file: str) -> ModelChanges:
    """A PiSSA of its two files: W - init_B init_A + B A, without a scale.

    Args: start: the second file's tensors.
    Raises: CheckpointError if it is no such file, or belongs to another training.
    """
    if changes.kind != "lora":
        raise CheckpointError(
            f"{file}: --init means nothing for an adapter of kind {changes.kind}; PiSSA alone has it."
        )
    parts, whole = _sort(start, file=start_file)
    if whole or any(_KIND_OF_PART[part] != "start" for found in parts.values() for part in found):
        raise CheckpointError(
            f"{start_file}: --init: expected init_lora_A and init_lora_B of each matrix, as in init_pissa.pth."
        )
    different = sorted(parts.keys() ^ changes.updates.keys())
    if different:
        raise CheckpointError(
            f"{start_file}: --init: expected the matrices of {file}; {different[0]} is in one of the two only. "
            "Give the init_pissa.pth of the same training."
        )
    _check_all(parts, {}, file=start_file)
    updates: dict[str, Update] = {}
    for name, update in changes.updates.items():
        assert isinstance(update, LowRank)
        down, up = _pair(name, parts[name], (_START_DOWN, _START_UP), file=start_file)
        if down.shape != update.down.shape or up.shape != update.up.shape:
            raise CheckpointError(
                f"{start_file}: tensor {name}.{_START_DOWN}: expected shape {list(update.down.shape)}, as in {file}; "
                f"found {list(down.shape)} (and {list(up.shape)} for {_START_UP})."
            )
        updates[name] = replace(update, scale=1.0, start=Start(down, up))
    return replace(changes, kind="pissa", updates=updates)


def _sort(tensors: Mapping[str, Tensor], *, file: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Parts of adapters by matrix, and whole tensors by official name."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        name = _without_prefixes(key)
        match = _PART.fullmatch(name)
        if match is not None and _is_block_matrix(match[1]):
            found, place = parts.setdefault(match[1], {}), match[2].replace("bone", "disha")
        elif find_row(name, is_official=True) is not None and not is_initial_shift(name):
            found, place = whole, name
        else:
            unknown.append(name)
            continue
        if place in found:
            raise CheckpointError(f"{file}: tensor {name} is there twice, once as {key[:120]!r}; expected it once.")
        found[place] = tensor
    if unknown:
        raise CheckpointError(_about_unknown(unknown, file=file))
    return parts, whole


def _check_all(parts: dict[str, dict[str, Tensor]], whole: dict[str, Tensor], *, file: str) -> None:
    for matrix, found in parts.items():
        for part, tensor in found.items():
            check_numbers(f"{matrix}.{part}", tensor, file=file)
    for name, tensor in whole.items():
        check_numbers(name, tensor, file=file)


def _without_prefixes(key: str) -> str:
    while (prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)) is not None:
        key = key.removeprefix(prefix)
    return key


def _is_block_matrix(name: str) -> bool:
    row = find_row(f"{name}.weight", is_official=True)
    return row is not None and name.split(".", 2)[-1] in BLOCK_MATRICES


def _about_unknown(unknown: list[str], *, file: str) -> str:
    known = [f"blocks.0.{matrix}.{part}" for matrix in BLOCK_MATRICES for part in ("lora_A", "lora_B", "disha")]
    shown = ", ".join(repr(name[:100]) for name in unknown[:3]) + (", …" if len(unknown) > 3 else "")
    layerless = re.sub(r"^blocks\.\d+\.", "blocks.0.", unknown[0][:100])
    near = nearest_names(layerless.replace("blocks.0.", "blocks.*."), [*known, *official_names_of_layer_0()])
    return f"{file}: {len(unknown)} names are none of RWKV-PEFT's adapters, {shown}. {near}"


def _of_whole_tensors(whole: dict[str, Tensor], *, file: str) -> ModelChanges:
    if not whole:
        raise CheckpointError(f"{file}: holds no tensors; expected an adapter.")
    if all(map(is_time_state, whole)):
        _check_all({}, whole, file=file)
        return ModelChanges(kind="state", replaced=whole)
    first = next(name for name in whole if not is_time_state(name))
    raise CheckpointError(
        f"{file}: expected the tensors of a LoRA, a DiSHA or a tuned state; found a model's own alone, as {first}. "
        "A whole model is no adapter: give it to infctx export as the model."
    )


def _update(name: str, found: dict[str, Tensor], *, file: str) -> Update:
    if "disha" not in found:
        down, up = _pair(name, found, ("lora_A", "lora_B"), file=file)
        return LowRank(down=down, up=up, scale=None)
    disha = found["disha"]
    if disha.dim() == 2:
        return SharedRows(rows=disha)
    if disha.dim() == 3 and disha.shape[1] == disha.shape[2]:
        return TileProduct(tiles=disha)
    raise CheckpointError(
        f"{file}: tensor {name}.disha: expected shape [r, out], or [in / r, r, r]; found {list(disha.shape)}."
    )


def _pair(name: str, found: dict[str, Tensor], parts: tuple[str, str], *, file: str) -> tuple[Tensor, Tensor]:
    for part, other in (parts, parts[::-1]):
        if part not in found:
            raise CheckpointError(f"{file}: tensor {name}.{part} is missing; {name}.{other} is there.")
        if found[part].dim() != 2:
            raise CheckpointError(
                f"{file}: tensor {name}.{part}: expected 2 axes, found shape {list(found[part].shape)}."
            )
    down, up = found[parts[0]], found[parts[1]]
    if down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{file}: tensor {name}.{parts[1]}: expected shape [out, {down.shape[0]}], the rank of {parts[0]} "
            f"{list(down.shape)}; found {list(up.shape)}."
        )
    return down, up


def _rescaled(changes: ModelChanges, alpha: float) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    for name, update in changes.updates.items():
        assert isinstance(update, LowRank)
        updates[name] = replace(update, scale=alpha / update.rank)
    return updates
