"""What every kind of adapter can do."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor


class Adapter(Protocol):
    """Says which weights are trained, writes them, and folds them into the model."""

    @property
    def has_files(self) -> bool:
        """Whether there is anything to save beside the weights."""

    def save(self, folder: Path, *, base_fingerprint: str | None = None) -> None:
        """Write the adapter into a folder that exists.

        Args:
            base_fingerprint: of the model file it belongs to, recorded so that it is put on no other.
        """

    def names(self) -> list[str]:
        """The parameters of the model, by their names without an adapter, whose values differ from the base's."""

    def merged_parameter(self, name: str) -> Tensor:
        """The value of any one parameter with the adapter folded in, float32 (float64 in a float64 model).

        Args:
            name: as without an adapter.
        """

    def merge_(self) -> None:
        """Fold the adapter into the weights and take it out of the model, in place."""
