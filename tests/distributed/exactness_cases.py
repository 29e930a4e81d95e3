"""The cases of the exactness matrix, and how one is run by whatever engine: shared by the ranks and by the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn

from infctx.adapters.catalog import ATTACH
from infctx.adapters.peft_kinds import PeftSettings
from infctx.data.document import Document
from infctx.data.stream import DocumentSource, StreamSource
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective
from infctx.training.engine import Engine
from infctx.training.optim import parameter_groups
from infctx.training.ranks import ALONE, Ranks
from infctx.training.step import step_gradient, take_step
from tests.conftest import random_finch

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}
CHUNK_TOKENS = 13
LENGTHS = [29, 5, 50, 1, 16, 44, 23, 2, 39, 27, 7, 41]
VOCAB_SIZE = 50


@dataclass(frozen=True, kw_only=True)
class Case:
    """rows: of the whole step, over all ranks and groups. ranks: of the launch that runs it."""

    name: str
    strategy: str
    ranks: int
    window: int | str = "document"
    accumulate: int = 1
    rows: int = 4
    optimizer: str = "sgd"
    dtype: str = "fp32"
    offload: str = "none"
    time_parallel: int = 1
    adapter: str = "full"
    version: str = "6"
    mode: str = "document"
    masked: bool = False
    is_recomputed: bool = False
    steps: int = 3


def make_model(case: Case) -> Finch:
    model = random_finch(
        case.version,
        n_layer=2,
        n_embd=16,
        dim_ffn=29,
        vocab_size=VOCAB_SIZE,
        dtype=DTYPES[case.dtype],
        has_initial_state=True,
        # Without, what moves all keys alike has a gradient of nothing but rounding.
        uses_rope=True if case.version == "goldfinch" else None,
    )
    torch.manual_seed(5)
    if case.adapter == "lora":
        settings = PeftSettings(
            kind="lora", targets=["key", "value", "output"], rank=3, alpha=6.0, train_also=["*norm*"]
        )
        ATTACH["lora"](model, settings, frozen_dtype=DTYPES[case.dtype])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    elif case.adapter == "state":
        ATTACH["state"](model, initial_shifts=True)
    model.recompute_layers(case.is_recomputed)
    return model


def reference_name(case: Case) -> str:
    """Cases of the same name have the same reference."""
    strategy = "called_head" if case.strategy == "deepspeed_3" else "any"
    data_ranks = case.ranks // case.time_parallel
    alike = replace(case, name="", strategy=strategy, ranks=data_ranks, time_parallel=1, offload="none")
    return "-".join(str(value) for value in asdict(alike).values() if value not in ("", "none"))


def make_objective(case: Case, model: Finch) -> ChunkObjective:
    return ChunkObjective(model)


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model.named_parameters(), weight_decay=0.01, decay_lr_multiplier=2.0)
    if case.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.05)
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-4)


def make_documents(case: Case) -> list[Document]:
    rng = np.random.default_rng(7)
    documents = []
    for number, length in enumerate(LENGTHS):
        weights = rng.uniform(0.5, 1.5, length).astype(np.float32)
        weights[0] = 0.0
        if case.masked:
            # Prompts of several chunks, so that whole documents begin without a weight in any row; one document with
            # nothing to learn.
            least = 2 * CHUNK_TOKENS if case.mode == "document" else 0
            weights[: length if number == 2 else max(least, int(0.7 * length))] = 0.0
        tokens = rng.integers(1, VOCAB_SIZE, length).astype(np.uint16)
        documents.append(Document(tokens=tokens, weights=weights, origin=f"document {number}"))
    return documents


def make_source(case: Case, ranks: Ranks) -> DocumentSource | StreamSource:
    settings = {
        "rows": case.rows // case.accumulate // ranks.data_size,
        "accumulate": case.accumulate,
        "chunk_tokens": CHUNK_TOKENS,
        "seed": 3,
        "steps": case.steps,
        "rank": ranks.data_rank,
        "world": ranks.data_size,
        "part": (ranks.time_rank, ranks.time_size),
    }
    if case.mode == "stream":
        return StreamSource(make_documents(case), window=int(case.window), **settings)
    return DocumentSource(make_documents(case), **settings)


def take_steps(
    case: Case,
    model: Finch,
    objective: Callable[..., object],
    engine: Engine,
    source: DocumentSource | StreamSource,
    *,
    before_update: Callable[[], None],
) -> dict[str, list[float | None]]:
    """Train through the source; returns losses and norms."""
    model.train()
    report: dict[str, list[float | None]] = {"loss": [], "norm": []}
    states: list[ModelState] = []
    while (data := source.next_step()) is not None:
        if not data.carries_state or not states:
            rows = [group.chunks[0].tokens.shape[0] for group in data.groups]
            states = [ModelState.zeros(model.config, n, dtype=model.state_dtype, device="cpu") for n in rows]
        engine.forget_gradient()
        gradient = step_gradient(objective, data, states, window=case.window, engine=engine)
        states = gradient.states
        before_update()
        done = take_step(gradient, data, engine=engine, clip=0.7)
        report["loss"].append(done.loss)
        report["norm"].append(done.grad_norm)
    return report


def run_alone(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, list[float | None]]]:
    """The same in this process, with the rows of each rank's groups side by side: a product of other rows at once is
    rounded elsewhere, and in float32 that is more than what is looked for."""
    from infctx.training.engine import WholeWeights
    from infctx.training.precision import apply_precision_

    case = replace(case, accumulate=case.accumulate * case.ranks // case.time_parallel, time_parallel=1)
    model = make_model(case)
    if case.strategy == "deepspeed_3":
        # There the head is called, and not fused with the loss: so it is with a hook.
        model.head.register_forward_hook(lambda *_: None)
    if case.dtype != "fp64":
        apply_precision_(model, "bf16" if case.dtype == "bf16" else "fp32")
    engine = WholeWeights(model, make_optimizer(case, model))
    found: dict[str, torch.Tensor] = {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def keep() -> None:
        if not found:
            found.update({f"gradient.{name}": p.grad.clone() for name, p in trained.items()})

    report = take_steps(case, model, ChunkObjective(model), engine, make_source(case, ALONE), before_update=keep)
    found.update({f"weight.{name}": p.detach().clone() for name, p in trained.items()})
    return found, report
