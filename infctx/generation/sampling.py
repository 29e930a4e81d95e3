"""The next token, drawn from logits."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from infctx.errors import CheckpointError, InfctxError

# Nearly every nucleus lies within the first of these: sorting a whole vocabulary takes longer than a small model does.
_LOOKS = (256, 4096)


class LogitsError(CheckpointError):
    """A model whose logits are no numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How a token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 = always the most probable token.
        top_k: draw from this many of the most probable tokens; 0 = all.
        top_p: of those, draw from the fewest whose probabilities sum to this; 1 = all.
        presence_penalty: taken from the logit of every token that was drawn before.
        frequency_penalty: taken once more for each time it was drawn.
        penalty_decay: what such a count is multiplied by at each token, in 0..1; 1 = it stays.

    Source of the penalties: the demo programs of the World models. Tokens of the prompt are not counted.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 1e6),
            "top_k": (0, 2**31),
            "top_p": (0.0, 1.0),
            "presence_penalty": (-1e3, 1e3),
            "frequency_penalty": (-1e3, 1e3),
            "penalty_decay": (0.0, 1.0),
        }
        for option in fields(self):
            low, high = ranges[option.name]
            value = getattr(self, option.name)
            # Not a NaN either.
            if not low <= value <= high:
                name = option.name.replace("_", "-")
                raise InfctxError(f"--{name} {value:g}: expected a number from {low:g} to {high:g}.")


class Sampler:
    """Draws the tokens of one text, with a generator and counts of its own.

    Args:
        seed: the same seed and logits give the same tokens.
        usable_ids: ids from here on are rows of the vocabulary that no token has; they are never drawn.
    """

    def __init__(self, options: SamplingOptions, *, seed: int, usable_ids: int) -> None:
        self.options = options
        self._usable_ids = usable_ids
        self._generator = torch.Generator().manual_seed(seed)
        self._has_penalties = options.presence_penalty != 0 or options.frequency_penalty != 0
        # Of the tokens drawn so far alone: a vocabulary has a hundred times as many as a text.
        self._counts: dict[int, float] = {}

    def draw(self, logits: Tensor) -> int:
        """Draw a token.

        Args:
            logits: [V], on any device.
        Raises:
            LogitsError: they are not finite.
        """
        usable = logits[: self._usable_ids].detach().float().cpu()
        if not bool(torch.isfinite(usable.sum())):
            raise LogitsError(
                "the model's logits are not finite: its weights are damaged, its training diverged, or they overflow "
                "in this --dtype."
            )
        if not self._has_penalties:
            return self._draw(usable)
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        penalties = self.options.presence_penalty + self.options.frequency_penalty * counts
        ids = torch.tensor(list(self._counts), dtype=torch.int64)
        token = self._draw(usable.index_add(0, ids, -penalties.float()))
        decay = self.options.penalty_decay
        self._counts = {drawn: count * decay for drawn, count in self._counts.items()}
        self._counts[token] = self._counts.get(token, 0.0) + 1.0
        return token

    def _draw(self, logits: Tensor) -> int:
        if self.options.temperature == 0:
            return int(logits.argmax())
        # In float64, and from the largest logit down: no temperature is too small or too large.
        weights = ((logits.double() - logits.max()) / self.options.temperature).exp_()
        kept, ids = self._most_probable(weights)
        sums = kept.cumsum(0)
        # One number a token whatever the length: rounding in the logits moves a border, and nothing else.
        wanted = torch.rand(1, dtype=torch.float64, generator=self._generator) * sums[-1]
        place = min(int(torch.searchsorted(sums, wanted, right=True)), kept.numel() - 1)
        return place if ids is None else int(ids[place])

    def _most_probable(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights that are drawn from, and their ids; None = all of them, in order."""
        top_k, top_p = self.options.top_k, self.options.top_p
        if 0 < top_k < weights.numel():
            weights, ids = weights.topk(top_k)
            return (weights, ids) if top_p >= 1 else _nucleus(weights, ids, top_p * weights.sum())
        if top_p >= 1:
            return weights, None
        wanted = top_p * weights.sum()
        for look in _LOOKS:
            largest, ids = weights.topk(min(look, weights.numel()))
            if largest.sum() >= wanted:
                return _nucleus(largest, ids, wanted)
        return _nucleus(*weights.sort(descending=True), wanted)


def _nucleus(weights: Tensor, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest of the largest weights that sum to what is wanted, one at least; weights fall."""
    before = weights.cumsum(0) - weights
    num_kept = max(1, int((before < wanted).sum()))
    return weights[:num_kept], ids[:num_kept]
