"""What a recipe may say: one frozen pydantic model a section, every key described with its unit.

This file knows neither torch nor the disk: whatever needs a file or a device to be decided stays `auto` here.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from infctx.recipe.adapter_section import AdapterSection
from infctx.recipe.data_section import DataSection
from infctx.recipe.fields import Count, Section, Text, refuse
from infctx.recipe.optimizer_section import OptimizerSection
from infctx.recipe.run_section import SHARDING, RunSection

# Adapters that compute with a base matrix only as a function, and never read or change its values.
_ON_A_QUANTIZED_BASE = ("lora", "rslora", "state")


class ModelSection(Section):
    """The model to start from."""

    path: Text = Field(description="Model file: an official .pth, or .safetensors as this project writes it.")
    quantize: Literal["none", "int8", "nf4", "bnb-int8"] = Field(
        default="none",
        description="How the frozen matrices of the blocks are stored under an adapter: none: as floats; int8: 8.5 "
        "bits a weight; nf4: 4.5 bits, through bitsandbytes; bnb-int8: 8 bits, with inputs rounded to 8 bits, too, "
        "through bitsandbytes. Embedding and head stay as they are.",
    )


class BpttSection(Section):
    """How far the gradient reaches back through a document."""

    chunk_tokens: Count = Field(default=1024, description="Tokens computed at once; decides memory, not the result.")
    window: Count | Literal["document"] = Field(
        default="document",
        description="Chunks the gradient crosses; document: the whole document, the exact gradient.",
    )
    activations: Literal["auto", "keep", "recompute"] = Field(
        default="auto",
        description="A chunk's activations for its backward pass: keep them, or recompute them layer by layer, slower "
        "and in far less memory, with the same result; auto: keep where they are expected to fit.",
    )
    boundaries: Literal["auto", "device", "host", "disk"] = Field(
        default="auto",
        description="Where the states between the chunks of a window wait: on the device, in host memory, or on disk "
        "in the run folder; auto: the first with room for the longest window.",
    )
    thin_boundaries: bool = Field(
        default=False,
        description="Keep the square root of their number only, and run forward once more to have the others back.",
    )


class KernelSection(Section):
    """Which implementation of the recurrence runs."""

    backend: Text = Field(default="auto", description="Backend by name; auto: the fastest that can run here.")


class Recipe(Section):
    """A fine-tuning run, as its author meant it."""

    model: ModelSection = Field(description="The model to start from.")
    data: DataSection = Field(description="The documents, how they are read, and which are held out.")
    adapter: AdapterSection = Field(default_factory=AdapterSection, description="Which weights are trained.")
    bptt: BpttSection = Field(default_factory=BpttSection, description="How far the gradient reaches back.")
    optimizer: OptimizerSection = Field(description="AdamW, its learning rates, and terms of the training loss.")
    kernel: KernelSection = Field(default_factory=KernelSection, description="Implementation of the recurrence.")
    run: RunSection = Field(description="Where a run writes, how long it lasts and what it runs on.")

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = []
        if self.model.quantize != "none" and self.adapter.kind not in _ON_A_QUANTIZED_BASE:
            problems.append(
                (
                    "model.quantize",
                    f"{self.model.quantize} stores frozen matrices as codes, and adapter.kind {self.adapter.kind} "
                    "trains them or computes with their values; set adapter.kind: "
                    f"{' or '.join(_ON_A_QUANTIZED_BASE)}, or model.quantize: none",
                )
            )
        if self.data.mode == "stream" and self.bptt.window == "document":
            problems.append(
                (
                    "data.mode",
                    "stream and bptt.window document exclude each other: a stream runs documents back to back, without "
                    "an end; set bptt.window to a number of chunks, or data.mode: document",
                )
            )
        if self.data.pack_tokens is not None and self._resolved_mode() == "stream":
            problems.append(
                (
                    "data.pack_tokens",
                    "means nothing in stream mode, where rows have no ends; remove it or set data.mode: document",
                )
            )
        refuse(problems + self._strategy_problems())
        return self

    def _strategy_problems(self) -> list[tuple[str, str]]:
        """What the way the run is spread over devices cannot do."""
        strategy, problems = self.run.strategy, []
        if self.bptt.chunk_tokens < self.run.time_parallel:
            problems.append(
                (
                    "bptt.chunk_tokens",
                    f"expected at least one token for each of run.time_parallel = {self.run.time_parallel} devices, "
                    f"got {self.bptt.chunk_tokens}",
                )
            )
        if self.model.quantize != "none" and strategy in SHARDING:
            problems.append(
                (
                    "model.quantize",
                    f"codes cannot be divided among devices; with {self.model.quantize} use run.strategy: ddp, "
                    "deepspeed_1 or deepspeed_2",
                )
            )
        if self.optimizer.name != "adamw" and strategy not in ("auto", "single", "ddp"):
            problems.append(
                (
                    "optimizer.name",
                    f"{self.optimizer.name} has no form for run.strategy {strategy}, which divides the optimizer's "
                    "state; set adamw, with run.offload where there is no room for it",
                )
            )
        if self.optimizer.ema_decay is not None and strategy.startswith("deepspeed"):
            problems.append(
                (
                    "optimizer.ema_decay",
                    f"averages cannot be kept of weights that run.strategy {strategy} updates; set fsdp or ddp, or "
                    "remove it",
                )
            )
        return problems

    def _resolved_mode(self) -> Literal["stream", "document"]:
        if self.data.mode != "auto":
            return self.data.mode
        return "document" if self.bptt.window == "document" else "stream"

    def resolved(self) -> Self:
        """The same recipe with everything filled in that can be known without reading a file or asking a device."""
        data = self.data.model_copy(update={"mode": self._resolved_mode()})
        return self.model_copy(
            update={"data": data, "adapter": self.adapter.resolved(), "optimizer": self.optimizer.resolved()}
        )

    def to_mapping(self) -> dict[str, dict[str, object]]:
        """Plain sections of plain values, which read back as an equal recipe.

        Left out: keys that mean nothing with this kind of adapter, and nulls that are also the default.
        """
        foreign = self.adapter.foreign_keys()
        mapping: dict[str, dict[str, object]] = {}
        for section_name, section in self:
            fields = type(section).model_fields
            mapping[section_name] = {
                key: value
                for key, value in section.model_dump(mode="json").items()
                if not (section_name == "adapter" and key in foreign)
                and not (value is None and fields[key].default is None)
            }
        if self.data.sets is not None:
            # What a set leaves open comes from its section, and has to stay open.
            mapping["data"]["sets"] = [one.model_dump(mode="json", exclude_unset=True) for one in self.data.sets]
        return mapping
