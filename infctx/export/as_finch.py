"""Formats that know Finch only: an Eagle goes into them as the Finch that computes the same."""

from __future__ import annotations

from infctx.errors import CheckpointError
from infctx.model.tensors import ModelTensors
from infctx.surgery.upgrade import upgrade_to_finch


def as_finch(source: ModelTensors) -> ModelTensors:
    """The model itself, or its exact upgrade.

    Raises: CheckpointError: the model is neither a Finch nor an Eagle.
    """
    if source.config.version not in ("6", "5.2"):
        raise CheckpointError(
            f"{source.origin}: the format knows Finch only, and no Finch computes what a {source.config.name} does. "
            "Write it as .pth or .safetensors."
        )
    return source if source.config.version == "6" else upgrade_to_finch(source)
