"""Programs that run on their own, and are left alone with their time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Look until something is so."""

    def wait(is_so: Callable[[], bool], *, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"not so after {seconds} s"
            time.sleep(0.02)

    return wait


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python on arguments; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **environ: str) -> subprocess.Popen[str]:
        # Whatever the tests themselves were started by; an empty value unsets a name.
        wanted = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **environ}
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={name: value for name, value in wanted.items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        # A rank that outlives its supervisor, as none should, holds the pipes.
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
