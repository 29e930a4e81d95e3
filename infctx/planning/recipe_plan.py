"""A plan: what it is for, what is needed, and whether that is there."""

from __future__ import annotations

from dataclasses import dataclass

from infctx.model.config import FinchConfig
from infctx.planning.activations import Device
from infctx.planning.devices import Place, Room
from infctx.planning.memory import ChunkPlan, MemoryPlan
from infctx.planning.spread import Spread
from infctx.planning.time_model import Machine, TimePlan
from infctx.training.precision import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a plan is for.

    kind: of device. room: what there is of memory and disk on each device and machine. ranks: in place of what the
    recipe says; the part that shares a chunk stays as it is. machine: rates of devices and links.
    """

    kind: Device = "cuda"
    room: Room = Room()  # noqa: RUF009 (frozen)
    ranks: int | None = None
    machine: Machine = Machine()  # noqa: RUF009 (frozen)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipePlan:
    """What a run of a recipe needs.

    target: with the ranks of `spread`. document_tokens: of the document whose boundary states are counted.
    memory_if_recomputed: with bptt.activations: recompute, None where that is planned. disk: bytes by part, of all
    ranks of a machine. times: by tokens of a document; step_time: of a step of the recipe with such documents;
    step_tokens: of a row in it; run_seconds: of the whole run, None where its steps are not told.
    """

    config: FinchConfig
    num_parameters: int
    num_trained: int
    precision: Precision
    spread: Spread
    chunk: ChunkPlan
    document_tokens: int
    memory: MemoryPlan
    memory_if_recomputed: MemoryPlan | None
    disk: dict[str, int]
    target: Target
    times: dict[int, TimePlan]
    step_time: TimePlan
    step_tokens: int
    run_seconds: float | None

    @property
    def sharers(self) -> int:
        """Ranks on a machine, which share its host memory and its disk."""
        return min(self.spread.ranks, self.spread.devices_per_node)

    @property
    def needs(self) -> Room:
        """Bytes on each device, and on a machine of host memory and disk. On a CPU all ranks share the memory."""
        return self._needs(())

    @property
    def needs_without_boundaries(self) -> Room:
        """The same without what grows with a document."""
        return self._needs(("boundary states",))

    def _needs(self, but_not: tuple[str, ...]) -> Room:
        device, host, disk = (
            sum(size for part, size in parts.items() if part not in but_not)
            for parts in (self.memory.device, self.memory.host, self.disk)
        )
        return Room(
            device=device * (self.sharers if self.target.kind == "cpu" else 1), host=host * self.sharers, disk=disk
        )

    @property
    def fits(self) -> bool | None:
        """Whether there is room for all of it; None where the device's memory was not told."""
        if self.target.room.device is None:
            return None
        return not short_of(self.needs, self.target.room)


def short_of(needs: Room, room: Room, *, tolerance: float = 0.0) -> list[Place]:
    """Where more is needed than there is.

    Args:
        tolerance: part of the room by which it may be more.
    """
    return [place for place, missing in _missing(needs, room, tolerance).items() if missing]


def missing_bytes(needs: Room, room: Room, *, tolerance: float = 0.0) -> int:
    """How much more is needed than there is, of all places together; see `short_of`."""
    return sum(_missing(needs, room, tolerance).values())


def _missing(needs: Room, room: Room, tolerance: float) -> dict[Place, int]:
    places: tuple[Place, ...] = ("device", "host", "disk")
    missing: dict[Place, int] = {}
    for place in places:
        if (there := room.of(place)) is not None:
            missing[place] = max(0, (needs.of(place) or 0) - round((1 + tolerance) * there))
    return missing
