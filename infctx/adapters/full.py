"""Full fine-tuning: every weight is trained, except those that match a freeze pattern."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from infctx.adapters.patterns import matching_parameters
from infctx.errors import RecipeError


class FullFineTuning:
    """Nothing is attached, so there is nothing to save beside the weights or to merge."""

    has_files = False

    def save(self, folder: Path) -> None:
        """A full fine-tune has no adapter folder."""

    def merge_(self) -> None:
        """The weights are the result."""


def attach_full(model: nn.Module, *, freeze: Sequence[str] = ()) -> FullFineTuning:
    """Make every parameter trainable but those whose name matches a pattern.

    Raises:
        RecipeError: a pattern matches nothing, or everything is frozen.
    """
    frozen = matching_parameters(model, freeze, key="adapter.freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"adapter.freeze: {list(freeze)} freezes every parameter; expected something left to train.")
    return FullFineTuning()
