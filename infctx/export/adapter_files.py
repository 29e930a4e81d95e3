"""Adapters in and out: RWKV-PEFT's .pth with a note of ours beside it, and folders in peft's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infctx.adapters.adapter import Adapter
from infctx.adapters.adapter_folder import (
    FACTS_FILE,
    PEFT_CONFIG,
    PEFT_TENSORS,
    TRAINED_PARAMETERS,
    AdapterFacts,
    read_facts,
    write_facts,
)
from infctx.adapters.load import load_adapter as attach_saved
from infctx.adapters.model_changes import ModelChanges, apply_to
from infctx.adapters.peft_folder.contents import PeftFolder
from infctx.adapters.peft_folder.read import from_peft
from infctx.adapters.peft_folder.write import to_peft
from infctx.adapters.rwkv_peft.read import read_rwkv_peft, with_alpha, with_start
from infctx.adapters.rwkv_peft.write import to_rwkv_peft
from infctx.checkpoint.atomic import replace_directory, write_file_atomically
from infctx.checkpoint.model_file import fingerprint, tensors_of
from infctx.checkpoint.weights import read_tensors, write_pth, write_safetensors
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors

NOTE_FORMAT = "infctx adapter note"
_RECIPE_FILE, _RUN_ADAPTER = "recipe.yaml", "adapter"
_MAX_JSON_BYTES = 4 << 20
_README = f"""# An adapter of an RWKV model

Made by `infctx adapter import`. Its `{FACTS_FILE}` tells the base model it belongs to; it is of use with no other.
Matrices are in peft's layout, if there are any:

    model = peft.PeftModel.from_pretrained(infctx.load_model(BASE), THIS_FOLDER)

Tensors that were trained as they are, if any, are in `{TRAINED_PARAMETERS}`, under infctx's names. To merge everything:

    infctx export BASE --adapter THIS_FOLDER --output merged.pth
"""


def read_adapter(path: Path, *, alpha: float | None = None, start: Path | None = None) -> ModelChanges:
    """An adapter, ready to be applied.

    Args:
        path: a .pth of RWKV-PEFT, a folder in peft's layout, or a run folder.
        alpha: of a LoRA, where nothing beside the file tells it.
        start: the second file of a PiSSA, init_pissa.pth.
    Raises:
        CheckpointError: names the file, the tensor, what was expected and what was found.
    """
    changes = read_as_stored(path)
    if start is not None:
        if alpha is not None:
            raise CheckpointError(f"{path}: --alpha {alpha:g} means nothing for a PiSSA; leave it out, or --init.")
        if changes.alpha is not None:
            raise CheckpointError(
                f"{path}: --init is for a PiSSA; what is saved with this file says that it is a LoRA."
            )
        tensors, _ = read_tensors(start)
        return with_start(changes, tensors, file=str(path), start_file=str(start))
    return with_alpha(changes, alpha, file=str(path))


def read_as_stored(path: Path) -> ModelChanges:
    """The same without what the file does not tell: the scale of a LoRA may be missing."""
    if (path / _RECIPE_FILE).is_file():
        if not (path / _RUN_ADAPTER).is_dir():
            raise CheckpointError(
                f"{path}: this run has no {_RUN_ADAPTER}/ folder: it trains all weights, or has not come to its first "
                "checkpoint. infctx export writes its model."
            )
        path = path / _RUN_ADAPTER
    if path.is_dir():
        return _read_folder(path)
    tensors, _ = read_tensors(path)
    changes = read_rwkv_peft(tensors, file=str(path))
    note = _note_beside(path)
    if note is None:
        return changes
    if note.get("kind") != changes.kind:
        raise CheckpointError(
            f"{note_path(path)}: says kind {str(note.get('kind'))[:40]!r}; the file's is {changes.kind}."
        )
    changes = replace(changes, base_fingerprint=_text(note, "base_fingerprint"), is_in_every_layer=False)
    alpha = note.get("alpha")
    if alpha is None or changes.kind != "lora":
        return changes
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{note_path(path)}: alpha: expected a number, found {str(alpha)[:40]!r}.")
    return with_alpha(changes, float(alpha), file=str(path))


def load_adapter(model: Finch, folder: str | Path) -> Adapter:
    """Put a saved adapter on the base model it was trained on: the adapter/ of a run, or a folder that peft wrote.

    Args:
        model: of `load_model`, in a dtype that holds the file's values; changed in place.
        folder: in peft's layout, or with tuned states.
    Returns:
        The adapter; `merge_()` folds it into the model, `save(folder)` writes it.
    Raises:
        CheckpointError: not an adapter, one of another base, or one that does not fit.
    """
    return attach_saved(model, folder, base_fingerprint=fingerprint(tensors_of(model)))


def merge_adapter(base: ModelTensors, changes: ModelChanges, *, file: str) -> ModelTensors:
    """The base with an adapter in it, computed one tensor at a time as it is read.

    Raises: CheckpointError where it belongs to another base, as far as the files tell, or does not fit this one.
    """
    if changes.base_fingerprint is not None and changes.base_fingerprint != fingerprint(base):
        raise CheckpointError(
            f"{file}: belongs to the base of fingerprint {changes.base_fingerprint}; found {fingerprint(base)}, "
            f"{base.origin}. Give the model it was trained on."
        )
    return apply_to(base, changes, file=file)


def write_adapter_folder(
    changes: ModelChanges, folder: Path, *, base: ModelTensors, file: str, force: bool = False
) -> None:
    """Write a folder in peft's layout, whole or not at all; a tuned state as tensors alone.

    Args: file: what the changes are from, for messages. force: replace a folder that holds an adapter.
    Raises: CheckpointError if it does not fit the base, peft has no counterpart, or the folder exists.
    """
    merge_adapter(base, changes, file=file)
    with torch.device("meta"):
        shapes = {
            name: x.shape
            for name, x in Finch(base.config, has_initial_state=True, has_initial_shifts=True).named_parameters()
        }
    content = to_peft(changes, shapes, file=file)
    facts = _facts(changes, content.config, base_fingerprint=fingerprint(base))

    def build(unfinished: Path) -> None:
        if content.config is not None:
            (unfinished / PEFT_CONFIG).write_text(json.dumps(content.config, indent=2, sort_keys=True) + "\n")
            write_safetensors(unfinished / PEFT_TENSORS, content.tensors, {"format": "pt"})
        if content.trained:
            write_safetensors(unfinished / TRAINED_PARAMETERS, content.trained, {"format": "pt"})
        write_facts(unfinished, facts)
        (unfinished / "README.md").write_text(_README)

    _check_folder(folder, force=force)
    replace_directory(folder, build, overwrite=force)


def write_rwkv_peft(
    changes: ModelChanges, path: Path, *, dtype: torch.dtype | None, file: str, force: bool = False
) -> dict[str, Any]:
    """Write a .pth of RWKV-PEFT and, beside it, NAME.json with what the format has no place for.

    Args: dtype: of every tensor; None = bf16 for a state, else as in the source. file: the source, for messages.
    Returns: the note.
    Raises: CheckpointError for what the format cannot hold, or an output that exists without force.
    """
    for output in (path, note_path(path)):
        if output.is_dir() or (output.exists() and not force):
            raise CheckpointError(f"{output}: exists. Give another path, or --force to replace a file.")
    if path.suffix != ".pth" or not path.parent.is_dir():
        raise CheckpointError(f"{path}: expected a name that ends in .pth, in a folder that exists.")
    written = to_rwkv_peft(changes, file=file)
    dtype = torch.bfloat16 if dtype is None and written.kind == "state" else dtype
    tensors = {name: _converted(name, tensor, dtype, file=file) for name, tensor in written.tensors.items()}
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A")}
    write_pth(path, tensors)
    note = {
        "format": NOTE_FORMAT,
        "kind": written.kind,
        "alpha": written.alpha,
        "ranks": sorted(ranks) if ranks else changes.ranks,
        "base_fingerprint": changes.base_fingerprint,
        "sha256": _sha256(path),
    }
    text = json.dumps(note, indent=1) + "\n"
    write_file_atomically(note_path(path), lambda unfinished: unfinished.write_text(text))
    return note


def note_path(path: Path) -> Path:
    """Where the note of a .pth is: NAME.json beside NAME.pth."""
    return path.with_suffix(".json")


def describe_adapter(path: Path) -> dict[str, Any]:
    """What an adapter holds, read from its tensors; alpha is None where nothing tells it."""
    changes = read_as_stored(path)
    matrices = sorted(changes.updates)
    tensors = [part.tensor for update in changes.updates.values() for part in update.parts((1, 1))]
    tensors += changes.replaced.values()
    return {
        "path": str(path),
        "kind": changes.kind,
        "ranks": changes.ranks,
        "alpha": changes.alpha,
        "matrices": len(matrices),
        "parts": sorted({name.split(".", 2)[-1] for name in matrices}),
        "trained_beside": sorted(changes.replaced),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "base_fingerprint": changes.base_fingerprint,
    }


def _read_folder(folder: Path) -> ModelChanges:
    config_path, weights, trained = folder / PEFT_CONFIG, folder / PEFT_TENSORS, folder / TRAINED_PARAMETERS
    if not config_path.is_file() and not trained.is_file():
        raise CheckpointError(
            f"{folder}: expected an adapter: {PEFT_CONFIG} with {PEFT_TENSORS}, or {TRAINED_PARAMETERS}."
        )
    config = _read_json(config_path) if config_path.is_file() else None
    if config is not None and not weights.is_file():
        raise CheckpointError(f"{folder}: {PEFT_TENSORS} is missing; {PEFT_CONFIG} is there. Fetch or save it again.")
    tensors = {} if config is None else read_tensors(weights)[0]
    beside = read_tensors(trained)[0] if trained.is_file() else {}
    facts = read_facts(folder)
    content = PeftFolder(config, tensors, beside)
    return from_peft(content, file=str(folder), base_fingerprint=None if facts is None else facts.base_fingerprint)


def _facts(changes: ModelChanges, config: Mapping[str, Any] | None, *, base_fingerprint: str) -> AdapterFacts:
    if config is None:
        return AdapterFacts(kind=changes.kind, base_fingerprint=base_fingerprint)
    return AdapterFacts(
        kind="miss" if config["peft_type"] == "MISS" else "lora",
        base_fingerprint=base_fingerprint,
        rank=config["r"],
        alpha=config.get("lora_alpha"),
        ranks=config.get("rank_pattern", {}),
    )


def _note_beside(path: Path) -> dict[str, Any] | None:
    """Our note of a file; another program's JSON of that name is none."""
    beside = note_path(path)
    if not beside.is_file():
        return None
    note = _read_json(beside)
    if note.get("format") != NOTE_FORMAT:
        return None
    if note.get("sha256") != _sha256(path):
        raise CheckpointError(
            f"{beside}: tells of another content of {path.name}: its SHA-256 differs. Remove the note, or fetch "
            "both again."
        )
    return note


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not a table")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error)[:160]}. Fetch or save it again.") from error
    return content


def _text(note: Mapping[str, Any], key: str) -> str | None:
    value = note.get(key)
    return value if isinstance(value, str) else None


def _converted(name: str, tensor: Tensor, dtype: torch.dtype | None, *, file: str) -> Tensor:
    converted = tensor if dtype is None else tensor.to(dtype)
    if not bool(torch.isfinite(converted).all()):
        raise CheckpointError(f"{file}: tensor {name}: has values beyond {dtype}. Give --dtype bf16 or fp32.")
    return converted


def _check_folder(folder: Path, *, force: bool) -> None:
    if not folder.parent.is_dir():
        raise CheckpointError(f"{folder}: the folder {folder.parent} does not exist. Create it first.")
    if not folder.exists():
        return
    is_adapter = any((folder / name).is_file() for name in (PEFT_CONFIG, FACTS_FILE, TRAINED_PARAMETERS))
    if not force or not is_adapter:
        hint = "or --force to replace an adapter" if is_adapter else "it holds no adapter that --force could replace"
        raise CheckpointError(f"{folder}: exists. Give another folder; {hint}.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
