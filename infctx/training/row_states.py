"""The carried states of a step's rows as named tensors, a row at a time: any number of ranks finds its own again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infctx.model.state import CACHE_FIELDS, RECURRENT_FIELDS, ModelState
from infctx.model.state import join_rows as _joined


def split_rows(states: Sequence[ModelState], first_row: int) -> dict[str, Tensor]:
    """Name every row's state: "7.wkv" is of the step's row 7.

    Args:
        states: of each group of rows, in order; all groups have as many.
        first_row: the number of the first of them among the step's rows. Of a data-parallel rank: the rank × rows in a
            group × groups.
    Returns: tensors [L, 1, ...] on the CPU, to the bit.
    """
    rows_per_group = {state.wkv.shape[1] for state in states}
    assert len(rows_per_group) <= 1, f"groups of {sorted(rows_per_group)} rows"
    tensors: dict[str, Tensor] = {}
    row = first_row
    for state in states:
        on_host = [tensor.detach().cpu() for tensor in state]
        for index in range(state.wkv.shape[1]):
            for name, tensor in zip(state.fields, on_host, strict=True):
                tensors[f"{row}.{name}"] = tensor[:, index : index + 1]
            row += 1
    return tensors


def num_rows(tensors: Mapping[str, Tensor]) -> int:
    """How many rows have their states among these."""
    return sum(name.endswith(f".{RECURRENT_FIELDS[0]}") for name in tensors)


def join_rows(
    tensors: Mapping[str, Tensor],
    *,
    first_row: int,
    rows_per_group: int,
    num_groups: int,
    device: torch.device | str,
) -> list[ModelState]:
    """Put rows together again as `split_rows` found them, in groups of any number.

    Args: tensors: at least those of the rows from `first_row` on; others are left alone.
    Returns: a state of `rows_per_group` rows for each group, on the device.
    """
    states = []
    for group in range(num_groups):
        first = first_row + group * rows_per_group
        rows = range(first, first + rows_per_group)
        states.append(_joined([_state_of(tensors, row) for row in rows]).to(device))
    return states


def _state_of(tensors: Mapping[str, Tensor], row: int) -> ModelState:
    cache = (f"{row}.{name}" for name in CACHE_FIELDS)
    recurrent = (tensors[f"{row}.{name}"] for name in RECURRENT_FIELDS)
    return ModelState(*recurrent, *(tensors[name] for name in cache if name in tensors))
