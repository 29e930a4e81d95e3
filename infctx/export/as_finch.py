"""Formats that know Finch only: an Eagle goes into them as the Finch that computes the same."""

from __future__ import annotations

from infctx.model.tensors import ModelTensors
from infctx.surgery.upgrade import upgrade_to_finch


def as_finch(source: ModelTensors) -> ModelTensors:
    """The model itself, or its exact upgrade."""
    return source if source.config.version == "6" else upgrade_to_finch(source)
