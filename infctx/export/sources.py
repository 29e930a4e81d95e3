"""An output must not be what it is made from: the source would be gone before the output is proved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from infctx.errors import CheckpointError


def refuse_same_place(sources: Sequence[Path], output: Path) -> None:
    """Refuse an output that is a source, or that lies in a source's folder under the name of a file there.

    Raises:
        CheckpointError: names both.
    """
    target = output.resolve()
    for source in sources:
        place = source.resolve()
        if place == target or (target.exists() and place in target.parents):
            raise CheckpointError(f"{output}: is what is read ({source}). Give another path for the output.")
