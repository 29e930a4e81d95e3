"""Which tokens a chunk's queries may attend to: those of the same document, up to their own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from infctx.shapes import Starts


def mark_starts(tokens: Int[Tensor, "B T"], starts: Starts | None, *, is_first: bool) -> Int[Tensor, "B T"]:
    """The ids as int32, a document's first token as ~id.

    Args:
        is_first: no token was before these, so that the first of them begins a document.
    """
    marked = tokens.to(torch.int32)
    if starts is not None:
        marked = torch.where(starts, ~marked, marked)
    if is_first and (starts is None or not bool(starts[:, 0].all())):
        first = marked[:, :1]
        marked = torch.cat([torch.where(first < 0, first, ~first), marked[:, 1:]], dim=1)
    return marked


class SeenTokens:
    """The tokens in the cache and the chunk's own behind them; a token's place is its number among both.

    Args:
        past, own: ids, ~id where a document begins; `own` of the chunk.
        offset: tokens that were left out before `past`.

    Attributes:
        first: the place where the document of each of the chunk's tokens begins.
        first_key: the first place that any of them sees; asks the device for the number.
    """

    def __init__(self, past: Int[Tensor, "B P"], own: Int[Tensor, "B T"], *, offset: int = 0) -> None:
        self.num_past, self.num_keys, self.device = past.shape[1], past.shape[1] + own.shape[1], own.device
        self.offset = offset
        self._marked = torch.cat([past.to(self.device), own], dim=1)
        places = torch.arange(self.num_keys, device=self.device)
        begins = torch.where(self._marked < 0, places, 0).cummax(dim=1).values
        self.first: Int[Tensor, "B T"] = begins[:, self.num_past :]
        self.first_key = int(self.first[:, 0].min())

    def ids(self, begin: int, end: int) -> Int[Tensor, "B n"]:
        """The tokens at these places."""
        marked = self._marked[:, begin:end]
        return torch.where(marked < 0, ~marked, marked)

    def is_start(self, begin: int, end: int) -> Bool[Tensor, "B n"]:
        """Whether nothing of the same document is before the token at a place."""
        return self._marked[:, begin:end] < 0
