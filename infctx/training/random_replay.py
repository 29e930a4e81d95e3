"""Random numbers that are drawn twice: a chunk that is computed again has to see the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from infctx.training.step_place import RandomState, random_state, set_random_state


class RandomReplay:
    """Random numbers of each chunk of a window, so that dropout falls on the same places in both sweeps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: list[RandomState] = []
        self._after_window: RandomState | None = None

    def enter(self, chunk: int) -> None:
        """Put the generators where they were when this chunk of the window first ran, or remember where they are."""
        if chunk < len(self._before):
            set_random_state(self._before[chunk], self._device)
        else:
            self._before.append(random_state(self._device))

    def leave(self, chunk: int) -> None:
        """After the chunk's forward in sweep 2; the window's last chunk has gone furthest."""
        if chunk == len(self._before) - 1:
            self._after_window = random_state(self._device)

    def leave_window(self) -> None:
        """Continue after the window as if its chunks had run once."""
        assert self._after_window is not None
        set_random_state(self._after_window, self._device)
        self._before, self._after_window = [], None

    def to_list(self) -> list[RandomState]:
        """Before each chunk that has run, and behind the window where sweep 2 has begun."""
        return [*self._before, *([self._after_window] if self._after_window is not None else [])]

    def from_list(self, states: Sequence[RandomState], *, has_left_window: bool) -> None:
        """Continue with what another one's `to_list` gave."""
        self._before = list(states)
        if has_left_window:
            self._after_window = self._before.pop()


@contextmanager
def replayed(replay: RandomReplay | None, chunk: int) -> Iterator[None]:
    """A chunk's forward in sweep 2; without a replay nothing is done."""
    if replay is None:
        yield
        return
    replay.enter(chunk)
    yield
    replay.leave(chunk)
