"""Starts a program as the ranks of a run, with the variables that Fabric's LightningEnvironment reads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(
    arguments: Sequence[str], *, ranks: int, seconds: float, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Run `python arguments` as so many ranks to their end; returns what each printed.

    Fails the test where one does not end with 0, or in time.
    """
    ended = end_ranks(arguments, ranks=ranks, seconds=seconds, environment=environment)
    told = [f"--- rank {rank}: {end.code}\n{end.output[-4000:]}" for rank, end in enumerate(ended)]
    assert all(end.code == 0 for end in ended), "\n".join(told)
    return [end.output for end in ended]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A rank that has ended. code: negative where a signal did it. seconds: from the start of all."""

    code: int
    output: str
    seconds: float


def end_ranks(
    arguments: Sequence[str], *, ranks: int, seconds: float, environment: Mapping[str, str] | None = None
) -> list[Ended]:
    """Run `python arguments` as so many ranks until they end, however; fails the test where that takes too long."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        # DeepSpeed builds an extension on a CPU, with the ninja beside this Python.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **(environment or {}),
    }
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**shared, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    began = time.monotonic()

    def wait(process: subprocess.Popen[str]) -> Ended:
        output, _ = process.communicate(timeout=seconds)
        return Ended(code=process.returncode, output=output, seconds=time.monotonic() - began)

    try:
        # Side by side: a full pipe of one must not hold up the others.
        with ThreadPoolExecutor(ranks) as waiting:
            return list(waiting.map(wait, started))
    finally:
        for process in started:
            process.kill()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
