"""The adapter section of a recipe on a model, and what a run folder keeps of how it began."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from infctx.adapters.adapter import Adapter
from infctx.adapters.catalog import ATTACH
from infctx.adapters.peft_kinds import PeftSettings
from infctx.checkpoint.atomic import replace_directory
from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.errors import CheckpointError, RecipeError
from infctx.model.finch import Finch
from infctx.recipe.adapter_section import AdapterSection
from infctx.training.averaged_weights import AveragedWeights

START_FILE = "adapter_start.safetensors"
_AVERAGED_NOTE = """
Its weights are their moving average over the run (`optimizer.ema_decay`), not those of the last step.
"""
_BASE_KEY = "infctx.base_fingerprint"


def attach_adapter(
    section: AdapterSection,
    model: Finch,
    *,
    start: Mapping[str, Tensor] | None = None,
    frozen_dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Make the weights trainable that a resolved section says, and put on the model what it says.

    Args:
        start: what `read_start` gave; None = a new run, or a kind that needs none.
        frozen_dtype: of the weights that are not trained.
    """
    states = {"initial_state": section.initial_state, "initial_shifts": section.initial_shifts}
    if section.kind == "full":
        return ATTACH["full"](model, freeze=section.freeze, **states)
    if section.kind == "state":
        return ATTACH["state"](model, initial_shifts=section.initial_shifts)
    settings = PeftSettings(
        kind=section.kind,
        targets=_targets(section, model),
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        ranks=section.ranks,
        alphas=section.alphas,
        train_also=section.train_also,
        svd_iterations=section.svd_iterations,
        miss_init=section.miss_init,
        miss_mini_rank=section.miss_mini_rank,
        **states,
    )
    return ATTACH[section.kind](model, settings, start=start, frozen_dtype=frozen_dtype)


def _targets(section: AdapterSection, model: Finch) -> list[str]:
    """Those of the section; its default is every matrix of the time mix that there is, whatever the kind of block."""
    default = AdapterSection.model_fields["targets"].default
    if section.targets != default:
        return section.targets
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in (*default, "query") if name in names]


def start_of(adapter: Adapter) -> dict[str, Tensor] | None:
    """What the adapter took out of the matrices when it began; None where it took nothing."""
    return getattr(adapter, "start", None)


def start_digest(start: Mapping[str, Tensor] | None) -> str | None:
    """Tells what one adapter began with from what another did; None for nothing."""
    if start is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(start):
        digest.update(f"{name} {list(start[name].shape)}".encode())
        digest.update(start[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_start(section: AdapterSection, folder: Path, *, base_fingerprint: str) -> dict[str, Tensor] | None:
    """What the adapter of the run in a folder began with; None where there is none yet, or the kind needs none.

    Raises:
        CheckpointError: it belongs to another base model, or is damaged, or is gone although the run has checkpoints.
    """
    if section.kind not in ("pissa", "olora"):
        return None
    path = folder / START_FILE
    if not path.is_file():
        if (folder / "checkpoints" / "latest").is_file():
            raise CheckpointError(
                f"{path}: is missing, and the checkpoints of this run are worth nothing without it. Put it back, or "
                "start beside this run with --fresh."
            )
        return None
    tensors, metadata = read_safetensors(path)
    found = metadata.get(_BASE_KEY)
    if found != base_fingerprint:
        raise CheckpointError(
            f"{path}: belongs to the base model with fingerprint {found}; model.path has {base_fingerprint}. Put the "
            "original model back, or start beside this run with --fresh."
        )
    return tensors


def keep_start(adapter: Adapter, folder: Path, *, base_fingerprint: str) -> None:
    """Write what the adapter began with, once; the caller holds the lock of the run folder.

    Raises:
        RecipeError: another process has begun this run since the adapter was attached.
    """
    start = start_of(adapter)
    if start is None:
        return
    path = folder / START_FILE
    if not path.is_file():
        write_safetensors(path, {name: start[name].cpu() for name in sorted(start)}, {_BASE_KEY: base_fingerprint})
        return
    kept, _ = read_safetensors(path)
    if kept.keys() != start.keys() or not all(torch.equal(kept[name], start[name].cpu()) for name in kept):
        raise RecipeError(f"run.folder: {folder}: another process has begun this run just now. Start it again.")


def adapter_writer(
    adapter: Adapter, model: Finch, folder: Path, *, base_fingerprint: str, averaged: AveragedWeights | None = None
) -> Callable[[Mapping[str, Tensor] | None], None]:
    """Writes the adapter folder anew, of the averages if there are any; a full fine-tune has none.

    What it gives takes whole weights, or whole averages, by their names in the model, where the model has only parts.
    """

    def build(unfinished: Path, whole: Mapping[str, Tensor] | None) -> None:
        if whole is not None:
            weights = _in_place_of_parts(model, whole)
        else:
            weights = nullcontext() if averaged is None else averaged.in_place()
        with weights:
            adapter.save(unfinished, base_fingerprint=base_fingerprint)
        if averaged is None:
            return
        with (unfinished / "README.md").open("a", encoding="utf-8") as readme:
            readme.write(_AVERAGED_NOTE)

    def write(whole: Mapping[str, Tensor] | None = None) -> None:
        if adapter.has_files:
            replace_directory(folder, lambda unfinished: build(unfinished, whole), overwrite=True)

    return write


@contextmanager
def _in_place_of_parts(model: Finch, whole: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, the model has whole tensors for its parameters of these names; nothing computes with it."""
    parts = []
    for name, tensor in whole.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        parts.append((module, last, module._parameters[last]))
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for module, last, part in parts:
            module._parameters[last] = part
