"""Processes that write or read one checkpoint together: how they speak, how all fail alike, and who owns what."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from infctx.errors import CheckpointError, InfctxError, MachineError, machine_fault

Share = Callable[[object], list[Any]]
"""Give what this rank has to say; returns what every rank said, in rank order."""


class Writers(Protocol):
    """The ranks of a run, as one of them sees them; they may be on several machines with one file system.

    rank: this one's, from 0. size: how many there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: object) -> list[Any]:
        """Wait for every rank and return what each gave, in rank order.

        It has a time limit, longer than a rank takes to write and read its part of a checkpoint.

        Args: value: of dict, list, str, int, bool and None.
        Raises: an exception on every rank that waits, if one is gone or the time is up.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Alone:
    rank: int = 0
    size: int = 1

    def gather(self, value: object) -> list[Any]:
        return [value]


ALONE: Writers = _Alone()
"""One process."""


class FolderNotSharedError(CheckpointError):
    """A rank does not see what another one wrote."""


@contextmanager
def together(writers: Writers) -> Iterator[Share]:
    """Let ranks work in step: `with together(writers) as share: ...`, sharing equally often on every rank.

    What one rank raises between two shares, every rank raises at its next, which also ends the block; of several
    errors the lowest rank's. Every rank is told which rank failed, where, and how.

    Raises:
        MachineError, CheckpointError or RuntimeError for a fault of a rank's machine, something the user can put right,
        or a bug, marked `is_shared`, and `is_told` but on rank 0. The error itself for one process. What the gather
        raises, if a rank is gone.
    """
    is_over = False

    def share(value: object) -> list[Any]:
        nonlocal is_over
        # It stays so where the gather raises: nobody can be told any more.
        is_over = True
        said = writers.gather({"value": value})
        failed = _first_failure(said, rank=writers.rank)
        if failed is not None:
            raise failed
        is_over = False
        return [message["value"] for message in said]

    try:
        yield share
    except BaseException as error:
        if is_over or writers.size == 1:
            raise
        # Where another rank is gone already, our own error may follow from that: the gather's is the one to show.
        agreed = _first_failure(writers.gather({"failure": _describe(error, rank=writers.rank)}), rank=writers.rank)
        if not isinstance(error, Exception):
            raise
        assert agreed is not None, "our own failure is among them"
        raise agreed from error


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Divide things among ranks so that each has about as much: the largest first, to the rank with least so far.

    Args: sizes: in bytes. ranks: how many, at least 1.
    Returns: the rank of each thing; the same on every machine.
    """
    assert ranks >= 1, f"ranks={ranks}"
    loads = [0] * ranks
    rank_of = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rank = loads.index(min(loads))
        rank_of[index] = rank
        loads[rank] += sizes[index]
    return rank_of


def this_host() -> str:
    """The machine's name, for messages."""
    return socket.gethostname()


def _describe(error: BaseException, *, rank: int) -> dict[str, str]:
    fault = machine_fault(error)
    if fault is not None or isinstance(error, MachineError):
        kind, message = "machine", fault or str(error)
    elif isinstance(error, InfctxError | OSError):
        kind, message = "user", str(error)
    else:
        kind, message = "bug", f"{type(error).__name__}: {error}"
    where = "" if isinstance(error, FolderNotSharedError) else f"rank {rank} on host {this_host()}: "
    return {"kind": kind, "message": message, "where": where}


def _first_failure(said: Sequence[dict[str, Any]], *, rank: int) -> Exception | None:
    failures = [message["failure"] for message in said if "failure" in message]
    if not failures:
        return None
    first = failures[0]
    # What every rank finds is no fault of one of them.
    is_of_all = len(said) > 1 and all(message.get("failure", {}).get("message") == first["message"] for message in said)
    error: InfctxError | MachineError | RuntimeError
    error = {"machine": MachineError, "user": CheckpointError, "bug": RuntimeError}[first["kind"]](
        first["message"] if is_of_all else first["where"] + first["message"]
    )
    if not isinstance(error, RuntimeError):
        error.is_shared, error.is_told = True, rank > 0
    return error
