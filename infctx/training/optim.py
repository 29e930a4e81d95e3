"""Parameter groups, AdamW, and the learning rate of every step.

Source: the published grouping and schedules of the RWKV-6 trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "cosine", "linear", "exponential"]


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], *, weight_decay: float, decay_lr_multiplier: float
) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and learning-rate multiplier ("lr_multiplier" in each group).

    Matrices are decayed; vectors, norms, token-shift mixes and low-rank pairs are not. The base of the decay learns
    faster: exp(-exp(·)) is flat in it.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        multiplier, decay = _rule(name, parameter, weight_decay, decay_lr_multiplier)
        group = groups.setdefault(
            (multiplier, decay), {"params": [], "weight_decay": decay, "lr_multiplier": multiplier}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _rule(name: str, parameter: Tensor, weight_decay: float, decay_lr_multiplier: float) -> tuple[float, float]:
    last = name.rsplit(".", 1)[-1]
    if last == "decay_base":
        return decay_lr_multiplier, 0.0
    if last == "initial_state":
        return 1.0, weight_decay
    # Low-rank pairs are matrices too, but loose parameters: their names do not end in "weight".
    is_matrix = sum(size > 1 for size in parameter.shape) >= 2 and last == "weight"
    return 1.0, weight_decay if is_matrix else 0.0


def make_adamw(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; moments have the parameters' dtype, which is float32 in training."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """The learning rate at each step.

    lr: after the warm-up. lr_final: at the last step, of the decaying schedules. warmup_steps: steps over which the
    rate rises from 1 % to 100 %. total_steps: of the run.
    """

    lr: float
    lr_final: float
    schedule: Schedule
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The rate of the step that follows `step` finished ones."""
        warmup = min(1.0, 0.01 + 0.99 * step / self.warmup_steps) if self.warmup_steps else 1.0
        after_warmup = max(1, self.total_steps - self.warmup_steps - 1)
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / after_warmup))
        return warmup * self._scheduled(progress)

    def _scheduled(self, progress: float) -> float:
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "linear":
            return self.lr + (self.lr_final - self.lr) * progress
        if self.schedule == "exponential":
            return self.lr * (self.lr_final / self.lr) ** progress
        return self.lr_final + (self.lr - self.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))

    def apply_(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set every group's rate for this step; returns the rate before multipliers."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        return rate
