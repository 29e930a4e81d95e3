"""What the layers with attention have cached of a window's tokens, once for all its chunks, and its gradient.

The cache before a chunk is a part of the cache behind the window, so that the borders of the chunks need none of their
own. Every chunk attends to what is before it: its backward pass adds to the gradient of all of that, and by the time
sweep 2 comes to a chunk, the gradient of what it cached is whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.model.state import ModelState

# Room is made for so many times as many tokens.
_GROWTH = 1.5


class WindowCache:
    """The cache of one window.

    Args:
        start: the state before it.
        on_host: keep cache and gradient in host memory; the attention fetches blocks of it.
        num_tokens: of the window, at most; with more of them the cache has to move.
    """

    def __init__(self, start: ModelState, *, on_host: bool, num_tokens: int = 0) -> None:
        dtype = start.wkv.dtype
        # Gradients are added up in the dtype of what they belong to.
        tokens, vectors = start.cached_tokens, start.cached.to(dtype)
        self._tokens, self._vectors = (part.detach().cpu() if on_host else part.detach() for part in (tokens, vectors))
        # Where the cache before each chunk ends.
        self._ends = [start.num_cached]
        self._gradient: Tensor | None = None
        # At once: while it moves it is there twice.
        self._make_room(start.num_cached + num_tokens)

    def before(self, index: int, recurrent: ModelState) -> ModelState:
        """The whole state before a chunk of the window; its cache is good until the next `put`."""
        end = self._ends[index]
        return ModelState(*recurrent, self._tokens[:, :, :end], self._vectors[:, :, :end])

    def put(self, index: int, chunk: ModelState) -> None:
        """Take the cache of a chunk, if it is not there yet: the one behind all that are."""
        if index + 1 < len(self._ends):
            return
        begin = self._ends[index]
        end = begin + chunk.num_cached
        self._make_room(end)
        self._tokens[:, :, begin:end] = chunk.cached_tokens
        self._vectors[:, :, begin:end] = chunk.cached.detach()
        self._ends.append(end)

    def gradient_of(self, index: int, chunk: ModelState) -> Tensor:
        """Of what a chunk cached: [1, B, T, K], of all chunks behind it, on the device of the chunk."""
        if index + 1 == len(self._ends):
            return torch.zeros_like(chunk.cached)
        return self._all_gradient()[:, :, self._ends[index] : self._ends[index + 1]].to(chunk.cached.device)

    def add_gradient(self, index: int, gradient: Tensor | None) -> None:
        """Of all that was cached before a chunk; None = nothing asked for it."""
        if gradient is not None:
            self._all_gradient()[:, :, : self._ends[index]] += gradient

    def gradient_before(self) -> tuple[Tensor, Tensor]:
        """The tokens that were cached before the window, and the gradient of what was."""
        end = self._ends[0]
        return self._tokens[:, :, :end], self._all_gradient()[:, :, :end].clone()

    def to_tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` makes it of again."""
        end = self._ends[-1]
        tensors = {"tokens": self._tokens[:, :, :end], "vectors": self._vectors[:, :, :end]}
        tensors["ends"] = torch.tensor(self._ends)
        return tensors if self._gradient is None else {**tensors, "gradient": self._gradient}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], recurrent: ModelState, *, on_host: bool) -> WindowCache:
        """One that goes on from there."""
        device = torch.device("cpu") if on_host else recurrent.wkv.device
        cache = cls(
            ModelState(*recurrent, tensors["tokens"].to(device), tensors["vectors"].to(device)), on_host=on_host
        )
        cache._ends = tensors["ends"].tolist()
        if "gradient" in tensors:
            cache._gradient = tensors["gradient"].to(device)
        return cache

    def _all_gradient(self) -> Tensor:
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._vectors[:, :, : self._ends[-1]])
        return self._gradient

    def _make_room(self, num_tokens: int) -> None:
        if num_tokens <= self._tokens.shape[2]:
            return
        capacity = max(num_tokens, int(_GROWTH * self._tokens.shape[2]))
        self._tokens, self._vectors = (_longer(part, capacity) for part in (self._tokens, self._vectors))


def _longer(tensor: Tensor, num_tokens: int) -> Tensor:
    longer = tensor.new_empty(*tensor.shape[:2], num_tokens, *tensor.shape[3:])
    longer[:, :, : tensor.shape[2]] = tensor
    return longer
