"""The processes of a run, this one among them, and what they tell each other beside gradients and states.

All of it goes over a group of the hosts (gloo), whatever the devices use: a GPU's queue of work is never waited for.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.errors import InfctxError, MachineError

T = TypeVar("T")


class Ranks:
    """This process among the processes of a run.

    Neighbours share a document: rank r is number `time_rank` of the `time_size` that compute its chunks together, and
    they are number `data_rank` of the `data_size` that have rows of their own.

    Args:
        hosts: all of them, as a group of gloo; None = this process is alone.
        time_group: those that share this one's documents, as a group of the devices; None = nobody else.
        local_rank, local_size: among the processes of this machine.
    """

    def __init__(
        self,
        *,
        hosts: dist.ProcessGroup | None = None,
        time_group: dist.ProcessGroup | None = None,
        local_rank: int = 0,
        local_size: int = 1,
    ) -> None:
        self._hosts, self.time_group = hosts, time_group
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

    def together(self, work: Callable[[], T]) -> T:
        """Do some work on every rank; where it fails on any, every rank raises that error.

        Raises:
            The work's own error, on the ranks where it failed. On the others an error of its kind that names those
            ranks, and is marked as told elsewhere (`InfctxError.is_told`).
        """
        error: Exception | None = None
        result: T | None = None
        try:
            result = work()
        except Exception as caught:
            if self.size == 1:
                raise
            error = caught
        problems = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if error is not None:
            if isinstance(error, InfctxError):
                # One of the ranks that failed in the same way tells it.
                error.is_told = problems[self.rank] in problems[: self.rank]
            raise error
        if failed:
            kind = MachineError if problems[failed[0]].startswith("MachineError") else InfctxError
            said = kind(f"rank {failed[0]} could not go on: {problems[failed[0]]}")
            said.is_told = True
            raise said
        return result  # type: ignore[return-value]

    def in_turns(self, work: Callable[[], T]) -> T:
        """Do some work on one rank of every machine first, then on the others: what it leaves on the disk is found."""
        if self.size == 1:
            return work()
        if self.local_rank == 0:
            result = self.together(work)
            self.together(lambda: None)
            return result
        self.together(lambda: None)
        return self.together(work)


ALONE = Ranks()
"""A run of one process."""


def connect(*, time_parallel: int, local_rank: int, local_size: int, timeout: timedelta) -> Ranks:
    """The ranks of the process group that is there; every process calls this once.

    Args:
        time_parallel: ranks that share a document; divides the number of ranks.
        timeout: after which what is not answered fails.
    """
    hosts = dist.new_group(backend="gloo", timeout=timeout)
    assert hosts.size() % time_parallel == 0, f"{time_parallel} does not divide {hosts.size()}"
    of_this_rank = None
    if time_parallel > 1:
        # Every process has to take part in making every group.
        for first in range(0, hosts.size(), time_parallel):
            members = range(first, first + time_parallel)
            group = dist.new_group(list(members), timeout=timeout)
            of_this_rank = group if hosts.rank() in members else of_this_rank
    return Ranks(hosts=hosts, time_group=of_this_rank, local_rank=local_rank, local_size=local_size)
