"""Eagle to Finch: filled in by the next commit."""

from __future__ import annotations

from infctx.errors import CheckpointError
from infctx.model.tensors import ModelTensors


def upgrade_to_finch(source: ModelTensors) -> ModelTensors:
    raise CheckpointError(f"{source.origin}: an Eagle; this format holds Finch only.")
