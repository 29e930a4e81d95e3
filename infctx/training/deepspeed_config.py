"""What DeepSpeed is told: settings of a run in its own words. It imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from infctx.errors import RecipeError

# A step is one update of ours, whatever number of backward passes it has; and no other optimizer is put in the place
# of the one that was chosen.
OURS: Mapping[str, object] = MappingProxyType(
    {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
)
# What has a key of its own in a recipe, or would change what is computed.
SETTLED_ELSEWHERE = (
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "train_batch_size",
    "managed_gradient_accumulation",
)
# Numbers that are sent at once: 200 MB in float32. DeepSpeed's own choice is ten times as much.
BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(*, stage: int, offload: str = "none", extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config for one ZeRO stage.

    Args:
        stage: 1 divides the optimizer's state among the ranks, 2 gradients too, 3 weights too.
        offload: "optimizer" or "all", into host memory, as a recipe's run.offload; "none".
        extra: keys in DeepSpeed's words ("zero_optimization", "aio", ...), merged in; what they say wins. So a drive
            takes the place of host memory: "offload_optimizer": {"device": "nvme", "nvme_path": ...}.
    Raises:
        RecipeError: keys that would change what a step computes.
    """
    extra = extra or {}
    wrong = [key for key in extra if key in SETTLED_ELSEWHERE or (key in OURS and extra[key] != OURS[key])]
    if extra.get("zero_optimization", {}).get("stage", stage) != stage:
        wrong.append("zero_optimization.stage")
    if wrong:
        raise RecipeError(f"run.deepspeed: {', '.join(wrong)}: other keys of the recipe settle that. Remove it.")
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET_ELEMENTS}
    zero["stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size"] = BUCKET_ELEMENTS
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return _merged({**OURS, "zero_optimization": zero}, extra)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
