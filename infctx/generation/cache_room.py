"""Whether what layers with attention remember of a prompt fits, found before any of it is read."""

from __future__ import annotations

import torch

from infctx.errors import InfctxError
from infctx.free_memory import free_bytes
from infctx.model.finch import Finch

_ID_BYTES = 4
# The cache grows by being copied.
_COPIES = 2


def cache_bytes_per_token(model: Finch) -> int:
    """Of the cache of a model that writes, in its own dtype; 0 without attention."""
    config = model.config
    return _ID_BYTES + config.cache_width * model.activation_dtype.itemsize if config.n_attention else 0


def check_cache_room(model: Finch, num_tokens: int, *, num_cached: int = 0, rows: int = 1) -> None:
    """Refuse tokens that cannot be remembered.

    Args:
        num_tokens: to be read, with what was read before them, of the longest row.
        num_cached: of them, already there.
        rows: side by side.
    Raises:
        InfctxError: there is too little memory; names the figures.
    """
    each = cache_bytes_per_token(model)
    if each == 0:
        return
    needed = (_COPIES * rows * num_tokens - num_cached) * each
    device: torch.device = model.embedding.weight.device
    if needed <= (free := free_bytes(device)):
        return
    room = max(0, free // each + num_cached) // (_COPIES * rows)
    per_token = f"{each:,} bytes" if rows == 1 else f"{rows} rows × {each:,} bytes"
    fewer = " fewer --rows," if rows > 1 else ""
    raise InfctxError(
        f"A prompt of {num_tokens:,} tokens does not fit: {model.config.name} remembers every token, {per_token} for "
        f"each, and twice that while it reads on: {needed / 1e9:,.2f} GB are needed, and {device} has "
        f"{free / 1e9:,.2f} GB free, room for {room:,}. Give a shorter text,{fewer} a --dtype of fewer bytes, or a "
        "machine with more memory."
    )
