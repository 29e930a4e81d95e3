"""The contents of a peft adapter folder, and how its names and modes relate to the official ones."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from infctx.model.finch_keys import find_row

PREFIX = "base_model.model."
OTHER_BAT = (
    "peft's MiSS in its \"bat\" mode has a tile for each row of tiles of the matrix, RWKV-PEFT's DiSHA in its mode of "
    "that name one for each column: two functions, neither of which can say what the other does"
)


class PeftFolder(NamedTuple):
    """The contents of a folder: adapter_config.json, adapter_model.safetensors, and tensors trained as they are.

    config is None and tensors are empty where there is no adapter of peft.
    """

    config: dict[str, Any] | None
    tensors: dict[str, Tensor]
    trained: dict[str, Tensor]


def our_matrix(official: str) -> str:
    """Our name of a matrix, both without `.weight`."""
    row = find_row(f"{official}.weight", is_official=True)
    assert row is not None
    return row.ours.removesuffix(".weight")
