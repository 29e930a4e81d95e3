"""The kinds of adapter that peft provides, as settings of ours and as peft's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from infctx.adapters.peft_library import import_peft
from infctx.errors import RecipeError

if TYPE_CHECKING:
    import peft

PeftKind = Literal["lora", "rslora", "dora", "pissa", "olora", "miss"]
# They take the largest part out of each matrix and begin with it.
PRINCIPAL_KINDS = ("pissa", "olora")
EMBEDDING_KINDS = ("lora", "rslora", "dora")
_MISS_INIT = {"default": True, "bat": "bat", "mini": "mini"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftSettings:
    """What is attached to which matrices.

    targets: see `target_matrices`. alpha: the addition is multiplied by alpha / rank, with rslora by alpha / √rank;
    None with miss, which has none. ranks, alphas: of some matrices, by name or glob, later ones first. train_also:
    globs of parameters trained as they are. initial_state, initial_shifts: train these, too. svd_iterations: of pissa;
    None = the exact decomposition. miss_mini_rank: with miss_init mini.
    """

    kind: PeftKind
    targets: Sequence[str]
    rank: int
    alpha: float | None
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    train_also: Sequence[str] = ()
    initial_state: bool = False
    initial_shifts: bool = False
    svd_iterations: int | None = 4
    miss_init: Literal["default", "bat", "mini"] = "default"
    miss_mini_rank: int | None = None


def peft_config(settings: PeftSettings, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> peft.PeftConfig:
    """peft's config; the principal kinds begin as plain LoRA, see `principal`.

    Args:
        ranks, alphas: of every target, by its full name.
    """
    peft = import_peft()

    if settings.kind == "miss":
        return peft.MissConfig(
            r=settings.rank,
            miss_dropout=settings.dropout,
            target_modules=list(ranks),
            init_weights=_MISS_INIT[settings.miss_init],
            mini_r=settings.miss_mini_rank or 1,
        )
    assert settings.alpha is not None
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != settings.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != settings.alpha},
        use_rslora=settings.kind == "rslora",
        use_dora=settings.kind == "dora",
        bias="none",
    )


def check_ranks(model: nn.Module, settings: PeftSettings, ranks: Mapping[str, int]) -> None:
    """Refuse a rank that a matrix cannot have.

    Raises:
        RecipeError: names the matrix, its sizes and the rank.
    """
    for name, rank in ranks.items():
        num_outputs, num_inputs = model.get_submodule(name).weight.shape
        problem = None
        if settings.kind in PRINCIPAL_KINDS and rank > min(num_outputs, num_inputs):
            problem = f"at most {min(num_outputs, num_inputs)} with adapter.kind {settings.kind}"
        elif settings.kind == "miss" and rank > num_inputs:
            problem = f"at most its {num_inputs} inputs with adapter.kind miss"
        elif settings.kind == "miss" and settings.miss_init == "bat" and (num_inputs % rank or num_outputs % rank):
            problem = "a divisor of both sizes with adapter.miss_init bat"
        if problem is not None:
            raise RecipeError(f"adapter.rank: {rank} for {name} [{num_outputs}, {num_inputs}]: expected {problem}.")
        mini = settings.miss_mini_rank
        if settings.kind == "miss" and mini is not None and num_outputs % mini:
            raise RecipeError(
                f"adapter.miss_mini_rank: {mini} for {name} [{num_outputs}, {num_inputs}]: expected a divisor of its "
                f"{num_outputs} outputs."
            )
