"""What checkpoints have to survive: calls that fail, and processes that are killed."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def in_memory(tmp_path):
    """A folder in memory where there is one: a kill loses nothing written, and hundreds of fsyncs take time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


WATCHED = [(os, name) for name in ("fsync", "replace", "rename", "open", "mkdir", "unlink", "rmdir")]
WATCHED += [(io, "open"), (builtins, "open")]


class Written:
    """A file whose writes are watched too."""

    def __init__(self, file, watch: Callable[[], None]):
        self._file, self._watch = file, watch

    def write(self, content):
        self._watch()
        return self._file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


@contextlib.contextmanager
def _at_call(number: int, act: Callable[[], None], *, and_after: bool = False) -> Iterator[list[int]]:
    """Call `act` before the `number`-th system call that changes or opens a file; yields the counter of such calls."""
    count = [0]

    def watch() -> None:
        count[0] += 1
        if count[0] == number or (and_after and count[0] > number):
            act()

    def watched(function):
        def call(*arguments, **options):
            watch()
            result = function(*arguments, **options)
            is_written = function is io.open and isinstance(result, io.BufferedWriter | io.TextIOWrapper)
            return Written(result, watch) if is_written else result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in WATCHED:
            patch.setattr(module, name, watched(getattr(module, name)))
        yield count


@pytest.fixture
def at_call() -> Callable[..., contextlib.AbstractContextManager[list[int]]]:
    """See `_at_call`."""
    return _at_call


def _in_child(act: Callable[[], None]) -> int:
    """Fork; the child runs `act` and ends without running anything of pytest's."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


@pytest.fixture
def in_child() -> Callable[[Callable[[], None]], int]:
    """See `_in_child`."""
    return _in_child
