"""Where the states at the chunk borders wait for the second sweep: on the device, in host memory, or on disk.

They are the only thing that grows with the document: 13 MB for each border of a 1.6B model. Kept thinned, a window of n
chunks holds about 2·sqrt(n) of them and runs forward once more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from infctx.errors import MachineError
from infctx.free_memory import free_host_bytes
from infctx.model.state import ModelState

Where = Literal["device", "host", "disk"]

# Shares of the memory that is free when a run starts; the rest is for activations, gradients and the optimizer.
DEVICE_SHARE = 0.25
HOST_SHARE = 0.5
# Of boundary states in one piece of memory.
BLOCK_BYTES = 16 * 2**20


class BoundaryStore(Protocol):
    """A stack of states."""

    def put(self, state: ModelState) -> None:
        """Keep a state; it may be freed by the caller afterwards."""

    def read(self, place: int) -> ModelState:
        """Give back the state that was put as number `place`, counted from 0, on the device it came from."""

    def drop(self) -> None:
        """Forget the state that was put last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryPlan:
    """How a run keeps its boundary states.

    where: which store. is_thinned: keep every sqrt(n)-th of n and recompute the others. folder: for the disk store.
    cache_on_host: what layers with attention cache, and its gradient, stay in host memory.
    """

    where: Where = "device"
    is_thinned: bool = False
    folder: Path | None = None
    cache_on_host: bool = False

    def open_store(self) -> BoundaryStore:
        """An empty store."""
        if self.where == "disk":
            assert self.folder is not None, "the disk store needs a folder"
            return DiskStore(self.folder)
        return MemoryStore(on_host=self.where == "host")

    def most_kept(self, num_chunks: int) -> int:
        """The number of states held at once for a window of so many chunks, at most."""
        stride = self.stride(num_chunks)
        return -(-num_chunks // stride) + stride

    def stride(self, num_chunks: int) -> int:
        """Every how many chunks a boundary is kept."""
        return max(1, math.isqrt(num_chunks)) if self.is_thinned else 1


class MemoryStore:
    """States on their device or on the host, in blocks of many.

    A state of its own between the temporaries of two chunks would keep the allocator from using that memory again: over
    a million tokens more is lost so than the states take. On the host the blocks are pinned for a GPU: copies stand in
    line with the computation, and the host does not wait for them. What `read` gives may lie in a block, and is good
    until the next put.
    """

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._blocks: list[list[Tensor]] = []
        self._per_block = 0
        self._count = 0
        self._device = torch.device("cpu")

    def put(self, state: ModelState) -> None:
        """Copy the state to where the next one belongs."""
        if not self._blocks:
            self._device = state.wkv.device
            self._per_block = max(1, BLOCK_BYTES // state_bytes(state))
        block, place = divmod(self._count, self._per_block)
        if block == len(self._blocks):
            self._blocks.append([self._new_block(tensor) for tensor in state])
        for kept, tensor in zip(self._blocks[block], state, strict=True):
            kept[place].copy_(tensor, non_blocking=True)
        self._count += 1

    def read(self, place: int) -> ModelState:
        """The state, copied back to its device if it was not there."""
        block, place = divmod(place, self._per_block)
        return ModelState(*(kept[place].to(self._device, non_blocking=True) for kept in self._blocks[block]))

    def drop(self) -> None:
        """Let go of the last, and of its block if it was the first in it."""
        self._count -= 1
        if self._count % self._per_block == 0:
            self._blocks.pop()

    def _new_block(self, tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if self._on_host else self._device
        is_pinned = self._on_host and self._device.type == "cuda"
        return torch.empty(self._per_block, *tensor.shape, dtype=tensor.dtype, device=device, pin_memory=is_pinned)


class DiskStore:
    """One file for each state, removed when it is dropped; for this process alone, and worth nothing after it."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot("make", folder, error) from error
        self._folder = folder
        self._kept: list[tuple[torch.device, list[tuple[torch.Size, torch.dtype]]]] = []

    def put(self, state: ModelState) -> None:
        """Write the tensors' bytes. Raises MachineError when the disk is full, fails or may not be written."""
        path = self._path(len(self._kept))
        try:
            with path.open("wb") as file:
                for tensor in state:
                    file.write(tensor.detach().contiguous().cpu().numpy().data)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise _cannot("write", path, error) from error
        self._kept.append((state.wkv.device, [(tensor.shape, tensor.dtype) for tensor in state]))

    def read(self, place: int) -> ModelState:
        """Read the file."""
        device, forms = self._kept[place]
        tensors = []
        with self._path(place).open("rb") as file:
            for shape, dtype in forms:
                numbers = np.fromfile(
                    file, dtype=np.float64 if dtype == torch.float64 else np.float32, count=shape.numel()
                )
                tensors.append(torch.from_numpy(numbers).view(shape).to(device))
        return ModelState(*tensors)

    def drop(self) -> None:
        """Remove the last file."""
        self._kept.pop()
        self._path(len(self._kept)).unlink()

    def _path(self, index: int) -> Path:
        return self._folder / f"boundary-{index:06d}.bin"


def _cannot(what: str, path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"Boundary states: cannot {what} {path}: {error.strerror or error}. Make room there or let it be written, keep "
        "fewer with bptt.thin_boundaries: true, or keep them in memory with bptt.boundaries: host."
    )


Boundary = tuple[int, ModelState]
"""A chunk's index in its window, and the state before it."""

Advance = Callable[[int, ModelState], ModelState]
"""A chunk's index in its window and the state before it -> the state after it, without a graph."""


class Bank:
    """The boundary states of one window: put front to back by sweep 1, taken back to front by sweep 2.

    A stack whose lower part lies in the store, perhaps thinned, and whose upper part is at hand. What is asked for and
    was not kept is computed from the nearest state before it.

    Who asks also says how it is computed: a bank that kept the walk it belongs to would keep all of that walk's states
    until the next collection of cycles.
    """

    def __init__(self, plan: BoundaryPlan, num_chunks: int) -> None:
        self._store = plan.open_store()
        self._stored: list[int] = []
        self._at_hand: list[Boundary] = []
        self._stride = plan.stride(num_chunks)
        self._first_at_hand = (num_chunks - 1) // self._stride * self._stride

    def put(self, index: int, state: ModelState) -> None:
        """Keep the state before this chunk if the plan wants it; indices come in ascending order."""
        if index >= self._first_at_hand:
            self._at_hand.append((index, state))
        elif index % self._stride == 0:
            self._keep(index, state)

    def take(self, index: int, advance: Advance) -> ModelState:
        """The state before this chunk; indices come in descending order, each once."""
        self.have_at_hand(index, advance)
        return self._at_hand.pop()[1]

    def have_at_hand(self, index: int, advance: Advance) -> None:
        """Compute the state before this chunk if it is not there; it stays."""
        if not self._at_hand:
            self._at_hand.append((self._stored[-1], self._store.read(len(self._stored) - 1)))
            self._stored.pop()
            self._store.drop()
        while self._at_hand[-1][0] < index:
            before, state = self._at_hand[-1]
            self._at_hand.append((before + 1, advance(before, state)))

    def held(self) -> Iterator[Boundary]:
        """What is needed to take all that is left: about the square root of it, in ascending order."""
        indices = self._stored + [index for index, _ in self._at_hand]
        stride = max(1, math.isqrt(len(indices)))
        for place, index in enumerate(indices):
            if place % stride == 0 or place == len(indices) - 1:
                in_store = place < len(self._stored)
                yield index, self._store.read(place) if in_store else self._at_hand[place - len(self._stored)][1]

    def put_back(self, boundaries: Iterable[Boundary]) -> None:
        """Begin with what another bank held."""
        for index, state in boundaries:
            self._keep(index, state)

    def _keep(self, index: int, state: ModelState) -> None:
        self._store.put(state)
        self._stored.append(index)


def choose_store(num_bytes: int, device: torch.device, *, sharers: int = 1) -> Where:
    """The fastest place with room for so many bytes of boundary states.

    Args:
        sharers: processes that want as much of this machine's memory.
    """
    if device.type == "cuda" and num_bytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if num_bytes <= HOST_SHARE * free_host_bytes() / sharers:
        return "device" if device.type == "cpu" else "host"
    return "disk"


def state_bytes(state: ModelState) -> int:
    """Bytes of one boundary."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state)
