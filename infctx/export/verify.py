"""Proof of an export: read it back and compare its logits with the source's; one merge against another."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

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
    tokens = _probe(model)
    expected, _ = model(tokens)
    found, _ = load_model(path)(tokens)
    for logits, what in ((expected, "the source"), (found, "the export, read back")):
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(
                f"the logits of {what} are not finite; nothing was written. "
                "The weights are damaged, the training diverged, or they are too large for this dtype."
            )
    return float((found - expected).abs().max())


class MergeDifference(NamedTuple):
    """weight: largest relative one of a parameter, norm over norm. logit: largest of the logits of a fixed probe."""

    weight: float
    logit: float


@torch.no_grad()
def merge_difference(model: Finch, other: Finch) -> MergeDifference:
    """How far two models of the same sizes are apart, in weights beside those of `other`, and in logits."""
    theirs = dict(other.named_parameters())
    differences = [
        float((parameter - theirs[name]).norm() / theirs[name].norm())
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, theirs[name])
    ]
    tokens = _probe(model)
    logits = (model(tokens)[0] - other(tokens)[0]).abs().max()
    return MergeDifference(weight=max(differences, default=0.0), logit=float(logits))


def _probe(model: Finch) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
