"""How the operators call the C++ library: contiguous tensors by their addresses, sizes as an array of int64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from infctx_kernels.cpu import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def computable(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that the library reads: its own, or float32."""
    return tensor if tensor.dtype in DTYPES else tensor.float()


def contiguous(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def call(name: str, sizes: tuple[int, ...], *arguments: Any) -> None:
    """Run a function of the library on all of torch's threads, whose number follows the sizes.

    Args:
        name: of the function.
        sizes: what its array holds before the number of threads.
        arguments: contiguous tensors, None for a null pointer, lists of these, and floats for doubles.
    Raises:
        MemoryError: there was none for its sums.
    """
    numbers = (*sizes, torch.get_num_threads())
    array = (ctypes.c_int64 * len(numbers))(*numbers)
    if getattr(library.load_library(), name)(array, *map(_as_c, arguments)) != 0:
        raise MemoryError(f"{name}: no memory for its sums")


def _as_c(argument: Any) -> Any:
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, list):
        return (ctypes.c_void_p * len(argument))(*map(_address, argument))
    return ctypes.c_void_p(_address(argument))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
