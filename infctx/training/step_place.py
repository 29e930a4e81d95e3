"""A place between two chunks of a step: everything the rest of the step depends on, the gradients in .grad aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infctx.model.state import CACHE_FIELDS, RECURRENT_FIELDS, ModelState
from infctx.training.boundary_store import Boundary

RandomState = dict[str, Tensor]
"""The generators' state: "cpu", and "device" on a GPU."""


class WalkPlace(NamedTuple):
    """Where a walk through the chunks of a group is: the first chunk of the window, the chunk to be run next, both
    counted in the group, and whether that is for its gradient."""

    window_first: int
    chunk: int
    in_sweep_2: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowsPlace:
    """Inside one group of rows.

    Attributes:
        first: the first chunk of the window under way.
        next: the chunk to be run next, counted in the window.
        in_sweep_2: which of the two sweeps it is.
        boundaries: enough of the states before the chunks up to `next` to compute the others.
        adjoint: gradient of the state behind chunk `next`; None before the last chunk has run in sweep 2.
        state_after: behind the window's last chunk, known with the adjoint.
        loss_sum: of the chunks whose backward pass is done, float64.
        initial_gradient: of the state before the first window, once that is done.
        largest_difference: between recomputed and banked states so far.
        random: the generators before each chunk of the window that has run, and behind the last; empty without dropout.
        set_losses: the part of each set in loss_sum; None before the first, and where there is one set only.
        cache: of the window, with its gradient; empty in a model without attention.
    """

    first: int
    next: int
    in_sweep_2: bool
    boundaries: list[Boundary]
    adjoint: ModelState | None
    state_after: ModelState | None
    loss_sum: Tensor
    initial_gradient: ModelState | None
    largest_difference: Tensor
    random: list[RandomState]
    set_losses: Tensor | None = None
    cache: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlace:
    """Inside one step.

    Attributes:
        group: the group of rows under way.
        states_after: of the groups before it.
        loss_sums: of the groups before it, float64.
        set_losses: the part of each set in the loss of the groups before it; None where there is none, or one set only.
        windows: where it is in this group.
        random_state: the generators now.
        passes: chunks run so far, in both sweeps.
        seconds: what the step has taken so far.
    """

    group: int
    states_after: list[ModelState]
    loss_sums: list[Tensor]
    windows: WindowsPlace
    random_state: RandomState
    passes: int
    seconds: float
    set_losses: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """All tensors, by names that `from_parts` understands."""
        windows = self.windows
        tensors = {"loss_sum": windows.loss_sum, "largest_difference": windows.largest_difference}
        for name, losses in (("set_losses", windows.set_losses), ("groups_set_losses", self.set_losses)):
            if losses is not None:
                tensors[name] = losses
        for index, state in windows.boundaries:
            tensors.update(_named(f"boundary.{index}", state))
        for name in ("adjoint", "state_after", "initial_gradient"):
            if (state := getattr(windows, name)) is not None:
                tensors.update(_named(name, state))
        tensors.update({f"cache.{name}": tensor for name, tensor in windows.cache.items()})
        for group, state in enumerate(self.states_after):
            tensors.update(_named(f"group.{group}", state))
            tensors[f"group.{group}.loss_sum"] = self.loss_sums[group]
        for index, random in enumerate([self.random_state, *windows.random]):
            tensors.update({f"random.{index}.{name}": tensor for name, tensor in random.items()})
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def to_facts(self) -> dict[str, object]:
        """Everything else, as JSON values."""
        windows = self.windows
        return {
            "group": self.group,
            "window_first_chunk": windows.first,
            "next_chunk_of_window": windows.next,
            "in_sweep_2": windows.in_sweep_2,
            "boundaries": [index for index, _ in windows.boundaries],
            "random": len(windows.random),
            "passes": self.passes,
            "seconds": self.seconds,
        }

    def in_words(self) -> str:
        """Where it is, for people."""
        windows = self.windows
        chunk = windows.first + windows.next + 1
        return f"at chunk {chunk:,} of group {self.group + 1}, sweep {2 if windows.in_sweep_2 else 1}"

    @classmethod
    def from_parts(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> StepPlace:
        """What `to_facts` and `to_tensors` gave, with states on the device."""

        def state(name: str) -> ModelState | None:
            parts = [f"{name}.{field}" for field in (*RECURRENT_FIELDS, *CACHE_FIELDS) if f"{name}.{field}" in tensors]
            return ModelState(*(tensors[part].to(device) for part in parts)) if parts else None

        def states(names: list[str]) -> list[ModelState]:
            return [found for found in map(state, names) if found is not None]

        def random(index: int) -> RandomState:
            keys = ("cpu", "device")
            return {key: tensors[f"random.{index}.{key}"] for key in keys if f"random.{index}.{key}" in tensors}

        groups = range(facts["group"])
        boundaries = states([f"boundary.{index}" for index in facts["boundaries"]])
        windows = WindowsPlace(
            first=facts["window_first_chunk"],
            next=facts["next_chunk_of_window"],
            in_sweep_2=facts["in_sweep_2"],
            boundaries=list(zip(facts["boundaries"], boundaries, strict=True)),
            adjoint=state("adjoint"),
            state_after=state("state_after"),
            loss_sum=tensors["loss_sum"].to(device),
            initial_gradient=state("initial_gradient"),
            largest_difference=tensors["largest_difference"].to(device),
            random=[random(index) for index in range(1, facts["random"] + 1)],
            set_losses=tensors["set_losses"].to(device) if "set_losses" in tensors else None,
            cache={name.removeprefix("cache."): one for name, one in tensors.items() if name.startswith("cache.")},
        )
        return cls(
            group=facts["group"],
            states_after=states([f"group.{group}" for group in groups]),
            loss_sums=[tensors[f"group.{group}.loss_sum"].to(device) for group in groups],
            windows=windows,
            random_state=random(0),
            passes=facts["passes"],
            seconds=facts["seconds"],
            set_losses=tensors["groups_set_losses"].to(device) if "groups_set_losses" in tensors else None,
        )


def random_state(device: torch.device) -> RandomState:
    """Read the generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: RandomState, device: torch.device) -> None:
    """Put the generators where they were; without a state for this kind of device its generator is left alone."""
    torch.set_rng_state(states["cpu"])
    if "device" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)


def _named(prefix: str, state: ModelState) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in zip(state.fields, state, strict=True)}
