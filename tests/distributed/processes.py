"""Starts a program as the ranks of a run, with the variables that Fabric's LightningEnvironment reads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(
    arguments: Sequence[str], *, ranks: int, seconds: float, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Run `python arguments` as so many ranks to their end; returns what each printed.

    Fails the test where one does not end with 0, or in time.
    """
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
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    told = [f"--- rank {rank}: {codes[rank]}\n{output[-4000:]}" for rank, output in enumerate(outputs)]
    assert codes == [0] * ranks, "\n".join(told)
    return outputs


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
