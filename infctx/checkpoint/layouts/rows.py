"""A layout as data: which of its tensors is made of which official ones, and how to come back."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.tensors import StoredTensor, combined


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


class LayoutRow(NamedTuple):
    """One tensor of a layout.

    theirs: its name there. official: the official tensors it holds. write: those, in official shapes -> theirs. read:
    theirs -> those, in any shape with the same sizes but for ones. Both work on tensors without values, too.
    """

    theirs: str
    official: tuple[str, ...]
    write: Callable[[list[Tensor]], Tensor] = _only
    read: Callable[[Tensor], list[Tensor]] = _alone


def one_to_one(
    theirs: str,
    official: str,
    *,
    write: Callable[[Tensor], Tensor] | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
) -> LayoutRow:
    """A row of one official tensor; without functions its values and shape stay."""
    return LayoutRow(
        theirs,
        (official,),
        _only if write is None else lambda tensors: write(_only(tensors)),
        _alone if read is None else lambda tensor: [read(tensor)],
    )


def norm_rows(theirs: str, official: str) -> list[LayoutRow]:
    """Weight and bias of a norm."""
    return [one_to_one(f"{theirs}.{last}", f"{official}.{last}") for last in ("weight", "bias")]


def vector_row(theirs: str, official: str) -> LayoutRow:
    """A vector that is [C] there and [1, 1, C] in official files."""
    return one_to_one(theirs, official, write=lambda x: x.reshape(-1), read=lambda x: x)


def transposed_row(theirs: str, official: str) -> LayoutRow:
    """A matrix, or several in a stack, with their two axes the other way round."""
    return one_to_one(theirs, official, write=_swap_axes, read=_swap_axes)


def to_layout(rows: Sequence[LayoutRow], official: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Official tensors under the layout's names and in its shapes, in the order of its rows."""
    return {row.theirs: _changed([official[name] for name in row.official], row.write) for row in rows}


def from_layout(
    rows: Sequence[LayoutRow], theirs: Mapping[str, StoredTensor], *, file: str, layout: str
) -> dict[str, StoredTensor]:
    """The layout's tensors under official names.

    Raises: CheckpointError if one is missing or none of the layout's, naming the nearest; or has an impossible shape.
    """
    known = {row.theirs for row in rows}
    check_names(known, set(theirs), file=file, what=f"the {layout} layout")
    official: dict[str, StoredTensor] = {}
    for row in rows:
        stored = theirs[row.theirs]
        try:
            num_parts = len(row.read(torch.empty(stored.shape, dtype=stored.dtype, device="meta")))
            if num_parts != len(row.official):
                raise ValueError(f"it has {num_parts} parts")
            for index, name in enumerate(row.official):
                official[name] = stored if row.read is _alone else _part(stored, row.read, index)
        except (RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{file}: tensor {row.theirs}: found shape {list(stored.shape)}, which does not hold "
                f"{', '.join(row.official)}. The file is damaged or of another architecture."
            ) from error
    return official


def check_names(expected: set[str], found: set[str], *, file: str, what: str) -> None:
    """Refuse tensors that are missing, or that do not belong there; names the first and what comes nearest to it."""
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected or sorted(found), n=1, cutoff=0.6)
        hint = f" Nearest in the file: {near[0]}." if near else ""
        raise CheckpointError(
            f"{file}: {len(missing)} tensors are missing, first {missing[0]}; the file is incomplete.{hint}"
        )
    if unexpected:
        near = difflib.get_close_matches(unexpected[0], sorted(expected), n=1, cutoff=0.6)
        hint = f" Nearest that does: {near[0]}." if near else ""
        raise CheckpointError(
            f"{file}: {len(unexpected)} tensors do not belong to {what}, first {unexpected[0]}.{hint} "
            "Expected exactly a model's own tensors; adapters are loaded on top of a model."
        )


def _swap_axes(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _changed(parts: list[StoredTensor], change: Callable[[list[Tensor]], Tensor]) -> StoredTensor:
    return parts[0] if change is _only else combined(parts, change)


def _part(stored: StoredTensor, read: Callable[[Tensor], list[Tensor]], index: int) -> StoredTensor:
    return stored.map(lambda tensor: read(tensor)[index])
