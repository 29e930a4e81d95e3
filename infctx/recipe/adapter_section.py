"""The adapter section of a recipe: which weights are trained, and how."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infctx.recipe.fields import Count, Number, Section, Text, refuse

PositiveNumber = Annotated[Number, Field(gt=0)]

_ADDITIONS = ("rank", "dropout", "targets", "train_also")
_LORA = (*_ADDITIONS, "alpha", "ranks", "alphas")
_SHIFTS = ("initial_shifts",)
_STATES = ("initial_state", *_SHIFTS)
# Which keys mean something with which kind.
KEYS_OF_KIND = {
    "full": ("freeze", *_STATES),
    "lora": (*_LORA, *_STATES),
    "rslora": (*_LORA, *_STATES),
    "dora": (*_LORA, *_STATES),
    "pissa": (*_LORA, "svd_iterations", *_STATES),
    "olora": (*_LORA, *_STATES),
    "miss": (*_ADDITIONS, "miss_init", "miss_mini_rank", *_STATES),
    "state": _SHIFTS,
}
# With a scale of alpha / √rank, one alpha serves every rank.
_RSLORA_ALPHA = 16.0
_ALPHA_PER_RANK = {"lora": 2.0, "dora": 2.0, "pissa": 1.0, "olora": 1.0}


class AdapterSection(Section):
    """Which weights are trained."""

    kind: Literal["full", "lora", "rslora", "dora", "pissa", "olora", "miss", "state"] = Field(
        default="full",
        description="full: every weight; lora: low-rank additions; rslora: scaled by the root of the rank; dora: with "
        "a length for each output; pissa, olora: begun from the largest part of each matrix; miss: shared by blocks of "
        "inputs; state: the state that documents begin with, and no weight.",
    )
    rank: Count = Field(default=32, description="Additions: rank of each.")
    alpha: PositiveNumber | None = Field(
        default=None,
        description="LoRA kinds: scale; the addition is multiplied by alpha / rank, with rslora by alpha / √rank. "
        "null: 2 × rank of each matrix; rank with pissa and olora; 16 with rslora.",
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Additions: probability of dropping an input of the addition, 0 to 1 exclusive."
    )
    targets: Annotated[list[Text], Field(min_length=1)] = Field(
        default=["receptance", "key", "value", "gate", "output"],
        description="Additions: matrices that get one, by the last part or parts of the name, globs allowed (key, "
        "channel_mix.key, 'blocks.2*.time_mix.*'). head is one, too; embedding with lora, rslora and dora. The default "
        "means those of them that the model has, and query.",
    )
    ranks: dict[Text, Count] = Field(
        default={},
        description="LoRA kinds: ranks of some of the matrices, by names as in targets; where two of them match, the "
        "later one counts.",
    )
    alphas: dict[Text, PositiveNumber] = Field(
        default={}, description="LoRA kinds: the same for alpha; null alphas follow the ranks."
    )
    train_also: list[Text] = Field(
        default=[], description="Additions: globs of parameter names trained as they are, e.g. '*.lerp_*'."
    )
    svd_iterations: Count | None = Field(
        default=4, description="PiSSA: iterations of the randomised decomposition; null: the exact one, far slower."
    )
    miss_init: Literal["default", "bat", "mini"] = Field(
        default="default",
        description="MiSS: default; bat: also times the matrix, block by block; mini: shared by blocks of outputs.",
    )
    miss_mini_rank: Count | None = Field(
        default=None, description="MiSS mini: different columns of an addition; divides the outputs of every target."
    )
    freeze: list[Text] = Field(default=[], description="Full: globs of parameter names left as they are.")
    initial_state: bool = Field(
        default=False, description="Train the state of the recurrence that documents begin with, too."
    )
    initial_shifts: bool = Field(
        default=False,
        description="Train what stands for the token before a document's first, too; needs the initial state. Only "
        "infctx reads such models.",
    )

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> Self:
        # An explicit null says no more than leaving the key out.
        said = [key for key in self.foreign_keys() if key in self.model_fields_set and getattr(self, key) is not None]
        problems = [(f"adapter.{key}", self._why_foreign(key)) for key in said]
        if self.initial_shifts and not (self.initial_state or self.kind == "state"):
            problems.append(("adapter.initial_shifts", "needs adapter.initial_state: true, or adapter.kind: state"))
        if self.miss_mini_rank is not None and self.kind == "miss" and self.miss_init != "mini":
            problems.append(("adapter.miss_mini_rank", "means nothing without adapter.miss_init: mini"))
        if self.miss_init == "mini" and self.miss_mini_rank is None:
            problems.append(("adapter.miss_mini_rank", "missing: adapter.miss_init mini needs it"))
        refuse(problems)
        return self

    def foreign_keys(self) -> tuple[str, ...]:
        """The keys that mean nothing with this kind."""
        meant = ("kind", *KEYS_OF_KIND[self.kind])
        return tuple(key for key in type(self).model_fields if key not in meant)

    def _why_foreign(self, key: str) -> str:
        others = [kind for kind, keys in KEYS_OF_KIND.items() if key in keys]
        if self.kind == "state" and key == "initial_state":
            return "means nothing with adapter.kind state, which trains it always; remove it"
        return f"means nothing with adapter.kind {self.kind}; remove it or set adapter.kind: {' or '.join(others)}"

    def resolved(self) -> Self:
        """The same section with every alpha filled in."""
        if self.alpha is not None or "alpha" in self.foreign_keys():
            return self
        if self.kind == "rslora":
            return self.model_copy(update={"alpha": _RSLORA_ALPHA})
        per_rank = _ALPHA_PER_RANK[self.kind]
        of_ranks = {name: per_rank * rank for name, rank in self.ranks.items() if name not in self.alphas}
        return self.model_copy(update={"alpha": per_rank * self.rank, "alphas": {**of_ranks, **self.alphas}})

    def in_words(self) -> str:
        """The kind and its rank, as a person would say it."""
        if self.kind in ("full", "state"):
            words = {"full": "full", "state": "initial state"}[self.kind]
        else:
            names = {
                "lora": "LoRA",
                "rslora": "rsLoRA",
                "dora": "DoRA",
                "pissa": "PiSSA",
                "olora": "OLoRA",
                "miss": "MiSS",
            }
            others = "".join(f", {rank} in {name}" for name, rank in self.ranks.items())
            words = f"{names[self.kind]} rank {self.rank}{others}"
        return (
            words
            + (" and initial state" if self.initial_state else "")
            + (" and shifts" if self.initial_shifts else "")
        )
