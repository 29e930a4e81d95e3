"""Parameter groups, the kinds of AdamW, and the learning rate of every step.

Source: the published grouping and schedules of the RWKV-6 trainer; MiniCPM (arXiv 2404.06395) for wsd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from infctx.adapters.patterns import nearest_names
from infctx.errors import RecipeError
from infctx.training.eight_bit_adamw import make_eight_bit_adamw
from infctx.training.offloaded_adamw import OffloadedAdamW

Schedule = Literal["constant", "cosine", "linear", "exponential", "wsd"]
OptimizerName = Literal["adamw", "adamw-8bit", "adamw-offloaded"]


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    weight_decay: float,
    decay_lr_multiplier: float,
    lr_multipliers: Mapping[str, float] | None = None,
    state_lr_multiplier: float | None = None,
) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and learning-rate multiplier ("lr_multiplier" in each group).

    Matrices are decayed, those of a LoRA and tuned initial states among them; vectors, norms, token-shift mixes and
    low-rank pairs of the model are not. The base of the decay learns faster: exp(-exp(·)) is flat in it.

    Args:
        lr_multipliers: glob of names of trainable parameters -> factor; of several that match all count.
        state_lr_multiplier: of tuned initial states; None = 1.
    Raises:
        RecipeError: a glob matches no trainable parameter, or there is no initial state that the multiplier is for.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    names = [name for name, _ in trained]
    factors = lr_multipliers or {}
    for pattern in factors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"optimizer.lr_multipliers: {pattern!r} matches no trained parameter. {nearest_names(pattern, names)}"
            )
    if state_lr_multiplier is not None and not any(map(_is_initial_state, names)):
        raise RecipeError(
            "optimizer.state_lr: no initial state is trained here; expected a model or an adapter with one. Remove the "
            f"key. {nearest_names('initial_state', names)}"
        )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained:
        multiplier, decay = _rule(name, parameter, weight_decay, decay_lr_multiplier)
        if state_lr_multiplier is not None and _is_initial_state(name):
            multiplier *= state_lr_multiplier
        for pattern, factor in factors.items():
            multiplier *= factor if fnmatchcase(name, pattern) else 1.0
        group = groups.setdefault(
            (multiplier, decay), {"params": [], "weight_decay": decay, "lr_multiplier": multiplier}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _is_initial_state(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last == "initial_state" or last.endswith("_initial_shift")


def _rule(name: str, parameter: Tensor, weight_decay: float, decay_lr_multiplier: float) -> tuple[float, float]:
    last = name.rsplit(".", 1)[-1]
    if last == "decay_base":
        return decay_lr_multiplier, 0.0
    if last == "initial_state":
        return 1.0, weight_decay
    # Low-rank pairs are matrices too, but loose parameters: their names do not end in "weight".
    is_matrix = sum(size > 1 for size in parameter.shape) >= 2 and last == "weight"
    return 1.0, weight_decay if is_matrix else 0.0


def make_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, is_fused: bool = False
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; moments have the parameters' dtype, which is float32 in training.

    Args:
        is_fused: one pass over each tensor, quicker and rounded elsewhere; the same bits again in the same run.
    """
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=is_fused)


def make_optimizer(
    groups: list[dict[str, Any]],
    *,
    name: OptimizerName,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    device: torch.device,
    is_fused: bool | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of this name over `parameter_groups`.

    Args:
        device: where the parameters will be when it steps.
        is_fused: see `make_adamw`; None = on a GPU.
    Raises:
        RecipeError: it cannot run here; says why and what to do.
    """
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    # On a CPU it saves about a millisecond, half a percent of a quickstart step, and rounds runs to another end.
    is_fused = device.type == "cuda" if is_fused is None else is_fused
    if name == "adamw-8bit":
        return make_eight_bit_adamw(groups, **settings, device=device)
    if name == "adamw-offloaded":
        return OffloadedAdamW(groups, **settings, is_fused=is_fused)
    return make_adamw(groups, **settings, is_fused=is_fused)


def moment_bytes(name: OptimizerName, device: torch.device) -> int:
    """Bytes that the optimizer's moments take on the device for each trained parameter."""
    if name == "adamw-8bit":
        return 2
    # On a CPU host memory is the device's; there the gradients are not copied a second time.
    return 0 if name == "adamw-offloaded" and device.type != "cpu" else 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """The learning rate at each step.

    lr: after the warm-up. lr_final: at the last step, of the decaying schedules. warmup_steps: steps over which the
    rate rises from 1 % to 100 %. total_steps: of the run. decay_fraction: part of them over which wsd descends.
    """

    lr: float
    lr_final: float
    schedule: Schedule
    warmup_steps: int
    total_steps: int
    decay_fraction: float = 0.1

    def at(self, step: int) -> float:
        """The rate of the step that follows `step` finished ones."""
        warmup = min(1.0, 0.01 + 0.99 * step / self.warmup_steps) if self.warmup_steps else 1.0
        after_warmup = max(1, self.total_steps - self.warmup_steps - 1)
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / after_warmup))
        return warmup * (self._descended(step) if self.schedule == "wsd" else self._scheduled(progress))

    def _scheduled(self, progress: float) -> float:
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "linear":
            return self.lr + (self.lr_final - self.lr) * progress
        if self.schedule == "exponential":
            return self.lr * (self.lr_final / self.lr) ** progress
        return self.lr_final + (self.lr - self.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))

    def _descended(self, step: int) -> float:
        """wsd: lr, and over the last steps a straight line that is at lr_final in the last one."""
        decay_steps = max(1, round(self.decay_fraction * self.total_steps))
        progress = min(1.0, max(0.0, (step + 1 - (self.total_steps - decay_steps)) / decay_steps))
        return self.lr + (self.lr_final - self.lr) * progress

    def apply_(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set every group's rate for this step; returns the rate before multipliers."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        return rate
