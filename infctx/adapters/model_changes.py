"""All that an adapter changes in a model, under official names, and the model with it applied, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from infctx.adapters.weight_updates import Update
from infctx.errors import CheckpointError
from infctx.model.finch_keys import is_initial_shift, is_time_state, key_rows, layer_of, start_parameters
from infctx.model.tensors import ModelTensors, StoredTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChanges:
    """What an adapter file holds.

    kind: lora, pissa, dora, disha, disha_bat, miss_bat, miss_mini, state, or parameters (tensors alone).
    updates: by the official name of a matrix without `.weight`. replaced: tensors that take the place of the base's, by
    official name. alpha: None where the kind has none, or nothing tells it. base_fingerprint: of the base it belongs
    to, where the file tells it. is_in_every_layer: a matrix that is changed in one layer has to be changed in all; else
    something is missing.
    """

    kind: str
    updates: Mapping[str, Update] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None
    base_fingerprint: str | None = None
    is_in_every_layer: bool = False

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending."""
        return sorted({update.rank for update in self.updates.values()})


def apply_to(base: ModelTensors, changes: ModelChanges, *, file: str) -> ModelTensors:
    """The base with every change in it; each merged tensor is computed when it is read, in float32 or wider.

    Args: file: where the changes are from, for messages.
    Raises: CheckpointError where they do not fit: names the tensor, what was expected and what was found.
    """
    _check_layers(base, changes, file=file)
    replaced = {name: _fitted(name, tensor, base, file=file) for name, tensor in changes.replaced.items()}
    starts = start_parameters({**base.tensors, **replaced})
    tensors = {}
    for row in key_rows(base.config, **starts):
        name = row.official
        if name not in replaced and name not in base.tensors:
            raise CheckpointError(f"{file}: {name} is missing; expected it in all {base.config.n_layer} layers.")
        stored = StoredTensor.of(replaced[name]) if name in replaced else base.tensors[name]
        update = changes.updates.get(name.removesuffix(".weight"))
        tensors[name] = stored if update is None else _updated(name, stored, update, file=file)
    return replace(base, tensors=tensors)


def _check_layers(base: ModelTensors, changes: ModelChanges, *, file: str) -> None:
    last = base.config.n_layer - 1
    for name in [*(f"{matrix}.weight" for matrix in changes.updates), *changes.replaced]:
        layer = layer_of(name)
        if layer is not None and layer > last:
            raise CheckpointError(f"{file}: {name}: expected layers 0 to {last}, as in the base {base.origin}.")
        if name not in base.tensors and not (is_time_state(name) or is_initial_shift(name)):
            raise CheckpointError(
                f"{file}: {name}: the base {base.origin}, an RWKV-{base.config.version} model, has no such tensor. "
                "Give the base it was trained on."
            )
    if not changes.is_in_every_layer:
        return
    for part in sorted({name.split(".", 2)[2] for name in changes.updates}):
        having = [i for i in range(last + 1) if f"blocks.{i}.{part}.weight" in base.tensors]
        missing = [i for i in having if f"blocks.{i}.{part}" not in changes.updates]
        if missing:
            raise CheckpointError(
                f"{file}: blocks.{missing[0]}.{part} has no adapter, and other layers have; expected one in each "
                f"of the {len(having)} layers of the base that have it. The file is incomplete, or belongs to a base "
                "of fewer layers."
            )


def _fitted(name: str, tensor: Tensor, base: ModelTensors, *, file: str) -> Tensor:
    """A whole tensor in the shape official files give it; squeezed ones are accepted."""
    size = base.config.head_size
    of_starts = (base.config.n_embd,) if is_initial_shift(name) else (base.config.n_head, size, size)
    expected = base.tensors[name].shape if name in base.tensors else of_starts
    if [n for n in tensor.shape if n != 1] != [n for n in expected if n != 1]:
        raise CheckpointError(
            f"{file}: tensor {name}: expected shape {list(expected)}, as in {base.origin}; found {list(tensor.shape)}. "
            "Give the base it was trained on."
        )
    return tensor.reshape(expected)


def _updated(name: str, stored: StoredTensor, update: Update, *, file: str) -> StoredTensor:
    for part in update.parts(stored.shape):
        if not part.fits:
            raise CheckpointError(
                f"{file}: tensor {name.removesuffix('weight')}{part.name}: expected shape "
                f"[{', '.join(map(str, part.expected))}] for a matrix {list(stored.shape)}; found "
                f"{list(part.tensor.shape)}. Give the base it was trained on."
            )
    changed = update.merged_dtype(stored.dtype)
    return StoredTensor(stored.shape, changed, lambda: update.apply(stored.read()))
