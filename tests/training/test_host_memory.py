"""Freed memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from infctx.training.host_memory import EVERY_SECONDS, HeapTrimmer

PAGE = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's allocator")
def test_holes_are_given_back_when_it_is_time() -> None:
    now = [0.0]
    trimmer = HeapTrimmer(torch.device("cpu"), clock=lambda: now[0])
    # Pieces too small to be mapped on their own, every second one kept, so that the heap cannot shrink at its end.
    pieces = [torch.ones(25_000) for _ in range(2000)]
    pieces = pieces[::2]
    before = resident_bytes()
    assert not trimmer.tick()
    now[0] = EVERY_SECONDS
    assert trimmer.tick()
    assert not trimmer.tick()
    # Of the 100 MB that were freed; nearly all of it where the system has a glibc.
    assert before - resident_bytes() > 50e6
    assert all(bool((piece == 1).all()) for piece in pieces[:3])


def test_nothing_is_done_for_a_gpu() -> None:
    trimmer = HeapTrimmer(torch.device("cuda:0"), clock=lambda: 1e9)
    assert not trimmer.tick()
