"""An optimizer's state as named tensors and plain numbers, which is what a checkpoint can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, int | float | bool]


def split_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Numbers]:
    """Every tensor and every number of the state, named by its place: "3.exp_avg" is of the fourth parameter.

    The tensors are the optimizer's own, where they are. Together they are everything, to the bit.
    """
    tensors: dict[str, Tensor] = {}
    numbers: Numbers = {}

    def collect(place: str, value: object) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                assert "." not in str(name), f"{name!r} would be read as two places"
                collect(f"{place}.{name}", inner)
        elif isinstance(value, Tensor):
            tensors[place] = value
        else:
            assert isinstance(value, bool | int | float), f"{place}: a {type(value).__name__} in an optimizer's state"
            numbers[place] = value

    for index, values in optimizer.state_dict()["state"].items():
        collect(str(index), values)
    return tensors, numbers


def join_state_(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Give an optimizer over the same parameters the state that `split_state` gave; an empty one is left as it is."""
    state: dict[int, Any] = {}
    for place, value in [*tensors.items(), *numbers.items()]:
        index, *inner, name = place.split(".")
        values = state.setdefault(int(index), {})
        for part in inner:
            values = values.setdefault(part, {})
        values[name] = value
    if state:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
