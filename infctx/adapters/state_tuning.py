"""State tuning: what documents begin with is trained, alone or beside another adapter.

The state of the recurrence, and the vectors that stand for the token before the first, are parameters of the model;
the gradient through all chunks of a document ends in them.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from infctx.adapters.adapter_folder import AdapterFacts, write_facts, write_readme, write_trained
from infctx.adapters.base_weight import parameter_values
from infctx.errors import RecipeError
from infctx.model.finch import Finch


class StateTuning:
    """A model whose weights are frozen; nothing is attached, and the model holds the result."""

    has_files = True

    def __init__(self, model: Finch, trained: set[str]) -> None:
        self._model, self._trained = model, trained

    def save(self, folder: Path, *, base_fingerprint: str | None = None) -> None:
        """Write the trained parameters under our names; states have the key axis before the value axis."""
        write_trained(folder, {name: self._model.get_parameter(name) for name in self.names()})
        write_facts(folder, AdapterFacts(kind="state", base_fingerprint=base_fingerprint))
        write_readme(folder)

    def names(self) -> list[str]:
        """The initial states, and the vectors where they are trained."""
        return [name for name, _ in self._model.named_parameters() if name in self._trained]

    def merged_parameter(self, name: str) -> Tensor:
        """The parameter itself, float32 (float64 in a float64 model)."""
        return parameter_values(self._model, name)

    def merge_(self) -> None:
        """The model holds the result."""


def attach_state(model: Finch, *, initial_shifts: bool = False) -> StateTuning:
    """Freeze the model and train every block's initial state, from the file's or from zeros.

    Args:
        initial_shifts: train what stands for the token before a document's first, too.
    """
    trained = add_start_parameters_(model, initial_state=True, initial_shifts=initial_shifts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return StateTuning(model, trained)


def add_start_parameters_(model: Finch, *, initial_state: bool, initial_shifts: bool) -> set[str]:
    """Give the model the parameters that documents begin with, of zeros where it has none yet; returns their names."""
    wanted = []
    if initial_state and not model.config.n_recurrent:
        raise RecipeError(
            f"adapter: a tuned initial state is that of a recurrence, and a {model.config.name} has none. Use another "
            "adapter.kind, without adapter.initial_state."
        )
    if initial_state:
        model.add_initial_state_()
        wanted.append("initial_state")
    if initial_shifts:
        model.add_initial_shifts_()
        wanted.append("initial_shift")
    return {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in wanted}
