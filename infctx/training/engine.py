"""What a step needs of whatever holds the weights: one process, or many that divide them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from infctx.training.optimizer_state import Numbers, join_state_, split_state
from infctx.training.ranks import ALONE, Ranks

Part = Any
"""Stands for one tensor of a run that may be divided among the ranks: has `numel()` and `dtype`, see `whole`."""


class Engine(Protocol):
    """How gradients come together, how they are applied, and how weights go in and out as whole tensors.

    Whatever is called on one rank is called on all, in the same order.
    """

    ranks: Ranks
    optimizer: torch.optim.Optimizer
    stops_inside_steps: bool
    """Whether a step can be left and entered again: `own_gradients` tells what there is of the gradient by then."""

    def expect(self, *, is_last: bool) -> bool:
        """Say before the forward pass of a chunk whether its backward pass is the last of the step.

        Returns:
            Whether that pass has to reach every trained parameter.
        """

    def backward(self, scalar: Tensor) -> None:
        """Backward pass of one chunk's objective, of which every rank has a term: their mean is what counts."""

    def update(self, clip: float | None) -> float:
        """Clip the whole gradient and update the weights; leave them alone where it is not finite.

        Returns:
            The norm of the whole gradient before it was clipped.
        """

    def forget_gradient(self) -> None:
        """Begin a step, or begin it again."""

    def trained(self) -> dict[str, Part]:
        """The trained weights by the names of the model."""

    def optimizer_state(self) -> tuple[dict[str, Part], Numbers]:
        """The optimizer's tensors and numbers, "3.exp_avg" being of the fourth parameter."""

    def whole(self, part: Part, *, is_wanted: bool = True) -> Tensor | None:
        """All of a tensor, on the host, for as long as nothing changes; None where it is not wanted."""

    def load(self, trained: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put whole tensors in place: the weights, and the state of the optimizer where there is one yet."""

    def put(self, part: Part, whole: Tensor) -> None:
        """Put a whole tensor in the place of one that may be divided."""

    def own_gradients(self) -> dict[str, Tensor]:
        """What this rank has of the gradient inside a step, on the host."""

    def put_own_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Go on from what `own_gradients` gave on the same rank of as many."""


class WholeWeights:
    """An engine of processes that each hold all weights; one process on its own, or several with the same gradient.

    Args:
        model: only for what asks for weights by their names.
        backward: called with a scalar.
    """

    stops_inside_steps = True

    def __init__(
        self,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        *,
        backward: Callable[[Tensor], None] = torch.autograd.backward,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self._model, self.optimizer, self._call_backward = model, optimizer, backward

    def expect(self, *, is_last: bool) -> bool:
        """The last pass reaches everything, so that an optimizer sees a gradient of 0 and not none, on all engines."""
        return is_last

    def backward(self, scalar: Tensor) -> None:
        """Backward pass of one chunk's objective."""
        self._call_backward(scalar)

    def update(self, clip: float | None) -> float:
        """Clip and update, see `Engine`."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        norm = float(self.whole(norm))  # type: ignore[arg-type]
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    def forget_gradient(self) -> None:
        """Begin a step, or begin it again."""
        self.optimizer.zero_grad(set_to_none=True)

    def trained(self) -> dict[str, Part]:
        """The trained weights by the names of the model."""
        return {name: parameter.detach() for name, parameter in self._named()}

    def optimizer_state(self) -> tuple[dict[str, Part], Numbers]:
        """The optimizer's tensors and numbers."""
        return split_state(self.optimizer)

    def whole(self, part: Part, *, is_wanted: bool = True) -> Tensor | None:
        """All of a tensor, on the host."""
        return part.detach().cpu() if is_wanted else None

    def whole_gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient that the next update would use, on the host; None where there is none."""
        return None if parameter.grad is None else self.whole(parameter.grad)

    def load(self, trained: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put whole tensors in place."""
        parameters = self.trained()
        with torch.no_grad():
            for name, tensor in trained.items():
                self.put(parameters[name], tensor)
        join_state_(self.optimizer, optimizer, numbers)

    def put(self, part: Part, whole: Tensor) -> None:
        """Put a whole tensor in its place."""
        part.copy_(whole)

    def own_gradients(self) -> dict[str, Tensor]:
        """The .grad there is, on the host."""
        return {name: p.grad.detach().cpu() for name, p in self._named() if p.grad is not None}

    def put_own_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put them into .grad."""
        parameters = dict(self._named())
        for name, gradient in gradients.items():
            place = parameters[name].grad
            if place is None:
                parameters[name].grad = gradient.to(parameters[name].device, copy=True)
            else:
                place.copy_(gradient)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        assert self._model is not None, "an engine without a model"
        return ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)
