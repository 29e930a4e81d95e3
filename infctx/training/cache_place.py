"""Where training keeps what layers with attention cache, and how much that is."""

from __future__ import annotations

import torch

from infctx.errors import RecipeError
from infctx.free_memory import free_bytes, free_host_bytes
from infctx.model.config import FinchConfig
from infctx.training.boundary_store import DEVICE_SHARE

# Cache and gradient are float32 in training: gradients are added up in the dtype of what they belong to.
NUMBER_BYTES = 4
_ID_BYTES = 4
# Beside the gradient of the cache: what the layers of one chunk add to it, and a copy of that.
SUMS_AT_ONCE = 2


def cache_bytes(config: FinchConfig, *, rows: int, num_tokens: int) -> int:
    """Of the cache alone, in training."""
    return rows * num_tokens * (_ID_BYTES + NUMBER_BYTES * config.cache_width) if config.n_attention else 0


def bytes_with_gradient(config: FinchConfig, *, rows: int, num_tokens: int) -> int:
    """Of the cache, its gradient, and what a backward pass adds to that at once."""
    gradient = rows * num_tokens * NUMBER_BYTES * config.cache_width if config.n_attention else 0
    return cache_bytes(config, rows=rows, num_tokens=num_tokens) + (1 + SUMS_AT_ONCE) * gradient


def cache_goes_to_host(
    config: FinchConfig, device: torch.device, *, rows: int, num_tokens: int, sharers: int = 1
) -> bool:
    """Whether the cache of a run belongs into host memory: where it would take too much of a GPU's.

    Args:
        rows: at once.
        num_tokens: of each row that are cached behind the last chunk of the longest window.
        sharers: processes that want as much of this machine's memory.
    Raises:
        RecipeError: there is no room for it there either.
    """
    needed = bytes_with_gradient(config, rows=rows, num_tokens=num_tokens)
    if device.type == "cuda" and needed <= DEVICE_SHARE * free_bytes(device):
        return False
    free = free_host_bytes() // sharers
    if needed > free:
        each = bytes_with_gradient(config, rows=1, num_tokens=1)
        fewer = f", run.rows below {rows}" if rows > 1 else ""
        raise RecipeError(
            f"data: {num_tokens:,} tokens do not fit that a {config.name} would have to remember: layers with "
            f"attention take {each:,} bytes for each, with the gradient, which is {needed / 1e9:,.2f} GB for {rows} "
            f"row{'' if rows == 1 else 's'}, and there are {free / 1e9:,.2f} GB of host memory free. That is room for "
            f"{free // (each * rows):,} tokens. Make documents shorter (data.max_tokens with data.on_long: split or "
            f"cut; a lower data.pack_tokens){fewer}, or use a machine with more memory."
        )
    return device.type == "cuda"
