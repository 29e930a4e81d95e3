"""The optimizer section: AdamW in three kinds, the course of its learning rate, and what shapes the training loss."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from infctx.recipe.fields import Beta, CountOrZero, Fraction, Number, Section, Text, refuse, tuple_from_list

DECAYING = ("cosine", "linear", "exponential", "wsd")
DECAY_FRACTION = 0.1

_Positive = Annotated[Number, Field(gt=0)]
_NotNegative = Annotated[Number, Field(ge=0)]


class OptimizerSection(Section):
    """AdamW, its learning rates, and terms of the training loss."""

    name: Literal["adamw", "adamw-8bit", "adamw-offloaded"] = Field(
        default="adamw",
        description="adamw: moments beside the weights (Loshchilov and Hutter, arXiv 1711.05101); "
        "adamw-8bit: moments of 8 bits, by bitsandbytes (Dettmers et al., arXiv 2110.02861), needs "
        "infctx[bitsandbytes]; adamw-offloaded: moments and the update in host memory, for a GPU without room for "
        "them, and on a CPU the same bits as adamw (after ZeRO-Offload, arXiv 2101.06840).",
    )
    fused: bool | Literal["auto"] = Field(
        default="auto",
        description="AdamW in one pass over each weight: quicker, and rounded in other places (torch.optim.AdamW); "
        "auto: on a GPU.",
    )
    lr: _Positive = Field(description="Highest learning rate, per step.")
    warmup_steps: CountOrZero = Field(default=10, description="Steps over which the learning rate rises to lr.")
    schedule: Literal["constant", "cosine", "linear", "exponential", "wsd"] = Field(
        default="constant",
        description="Course of the learning rate from the warm-up to the last step. wsd: warm-up, stable at lr, and a "
        "straight descent to lr_final at the end (MiniCPM, arXiv 2404.06395).",
    )
    lr_final: _NotNegative | None = Field(
        default=None, description="Learning rate of the last step of a decaying schedule; null: lr / 10."
    )
    decay_fraction: Fraction | None = Field(
        default=None,
        description=f"wsd: part of the run's steps over which the learning rate descends, 0 to 1 exclusive; null: "
        f"{DECAY_FRACTION:g}.",
    )
    clip: _Positive | None = Field(default=1.0, description="Largest norm of the whole gradient; null: not clipped.")
    weight_decay: _NotNegative = Field(
        default=0.0,
        description="AdamW weight decay of the matrices, those of a LoRA among them, and of tuned initial states, per "
        "unit of learning rate; of no vector, norm, mix or low-rank pair of the model (the RWKV-LM trainer's rule).",
    )
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(tuple_from_list)] = Field(
        default=(0.9, 0.99), description="Adam's averaging factors of the gradient and of its square, each in [0, 1)."
    )
    eps: _Positive = Field(default=1e-8, description="Adam's term in the denominator, in units of the gradient.")
    decay_lr_multiplier: _Positive = Field(
        default=2.0,
        description="Learning rate of the decay base vectors, as a multiple of lr (the RWKV-LM trainer's 2).",
    )
    lr_multipliers: dict[Text, _Positive] = Field(
        default={},
        description="Glob of parameter names: factor of their learning rate, beside the other rules; of several that "
        'match all count. {"*.lora_B.*": 16} is LoRA+ (arXiv 2402.12354).',
    )
    state_lr: _Positive | None = Field(
        default=None,
        description="Highest learning rate of tuned initial states, which follow the schedule in proportion; null: lr. "
        "The RWKV-LM trainer tunes states with 1, falling to 0.01.",
    )
    l2_wrap: _NotNegative = Field(
        default=0.0,
        description="Weight of half the square of each token's largest logit in the training loss, so that the logits "
        "do not drift; the official trainers use 1e-4, in full fine-tuning.",
    )
    z_loss: _NotNegative = Field(
        default=0.0,
        description="Weight of the square of each token's log-sum-exp of the logits in the training loss, so that it "
        "stays near 0; PaLM (arXiv 2204.02311) uses 1e-4.",
    )
    min_token_loss: _Positive | None = Field(
        default=None,
        description="Targets whose cross entropy is below this, in nats, add nothing to the gradient. They still count "
        "in the training loss that is reported, and in the weights it is divided by; validation is as ever (the "
        "token_loss_threshold of RWKV-infctx-trainer). null: all count.",
    )
    token_dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Probability that a trained target is left out of a step: its weight is 0 there, in the loss and "
        "in what the loss is divided by. Drawn from run.seed, the step, the row and the place in it (after the "
        "token_dropout_rate of RWKV-infctx-trainer).",
    )
    embedding_noise: _NotNegative = Field(
        default=0.0,
        description="Alpha of NEFTune (arXiv 2310.05914): uniform noise within ± alpha / √(bptt.chunk_tokens × "
        "channels) is added to the embeddings in training; 5 is usual. 0: none.",
    )
    ema_decay: Fraction | None = Field(
        default=None,
        description="Keep the exponential moving average of the trained weights, in fp32, with this factor for each "
        "update, 0 to 1 exclusive; its sum of factors is 1 from the first update on, as of Adam's moments. The adapter "
        "folder, export and generate take it; validation measures the current weights. null: none.",
    )

    @model_validator(mode="after")
    def _keys_belong_together(self) -> Self:
        problems = []
        if self.name == "adamw-8bit" and self.fused != "auto":
            problems.append(("optimizer.fused", "means nothing with optimizer.name adamw-8bit; remove it"))
        if self.schedule == "constant" and self.lr_final is not None:
            choices = ", ".join(DECAYING)
            problems.append(
                ("optimizer.lr_final", f"means nothing with schedule constant; remove it or choose {choices}")
            )
        if self.schedule == "exponential" and self.lr_final == 0:
            problems.append(("optimizer.lr_final", "an exponential schedule never reaches 0; give a number above 0"))
        if self.schedule != "wsd" and self.decay_fraction is not None:
            problems.append(
                (
                    "optimizer.decay_fraction",
                    f"means nothing with schedule {self.schedule}; remove it or set optimizer.schedule: wsd",
                )
            )
        refuse(problems)
        return self

    def resolved(self) -> Self:
        """The same with what a decaying schedule leaves open filled in."""
        filled: dict[str, float] = {}
        if self.schedule in DECAYING and self.lr_final is None:
            filled["lr_final"] = self.lr / 10
        if self.schedule == "wsd" and self.decay_fraction is None:
            filled["decay_fraction"] = DECAY_FRACTION
        return self.model_copy(update=filled)
