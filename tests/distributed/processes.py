"""Starts a program as the ranks of a run, with the variables that Fabric's LightningEnvironment reads."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
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
        **_environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        **(environment or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(ranks)]
        began = time.monotonic()
        server = _server()
        pids = [
            server.begin(arguments, {**shared, "LOCAL_RANK": str(rank)}, output) for rank, output in enumerate(outputs)
        ]
        try:
            codes = server.wait(pids, until=began + seconds)
        finally:
            for pid in pids:
                server.kill(pid)
        missing = [rank for rank, pid in enumerate(pids) if pid not in codes]
        told = [output.read_text(errors="replace") for output in outputs]
        assert not missing, f"ranks {missing} run on after {seconds:g} s:\n" + "\n".join(text[-4000:] for text in told)
    return [
        Ended(code=codes[pid][0], output=text, seconds=codes[pid][1] - began)
        for pid, text in zip(pids, told, strict=True)
    ]


class RankServer:
    """rank_server.py, which forks a process for each rank."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._unread = b""
        self._ended: dict[int, tuple[int, float]] = {}
        self._running: set[int] = set()

    def begin(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> int:
        """The process of a rank, which prints into a file."""
        asked = {"arguments": list(arguments), "environment": dict(environment), "output": str(output)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        # Others may end in the meantime.
        while (pid := self._take_in(self._next_line())) is None:
            pass
        self._running.add(pid)
        return pid

    def wait(self, pids: Sequence[int], *, until: float) -> dict[int, tuple[int, float]]:
        """Of the processes that end in time, code and when."""
        while not set(pids) <= self._ended.keys() and (left := until - time.monotonic()) > 0:
            assert self._process.stdout is not None
            if b"\n" in self._unread or select.select([self._process.stdout], [], [], left)[0]:
                self._take_in(self._next_line())
        return {pid: self._ended[pid] for pid in pids if pid in self._ended}

    def kill(self, pid: int) -> None:
        """End a process that runs on."""
        if pid in self._running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End it."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(timeout=10)

    def _next_line(self) -> bytes:
        # Read here: a buffer that Python keeps would hide what has come from select.
        while b"\n" not in self._unread:
            assert self._process.stdout is not None
            read = self._process.stdout.read(65536)
            assert read, "the server of ranks has ended"
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _take_in(self, line: bytes) -> int | None:
        """Note who has ended; gives the process that has begun, if that is what is told."""
        told = json.loads(line)
        if "code" not in told:
            return int(told["pid"])
        self._ended[told["pid"]] = told["code"], time.monotonic()
        self._running.discard(told["pid"])
        return None


@cache
def _server() -> RankServer:
    server = RankServer()
    atexit.register(server.close)
    return server


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        # DeepSpeed builds an extension on a CPU, with the ninja beside this Python.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
