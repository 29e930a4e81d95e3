"""What a recipe may say: one frozen pydantic model a section, every key described with its unit.

This file knows neither torch nor the disk: whatever needs a file or a device to be decided stays `auto` here.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infctx.recipe.adapter_section import AdapterSection
from infctx.recipe.data_section import DataSection
from infctx.recipe.fields import Count, FewCount, Number, Section, Text, refuse
from infctx.recipe.optimizer_section import OptimizerSection

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


class RunSection(Section):
    """Where a run writes, how long it lasts and what it runs on."""

    folder: Text = Field(description="Run folder; started again in it, the run continues.")
    steps: Count | None = Field(default=None, description="Optimizer steps in all; give either this or epochs.")
    epochs: FewCount | None = Field(default=None, description="Passes over the documents; give either this or steps.")
    rows: FewCount = Field(default=1, description="Rows (sequences with a state of their own) at once on each device.")
    accumulate: FewCount = Field(default=1, description="Groups of rows whose gradients are added up before a step.")
    devices: Count | Literal["auto"] = Field(
        default="auto", description="Devices to use; auto: every GPU here, else the CPU."
    )
    strategy: Literal["auto", "single"] = Field(default="auto", description="How the work is spread over devices.")
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

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.steps is None and self.epochs is None:
            refuse([("run.steps", "missing: a run needs exactly one of run.steps and run.epochs")])
        if self.steps is not None and self.epochs is not None:
            refuse([("run.epochs", "cannot stand beside run.steps; keep one of the two")])
        return self


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
        refuse(problems)
        return self

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
