"""Full fine-tuning: every weight is trained, except those that match a freeze pattern."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from infctx.adapters.base_weight import exact_values
from infctx.adapters.patterns import matching_parameters
from infctx.adapters.state_tuning import add_start_parameters_
from infctx.errors import RecipeError


class FullFineTuning:
    """Nothing is attached, so there is nothing to save beside the weights or to merge."""

    has_files = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def save(self, folder: Path, *, base_fingerprint: str | None = None) -> None:
        """A full fine-tune has no adapter folder."""

    def names(self) -> list[str]:
        """Every parameter that is trained."""
        return [name for name, parameter in self._model.named_parameters() if parameter.requires_grad]

    def merged_parameter(self, name: str) -> Tensor:
        """The parameter itself, float32 (float64 in a float64 model)."""
        return exact_values(self._model.get_parameter(name))

    def merge_(self) -> None:
        """The weights are the result."""


def attach_full(
    model: nn.Module, *, freeze: Sequence[str] = (), initial_state: bool = False, initial_shifts: bool = False
) -> FullFineTuning:
    """Make every parameter trainable but those whose name matches a pattern.

    Args:
        initial_state: add the state that documents begin with, where the model has none.
        initial_shifts: add what stands for the token before a document's first.
    Raises:
        RecipeError: a pattern matches nothing, or everything is frozen.
    """
    add_start_parameters_(model, initial_state=initial_state, initial_shifts=initial_shifts)
    frozen = matching_parameters(model, freeze, key="adapter.freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"adapter.freeze: {list(freeze)} freezes every parameter; expected something left to train.")
    return FullFineTuning(model)
