"""Proof of an export: read it back and compare its logits with the source's."""

from __future__ import annotations

from pathlib import Path

import torch

from infctx.checkpoint.model_file import load_model
from infctx.errors import CheckpointError
from infctx.model.finch import Finch

PROBE_TOKENS = 64


@torch.no_grad()
def max_logit_difference(model: Finch, path: str | Path) -> float:
    """Largest absolute difference between the logits of `model` and those of the file, over a fixed probe sequence.

    Raises:
        CheckpointError: either has logits that are not finite, so that nothing can be compared.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    expected, _ = model(tokens)
    found, _ = load_model(path)(tokens)
    for logits, what in ((expected, "the source"), (found, "the export, read back")):
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(
                f"the logits of {what} are not finite; nothing was written. "
                "The weights are damaged, the training diverged, or they are too large for this dtype."
            )
    return float((found - expected).abs().max())
