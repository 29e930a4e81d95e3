"""What a computation holds at its busiest moment, counted tensor by tensor; the measure that plans are held to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive while it is entered, and keeps the largest sum and the time of it.

    Every tensor that an operation of torch gives back counts with its whole storage, once, until that is freed or made
    empty. What a compiled kernel takes for itself inside is not seen. Slow: for small models.

    Args:
        existing: tensors that are there before, weights and moments.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.largest = 0
        for tensor in existing:
            self._note(tensor)

    def now(self) -> int:
        """Bytes alive at this moment."""
        return sum(storage.nbytes() for ref in list(self._storages.values()) if (storage := ref()) is not None)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self.largest = max(self.largest, self.now())
        return result

    def _note(self, tensor: Tensor) -> None:
        # Not shapes without memory, which divided tensors work with, nor wrappers of tensors seen by themselves.
        if isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in self._storages:
            self._storages[place] = weakref.ref(storage, lambda _, place=place: self._storages.pop(place, None))
