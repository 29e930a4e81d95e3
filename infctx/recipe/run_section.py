"""The run section: where a run writes, how long it lasts, and how it is spread over devices and machines."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from infctx.recipe.fields import Count, FewCount, Number, Section, Text, refuse

Strategy = Literal["auto", "single", "ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3"]
# Parameters are divided among the ranks, and no rank holds one whole for longer than it computes with it.
SHARDING = ("fsdp", "deepspeed_3")
# What each strategy can leave in host memory.
_OFFLOADS = {
    "fsdp": ("none", "all"),
    "deepspeed_1": ("none", "optimizer"),
    "deepspeed_2": ("none", "optimizer"),
    "deepspeed_3": ("none", "optimizer", "all"),
}
# Of DeepSpeed's configuration, what follows from other keys of the recipe or is the training loop's own business.
_OWN_DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "zero_optimization.stage",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "managed_gradient_accumulation",
)


class WandbSection(Section):
    """Where a run goes at Weights & Biases, with wandb among run.loggers."""

    project: Text = Field(default="infctx", description="Project it belongs to.")
    entity: Text | None = Field(default=None, description="User or team that owns it; null: your own account.")
    name: Text | None = Field(default=None, description="What it is called; null: as the run folder.")
    offline: bool = Field(default=False, description="Write it into the run folder only; `wandb sync` uploads it.")


class RunSection(Section):
    """Where a run writes, how long it lasts and what it runs on."""

    folder: Text = Field(description="Run folder; started again in it, the run continues.")
    steps: Count | None = Field(default=None, description="Optimizer steps in all; give either this or epochs.")
    epochs: FewCount | None = Field(default=None, description="Passes over the documents; give either this or steps.")
    rows: FewCount = Field(default=1, description="Rows (sequences with a state of their own) at once on each device.")
    accumulate: FewCount = Field(default=1, description="Groups of rows whose gradients are added up before a step.")
    devices: FewCount | Literal["auto"] = Field(
        default="auto",
        description="Devices of each machine, one process each, on a CPU processes; auto: every GPU here, else one.",
    )
    num_nodes: FewCount = Field(default=1, description="Machines; each is started with the same command.")
    strategy: Strategy = Field(
        default="auto",
        description="How weights, gradients and optimizer are spread over devices. ddp: whole on each; fsdp (FSDP2) "
        "and deepspeed_3: divided among them; deepspeed_1: the optimizer's state divided; deepspeed_2: gradients too. "
        "auto: single on one device, ddp on several.",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none",
        description="What waits in host memory. optimizer: its state, with deepspeed_1, _2, _3; all: weights, too, "
        "with fsdp and deepspeed_3.",
    )
    deepspeed: dict[Text, JsonValue] = Field(
        default={},
        description="Laid over the configuration given to DeepSpeed: bucket sizes, an nvme_path with its aio settings.",
    )
    time_parallel: FewCount = Field(
        default=1,
        description="Devices that share each chunk, every one computing its part of the tokens, with the same result; "
        "divides devices × num_nodes.",
    )
    hang_seconds: Annotated[Number, Field(ge=10)] = Field(
        default=1800.0,
        description="Seconds without progress after which a process counts as hanging, and ends the run by its name.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Compute precision; bf16 keeps trained weights and states in fp32."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of the order of documents, of new weights, of dropout and of noise."
    )
    checkpoint_every: Count | None = Field(
        default=None, description="Steps between checkpoints; null: one at the end only."
    )
    checkpoint_minutes: Annotated[Number, Field(gt=0)] | None = Field(
        default=30.0,
        description="Minutes after which a checkpoint is written all the same, also inside a step; null: never.",
    )
    validate_every: Count | None = Field(
        default=None, description="Steps between validations; null: before the first and after the last step only."
    )
    keep_checkpoints: Count = Field(default=2, description="Checkpoints kept; older ones are deleted.")
    max_nonfinite_steps: Count = Field(
        default=10, description="Steps in a row that may be left out for an infinite or NaN gradient before it stops."
    )
    report: bool = Field(
        default=True,
        description="Write report.html, with loss by position and samples from before and after the run; false: "
        "neither measure nor write.",
    )
    loggers: list[Literal["csv", "tensorboard", "wandb"]] = Field(
        default=[],
        description="Further places for the numbers of metrics.jsonl: metrics.csv, TensorBoard's event files, Weights "
        "& Biases. None of them can stop the run.",
    )
    wandb: WandbSection = Field(default_factory=WandbSection, description="Of the logger wandb.")

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        problems = []
        if self.steps is None and self.epochs is None:
            problems.append(("run.steps", "missing: a run needs exactly one of run.steps and run.epochs"))
        if self.steps is not None and self.epochs is not None:
            problems.append(("run.epochs", "cannot stand beside run.steps; keep one of the two"))
        if len(set(self.loggers)) < len(self.loggers):
            problems.append(("run.loggers", f"expected each name once, got {', '.join(self.loggers)}"))
        if self.wandb != WandbSection() and "wandb" not in self.loggers:
            problems.append(("run.wandb", "has no effect without wandb in run.loggers; add it there, or remove this"))
        problems += self._spread_problems()
        refuse(problems)
        return self

    def _spread_problems(self) -> list[tuple[str, str]]:
        """What does not fit together in how the work is spread."""
        problems = []
        ranks = None if self.devices == "auto" else self.devices * self.num_nodes
        if self.strategy == "single" and (self.num_nodes > 1 or (ranks or 1) > 1):
            what = f"{self.devices} devices on {self.num_nodes} machines" if self.num_nodes > 1 else f"{ranks} devices"
            problems.append(
                ("run.strategy", f"single is for one device, got {what}; set ddp, fsdp, deepspeed_1, _2 or _3")
            )
        if self.offload not in _OFFLOADS.get(self.strategy, ("none",)):
            fitting = [name for name, offloads in _OFFLOADS.items() if self.offload in offloads]
            problems.append(
                (
                    "run.offload",
                    f"{self.offload} cannot be done with run.strategy {self.strategy}; expected one of "
                    f"{', '.join(fitting)}, or run.offload: none",
                )
            )
        if self.deepspeed and not self.strategy.startswith("deepspeed"):
            problems.append(
                (
                    "run.deepspeed",
                    f"has no effect with run.strategy {self.strategy}; remove it, or set deepspeed_1, _2 or _3",
                )
            )
        problems += [
            ("run.deepspeed", f"{key} follows from other keys of the recipe; remove it")
            for key in _OWN_DEEPSPEED_KEYS
            if _has(self.deepspeed, key)
        ]
        if ranks is not None and ranks % self.time_parallel:
            nearest = [size for size in range(1, ranks + 1) if ranks % size == 0]
            problems.append(
                (
                    "run.time_parallel",
                    f"expected a divisor of run.devices × run.num_nodes = {ranks}, got {self.time_parallel}; "
                    f"those are {', '.join(map(str, nearest))}",
                )
            )
        return problems


def _has(mapping: object, dotted_key: str) -> bool:
    """Whether nested mappings have a value at this place."""
    for part in dotted_key.split("."):
        if not isinstance(mapping, dict) or part not in mapping:
            return False
        mapping = mapping[part]
    return True
