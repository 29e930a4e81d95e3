"""The processes of a run, this one among them, and what they tell each other beside gradients and states.

All of it goes over a group of the hosts (gloo), whatever the devices use: a GPU's queue of work is never waited for.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.training.rank_watch import RankWatch, host_store, join_store

T = TypeVar("T")
_FOR_EVER = timedelta(days=365)


class Ranks:
    """This process among the processes of a run.

    Neighbours share a document: rank r is number `time_rank` of the `time_size` that compute its chunks together, and
    they are number `data_rank` of the `data_size` that have rows of their own.

    Args:
        hosts: all of them, as a group of gloo; None = this process is alone.
        time_group: those that share this one's documents, as a group of the devices; None = nobody else.
        local_rank, local_size: among the processes of this machine.
        watch: over the others.
    """

    def __init__(
        self,
        *,
        hosts: dist.ProcessGroup | None = None,
        time_group: dist.ProcessGroup | None = None,
        local_rank: int = 0,
        local_size: int = 1,
        watch: RankWatch | None = None,
    ) -> None:
        self._hosts, self.time_group, self._watch = hosts, time_group, watch
        self.rank, self.size = (0, 1) if hosts is None else (hosts.rank(), hosts.size())
        self.local_rank, self.local_size = local_rank, local_size
        self.time_size = 1 if time_group is None else time_group.size()
        self.data_size = self.size // self.time_size
        self.data_rank, self.time_rank = divmod(self.rank, self.time_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all: it writes what there is one of."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """This rank, for people."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def gather(self, value: T) -> list[T]:
        """What every rank gave, by rank, on every rank."""
        if self._hosts is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._hosts)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """What the first rank gave, on every rank."""
        if self._hosts is None:
            return value
        values = [value if self.is_first else None]
        dist.broadcast_object_list(values, src=0, group=self._hosts)
        return values[0]  # type: ignore[return-value]

    def most(self, *numbers: int) -> tuple[int, ...]:
        """Of each number, the largest that any rank gave; quick enough to be asked at every chunk."""
        if self._hosts is None:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._hosts)
        return tuple(largest.tolist())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of a tensor on the host, a new one."""
        if self._hosts is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self._hosts)
        return total

    def wait(self) -> None:
        """Until every rank is here."""
        if self._hosts is not None:
            dist.barrier(group=self._hosts)

    def at(self, place: str) -> None:
        """Say where this rank is, so that the others know where it hangs; all say it equally often."""
        if self._watch is not None:
            self._watch.at(place)

    def patient(self, place: str) -> AbstractContextManager[None]:
        """A phase whose length nobody knows."""
        return nullcontext() if self._watch is None else self._watch.patient(place)

    def close(self) -> None:
        """This rank ends in good order."""
        if self._watch is not None:
            self._watch.close()

    def fail(self, error: BaseException) -> None:
        """This rank ends with an error; where that follows from a lost rank, say which, and do not return."""
        if self._watch is not None:
            self._watch.fail(error)


ALONE = Ranks()
"""A run of one process."""


def connect(
    *,
    time_parallel: int,
    local_rank: int,
    local_size: int,
    address: str,
    hang_seconds: float,
    last_words: Callable[[], str],
) -> Ranks:
    """The ranks of the process group that is there; every process calls this once.

    Args:
        time_parallel: ranks that share a document; divides the number of ranks.
        address: of the first rank's machine, as the others reach it.
        hang_seconds, last_words: see `RankWatch`.
    """
    # The watch is the first to say what is wrong; a collective that fails by itself knows less. What the hosts tell
    # each other may have to wait for a phase of one of them whose length nobody knows.
    timeout = timedelta(seconds=2 * hang_seconds)
    hosts = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    assert hosts.size() % time_parallel == 0, f"{time_parallel} does not divide {hosts.size()}"
    of_this_rank = None
    if time_parallel > 1:
        # Every process has to take part in making every group.
        for first in range(0, hosts.size(), time_parallel):
            members = range(first, first + time_parallel)
            group = dist.new_group(list(members), timeout=timeout)
            of_this_rank = group if hosts.rank() in members else of_this_rank
    port = [0]
    if hosts.rank() == 0:
        store = host_store(address, hosts.size())
        port = [store.port]
    dist.broadcast_object_list(port, src=0, group=hosts)
    if hosts.rank() > 0:
        store = join_store(address, port[0])
    watch = RankWatch(store, rank=hosts.rank(), ranks=hosts.size(), hang_seconds=hang_seconds, last_words=last_words)
    return Ranks(hosts=hosts, time_group=of_this_rank, local_rank=local_rank, local_size=local_size, watch=watch)


def count_devices(devices: int | str) -> int:
    """Processes that a recipe's run.devices asks for on this machine."""
    return max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)
