"""The exponential moving average of the trained weights, beside them, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """The average of a model's trainable weights over the updates made so far.

    After n updates it is Σ decay^(n-i) w_i / Σ decay^(n-i) over i = 1..n, w_i being the weights after update i: without
    the weights before the first, which would otherwise make up most of it for as long as n is below 1 / (1 - decay).
    Before the first update it is the weights as they are.

    Args:
        model: with what is trained marked so; on the device where it will be trained.
        decay: above 0 and below 1.
    Source: the bias correction of Kingma and Ba, arXiv 1412.6980, section 3, applied to weights.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        assert 0.0 < decay < 1.0, f"decay={decay}"
        self._decay = decay
        self._weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._averages = {name: _precise(parameter.detach()) for name, parameter in self._weights.items()}
        self._num_updates = 0

    @torch.no_grad()
    def update_(self) -> None:
        """Take in the weights after one more update."""
        self._num_updates += 1
        share = (1.0 - self._decay) / (1.0 - self._decay**self._num_updates)
        for name, average in self._averages.items():
            average.lerp_(self._weights[name].to(average.dtype), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the model has the averages for its trained weights; behind it, its own to the bit."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        try:
            _copy_(self._weights, self._averages)
            yield
        finally:
            _copy_(self._weights, own)

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """By the names of their weights, divided among ranks as they are."""
        return self._averages

    @property
    def num_updates(self) -> int:
        """Updates taken in so far."""
        return self._num_updates

    @torch.no_grad()
    def restore_(
        self,
        tensors: Mapping[str, Tensor],
        *,
        num_updates: int,
        put: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    ) -> None:
        """Go on from whole `averages` and `num_updates`. put: a whole tensor in the place of an average."""
        assert tensors.keys() == self._averages.keys(), "the averages are of other weights"
        for name, average in self._averages.items():
            put(average, tensors[name])
        self._num_updates = num_updates


def _precise(weight: Tensor) -> Tensor:
    """A copy in float32; in float64 where the weight is."""
    return weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)


@torch.no_grad()
def _copy_(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in to.items():
        tensor.copy_(source[name])
