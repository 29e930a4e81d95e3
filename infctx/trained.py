"""What a run has trained: a model to use, or a stream of tensors to export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from infctx.adapters.adapter import Adapter
from infctx.adapters.quantized_base import quantize_
from infctx.checkpoint.model_file import fingerprint, open_model, read_model_file, tensors_of
from infctx.checkpoint.run_state import load_run_state
from infctx.errors import CheckpointError
from infctx.export.adapter_files import merge_adapter, read_adapter
from infctx.export.verify import MergeDifference, merge_difference, probe_logits
from infctx.model import finch_keys
from infctx.model.finch import Finch
from infctx.model.quantized_linear import QuantizedLinear
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.recipe.load import RECIPE_FILE, load_recipe
from infctx.recipe.schema import Recipe
from infctx.run_adapter import attach_adapter, read_start, start_digest
from infctx.training.resume import AVERAGED, check_start

Base = Literal["trained", "original"]
"""What the adapter of a run with a quantised base is added to: that base, dequantised, or the weights of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A model ready for use.

    tokenizer: its name, or None where nothing says it. step: of the checkpoint, if any. fingerprint: tells other
    weights apart, whatever dtype they are used in. is_averaged: its trained weights are their moving average over the
    run. notes: what to tell.
    """

    model: Finch
    tokenizer: str | None
    step: int | None
    fingerprint: str
    is_averaged: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedForExport:
    """What is to be written.

    source: the tensors, merged as they are read. logits: `probe_logits` of the model with its adapter attached, None
    where the source itself is the reference. is_averaged: the weights are moving averages. onto, difference: of a run
    with a quantised base, what its adapter is merged onto, and how far the other merge is. notes: what to tell.
    """

    source: ModelTensors
    logits: Tensor | None = None
    is_averaged: bool = False
    onto: Base | None = None
    difference: MergeDifference | None = None
    notes: Sequence[str] = ()


def open_trained(
    path: str | Path,
    *,
    last_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> TrainedModel:
    """A model file, or a run folder with its newest checkpoint merged into its base model, which is done in float32.

    Args:
        last_weights: of a run that averages its weights (optimizer.ema_decay) take those of the last step all the same.
        dtype, device: of the parameters.
    """
    path = Path(path)
    if not (path / RECIPE_FILE).is_file():
        if last_weights:
            raise CheckpointError(f"--last-weights: {path} is not a run that averages its weights. Leave it out.")
        opened = read_model_file(path, dtype=dtype, device=device)
        return TrainedModel(model=opened.model, tokenizer=opened.tokenizer, step=None, fingerprint=opened.fingerprint)
    attached = _attach_newest(path, dtype=torch.float32, last_weights=last_weights)
    attached.adapter.merge_()
    merged_fingerprint = fingerprint(tensors_of(attached.model))
    return TrainedModel(
        model=attached.model.to(device=device, dtype=dtype).eval(),
        fingerprint=merged_fingerprint,
        tokenizer=attached.tokenizer,
        step=attached.step,
        is_averaged=attached.is_averaged,
        notes=attached.notes,
    )


def open_for_export(
    path: str | Path,
    *,
    adapter: Path | None = None,
    alpha: float | None = None,
    start: Path | None = None,
    last_weights: bool = False,
    onto: Base | None = None,
) -> OpenedForExport:
    """A model, a model with an adapter from elsewhere, or a run folder with its newest checkpoint merged into its base.

    The base stays in its file; matrices are merged one at a time, as they are read.

    Args:
        alpha, start: of `adapter`, see `read_adapter`.
        last_weights: of a run that averages its weights (optimizer.ema_decay) take those of the last step all the same.
        onto: of a run with a quantised base; None = the base it was trained on.
    """
    path = Path(path)
    if not (path / RECIPE_FILE).is_file():
        if onto is not None:
            raise CheckpointError(f"--onto {onto}: {path} was not trained on a quantised base. Leave it out.")
        if last_weights:
            raise CheckpointError(f"--last-weights: {path} is not a run that averages its weights. Leave it out.")
        source = open_model(path, is_streamed=True)
        if adapter is not None:
            changes = read_adapter(adapter, alpha=alpha, start=start)
            source = merge_adapter(source, changes, file=str(adapter))
        return OpenedForExport(source=source)
    if adapter is not None:
        raise CheckpointError(f"{path}: is a run, which has an adapter of its own; expected a model with --adapter.")
    return _open_run(path, last_weights=last_weights, onto=onto)


def _open_run(path: Path, *, last_weights: bool, onto: Base | None) -> OpenedForExport:
    attached = _attach_newest(path, dtype=None, last_weights=last_weights, onto=onto or "trained")
    if attached.recipe.model.quantize == "none":
        if onto is not None:
            raise CheckpointError(f"--onto {onto}: {path} was not trained on a quantised base. Leave it out.")
        return OpenedForExport(
            source=attached.merged(),
            logits=probe_logits(attached.model),
            is_averaged=attached.is_averaged,
            notes=attached.notes,
        )
    onto = onto or "trained"
    other = _attach_newest(
        path, dtype=None, last_weights=last_weights, onto="original" if onto == "trained" else "trained"
    )
    by_base = {onto: attached.merged(), "original" if onto == "trained" else "trained": other.merged()}
    difference = merge_difference(by_base["trained"], by_base["original"])
    kind = attached.recipe.model.quantize
    in_words = {"trained": f"the {kind} base it was trained on", "original": "the original weights"}[onto]
    told = (
        f"Merged onto {in_words}. The two merges differ by {difference.weight:.2e} of a matrix at most, and by "
        f"{difference.logit:.2e} in a logit."
    )
    return OpenedForExport(
        source=by_base[onto],
        # This kind rounds the inputs of its products, too: merged, they are computed as they are.
        logits=None if kind == "bnb-int8" and onto == "trained" else probe_logits(attached.model),
        is_averaged=attached.is_averaged,
        onto=onto,
        difference=difference,
        notes=[*attached.notes, told],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attached:
    """A run's base with its adapter on it, and the weights of its newest checkpoint in that."""

    folder: Path
    recipe: Recipe
    model: Finch
    adapter: Adapter
    tokenizer: str | None
    step: int
    is_averaged: bool
    notes: Sequence[str]

    def merged(self) -> ModelTensors:
        """The base's tensors from its file; what the adapter changes or quantisation changed, merged when read."""
        base = open_model(self.recipe.model.path, is_streamed=True)
        quantised = {f"{name}.weight" for name, m in self.model.named_modules() if isinstance(m, QuantizedLinear)}
        changed = {*self.adapter.names(), *(name.replace(".base_layer", "") for name in quantised)}
        starts = {
            "has_initial_state": self.model.has_initial_state,
            "has_initial_shifts": self.model.has_initial_shifts,
        }
        with torch.device("meta"):
            plain = Finch(base.config, **starts)
        tensors = {
            row.official: self._merged(row, plain.get_parameter(row.ours))
            if row.ours in changed or row.official not in base.tensors
            else base.tensors[row.official]
            for row in finch_keys.key_rows(base.config, **starts)
        }
        return replace(base, tensors=tensors, tokenizer=self.tokenizer, origin=str(self.folder))

    def _merged(self, row: finch_keys.KeyRow, without_values: Tensor) -> StoredTensor:
        shape = tuple(finch_keys.to_official(row, without_values).shape)

        def read() -> Tensor:
            return finch_keys.to_official(row, self.adapter.merged_parameter(row.ours).detach().float())

        return StoredTensor(shape, torch.float32, read)


def _attach_newest(
    folder: Path, *, dtype: torch.dtype | None, last_weights: bool = False, onto: Base = "trained"
) -> _Attached:
    """dtype: of the base; None = as its file has it, mapped."""
    recipe = load_recipe(folder / RECIPE_FILE)
    loaded = load_run_state(folder)
    if loaded is None:
        raise CheckpointError(f"{folder}: this run has no checkpoint yet. Let it train to its first one.")
    state = loaded.state
    if last_weights and AVERAGED not in state.tensors:
        raise CheckpointError(f"--last-weights: {folder} is not a run that averages its weights. Leave it out.")
    opened = read_model_file(recipe.model.path, dtype=dtype)
    if state.facts.get("base_fingerprint") != opened.fingerprint:
        raise CheckpointError(
            f"{folder}: model.path {recipe.model.path} is not the model this run began with: its weights differ. "
            "Put the original file back."
        )
    if onto == "trained" and recipe.model.quantize != "none":
        quantize_(opened.model, recipe.model.quantize)
    start = read_start(recipe.adapter, folder, base_fingerprint=opened.fingerprint)
    check_start(state.facts, start_digest(start), folder=folder)
    adapter = attach_adapter(recipe.adapter.resolved(), opened.model, start=start)
    is_averaged = AVERAGED in state.tensors and not last_weights
    parameters = dict(opened.model.named_parameters())
    for name, tensor in state.tensors[AVERAGED if is_averaged else "trainable"].items():
        # Mapped from the checkpoint: a full fine-tune of a large model need not fit into memory.
        parameters[name].data = tensor
    averaged = ", with the average of its trained weights (optimizer.ema_decay)" if is_averaged else ""
    notes = [f"Skipped a damaged checkpoint: {reason}" for reason in loaded.skipped]
    notes.append(f"{folder}: the model of step {state.step:,}{averaged}.")
    tokenizer = state.facts.get("tokenizer")
    return _Attached(
        folder=folder,
        recipe=recipe,
        model=opened.model.eval(),
        adapter=adapter,
        tokenizer=tokenizer if isinstance(tokenizer, str) else None,
        step=state.step,
        is_averaged=is_averaged,
        notes=notes,
    )
