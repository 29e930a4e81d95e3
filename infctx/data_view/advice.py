"""A warning: what was seen, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infctx.visible_text import visible


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A warning.

    Attributes:
        seen: one sentence, with its numbers.
        places: the first of them, each as file:line, or as two that are the same.
        to_do: one sentence.
    """

    seen: str
    to_do: str
    places: tuple[tuple[str, ...], ...] = ()

    @property
    def text(self) -> str:
        """All of it in a line."""
        return " ".join(part for part in (visible(self.seen), self.where(), self.to_do) if part)

    def where(self, shortened: Callable[[str], str] = str) -> str:
        """A sentence with the places, if there are any."""
        if not self.places:
            return ""
        return f"First: {', '.join(' as '.join(visible(shortened(one)) for one in place) for place in self.places)}."
