"""Token shift: each token sees the one before it; the first sees what the previous chunk left."""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.shapes import Activations, LayerShift, Starts


def token_shift(hidden: Activations, carried: LayerShift, starts: Starts | None) -> tuple[Activations, LayerShift]:
    """Shift by one token.

    Args:
        hidden: normalised input of a mix.
        carried: hidden of the token before the chunk, in the state's dtype.
        starts: True at a document's first token, which sees zeros.
    Returns:
        The previous token's hidden at every token, and the last token's hidden for the next chunk.
    """
    previous = torch.cat([carried.to(hidden.dtype)[:, None], hidden[:, :-1]], dim=1)
    if starts is not None:
        previous = previous.masked_fill(starts[..., None], 0.0)
    return previous, hidden[:, -1].to(carried.dtype)


def lerp(hidden: Tensor, difference: Tensor, weight: Tensor) -> Tensor:
    """Move from a token towards the one before it: hidden + (previous - hidden) · weight."""
    return hidden + difference * weight.to(hidden.dtype)
