"""What the ranks tell of themselves, and what follows from it: nothing, or the sentence that ends the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

# How a rank has ended, as it tells the others; empty while it runs.
CLOSED, RELEASED, FAILED = "closed", "released", "failed: "
# For a rank's first word, above what is allowed between two.
COMING_SECONDS = 60.0
_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What one rank tells of itself."""

    rank: int
    host: str = ""
    pid: int = 0
    """Host and process are empty until the rank has been heard of."""
    beat: int = 0
    """Grows as long as the process lives."""
    moves: int = 0
    """How often its main thread has said where it is."""
    place: str = "its start"
    is_patient: bool = False
    """It is in a phase whose length nobody knows."""
    end: str = ""

    def to_json(self) -> str:
        """As it is sent."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> Status:
        """As it is received."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"Rank {self.rank} on {self.host} (pid {self.pid})" if self.pid else f"Rank {self.rank}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The last status of a rank; seconds on the clock of who saw it."""

    status: Status
    heard: float
    """When its beat was last another one."""
    moved: float
    """When its main thread last said where it is."""

    def updated(self, status: Status, now: float) -> Seen:
        """The same rank with a newer status."""
        if status.beat == self.status.beat and status.end == self.status.end:
            return self
        return Seen(status=status, heard=now, moved=now if status.moves != self.status.moves else self.moved)

    def counted_from(self, *, heard: float, moved: float) -> Seen:
        """Silence before `heard` does not count, nor standing still before `moved`."""
        return replace(self, heard=max(self.heard, heard), moved=max(self.moved, moved))


def judge(ranks: Sequence[Seen], now: float, *, dead_seconds: float, hang_seconds: float) -> str | None:
    """The sentence that ends the run, or None.

    Args:
        ranks: those that are watched; who has ended on purpose is among them and not judged.
        now: seconds on the clock of `heard` and `moved`.
        dead_seconds: without a sign of life.
        hang_seconds: without a move of those that are behind all others.
    """
    failed = [seen.status for seen in ranks if seen.status.end.startswith(FAILED)]
    if failed:
        status = failed[0]
        return f"{status} failed at {status.place}: {status.end.removeprefix(FAILED)}."
    running = [seen for seen in ranks if not seen.status.end]
    silent = [seen for seen in running if now - seen.heard > dead_seconds + (0 if seen.status.pid else COMING_SECONDS)]
    if silent:
        return _silence([seen.status for seen in silent], dead_seconds)
    # Who is about to be found dead is not to be called slow.
    is_open = any(seen.status.is_patient or now - seen.heard > dead_seconds / 3 for seen in running)
    if is_open or not running:
        return None
    fewest = min(seen.status.moves for seen in running)
    seconds = now - max(seen.moved for seen in running if seen.status.moves == fewest)
    return _hang([seen.status for seen in ranks], fewest, seconds) if seconds > hang_seconds else None


def _silence(silent: Sequence[Status], seconds: float) -> str:
    names = _joined([f"{status}, last at {status.place}," for status in silent])
    if len(silent) == 1:
        return (
            f"{names} has given no sign of life for {seconds:g} s: killed, stopped, or its machine cannot be reached."
        )
    return (
        f"{names} have given no sign of life for {seconds:g} s: killed, stopped, or their machines cannot be reached."
    )


def _hang(ranks: Sequence[Status], fewest: int, seconds: float) -> str:
    behind = [status for status in ranks if status.moves == fewest and not status.end]
    others = [status for status in ranks if status not in behind]
    if not others and len(behind) > 1 and len({status.place for status in behind}) == 1:
        return f"No rank has moved for {seconds:.0f} s: all {len(behind)} are at {behind[0].place}."
    has = "have" if len(behind) > 1 else "has"
    text = f"{_joined([f'{status}, at {status.place},' for status in behind])} {has} not moved for {seconds:.0f} s"
    places: dict[str, list[int]] = {}
    for status in others:
        place = f"{'ended' if status.end else 'waiting'} at {status.place}"
        places.setdefault(place, []).append(status.rank)
    elsewhere = [f"{'ranks' if len(some) > 1 else 'rank'} {_numbers(some)} {place}" for place, some in places.items()]
    return "; ".join([text, *elsewhere[:_MOST_NAMED]]) + "."


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return " and ".join(names[:_MOST_NAMED]) + more


def _numbers(ranks: Sequence[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
