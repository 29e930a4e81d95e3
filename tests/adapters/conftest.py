"""Every kind of adapter, small, and the values that training would give it."""

from __future__ import annotations

from typing import Any

import torch

from infctx.adapters.adapter import Adapter
from infctx.adapters.full import attach_full
from infctx.adapters.peft_adapters import attach_peft
from infctx.adapters.peft_kinds import PeftSettings
from infctx.adapters.state_tuning import attach_state
from infctx.model.finch import Finch

MATRICES = ["receptance", "key", "value", "gate", "output"]
# Sizes of the test models are 32 and 101: these have divisors that are ranks.
SQUARE = ["time_mix.key", "time_mix.output", "channel_mix.receptance"]
EVERYWHERE = [*MATRICES, "head"]
PEFT_CASES: dict[str, dict[str, Any]] = {
    "lora": {"targets": EVERYWHERE, "ranks": {"blocks.0.*": 3, "*.channel_mix.*": 5}, "alphas": {"head": 2.0}},
    "lora on the embedding, with states": {
        "kind": "lora",
        "targets": ["embedding", "key"],
        "initial_state": True,
        "initial_shifts": True,
        "train_also": ["*.bonus", "*.lerp_down"],
    },
    "rslora": {"targets": ["embedding", "channel_mix.*", "head"], "ranks": {"head": 2}},
    "dora": {"targets": EVERYWHERE, "ranks": {"blocks.1.*": 2}},
    "dora on the embedding": {"kind": "dora", "targets": ["embedding", "output"]},
    "pissa": {"targets": EVERYWHERE, "ranks": {"*.gate": 2}, "initial_state": True},
    "pissa, exact": {"kind": "pissa", "targets": ["key"], "svd_iterations": None, "alpha": 7.0},
    "olora": {"targets": EVERYWHERE, "ranks": {"*.gate": 2}, "train_also": ["*.decay_base"]},
    "miss": {"targets": EVERYWHERE, "rank": 6},
    "miss, bat": {"kind": "miss", "targets": SQUARE, "miss_init": "bat", "rank": 8},
    "miss, mini": {"kind": "miss", "targets": SQUARE, "miss_init": "mini", "miss_mini_rank": 4, "initial_state": True},
}
CASES = ["full", "state", "state and shifts", *PEFT_CASES]


def attach(model: Finch, case: str, *, seed: int = 0) -> Adapter:
    """Put the adapter of a case on a model."""
    torch.manual_seed(seed)
    if case == "full":
        return attach_full(model, freeze=["*norm*"], initial_state=True)
    if case.startswith("state"):
        return attach_state(model, initial_shifts="shifts" in case)
    return attach_peft(model, settings_of(case))


def settings_of(case: str) -> PeftSettings:
    return PeftSettings(**{"kind": case, "rank": 4, "alpha": None if "miss" in case else 8.0, **PEFT_CASES[case]})


def disturb_(model: Finch) -> None:
    """Give every trainable parameter values that matter, as training would."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * (0.5 if parameter.dim() == 3 else 0.1))
