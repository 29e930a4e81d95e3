"""Memory of the rank that needs most, by part, from shapes alone.

What is exact, and what is assumed: weights, gradients, moments and boundary states are counts of tensors. Activations
and working memory follow the operators (`activations.py`). Gathered parameters and buckets follow what FSDP2, DDP and
DeepSpeed do by default, as the comments say. The device's own needs and the allocator's gaps are not in it, but for
`RUNTIME_BYTES`; what oneDNN copies for itself on a CPU is not either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.planning.activations import Device, activation_bytes_per_token
from infctx.planning.attention_memory import CachePlan
from infctx.planning.spread import Spread
from infctx.planning.working_memory import Communication, Phase, busy_phases
from infctx.training.boundary_store import BLOCK_BYTES, Where, state_bytes
from infctx.training.deepspeed_config import BUCKET_ELEMENTS
from infctx.training.eight_bit_adamw import SMALLEST_8_BIT_ELEMENTS
from infctx.training.optim import OptimizerName

# A CUDA context with the libraries that matrix products need. Assumed, not measured on a GPU.
RUNTIME_BYTES = 750_000_000
# States of one chunk: before it, after it by layer and stacked, their gradients behind it and in front.
LIVE_STATES = 6
BOUNDARIES = "boundary states"
UPDATE = "update of the weights"
CACHE = "cache of the tokens"
CACHE_GRADIENT = "gradient of the cache"
# DeepSpeed's own setting: what ZeRO-3 keeps gathered.
MOST_GATHERED_ELEMENTS = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkPlan:
    """What a rank computes at once.

    chunk_tokens: of all ranks that share it. rows: at once. boundary_states: kept at the same time. is_recomputed:
    whether layers are run again in the backward pass. cache: of layers with attention.
    """

    chunk_tokens: int
    rows: int = 1
    boundary_states: int = 1
    boundaries: Where = "device"
    is_recomputed: bool = False
    cache: CachePlan = CachePlan()  # noqa: RUF009 (frozen)

    def tokens_at_once(self, spread: Spread) -> int:
        """Tokens of all rows in the longest slice of a chunk."""
        return self.rows * -(-self.chunk_tokens // spread.time_parallel)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerPlan:
    """The optimizer's name, whether weights are averaged beside it, and whether it steps in one pass over each; None =
    as a run does where nothing is said: on a GPU."""

    name: OptimizerName = "adamw"
    is_averaged: bool = False
    is_fused: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes by part, of the rank that needs most: on its device, and in host memory for each rank.

    On a CPU everything is on the device. one_state: of one boundary, all rows. untouched: of the memory that is taken
    for boundary states, what is not written to. more_at_update: what the update takes beyond the busiest chunk; the
    boundary states are gone by then.
    """

    device: dict[str, int]
    host: dict[str, int]
    one_state: int
    untouched: int = 0
    more_at_update: int = 0

    @property
    def device_bytes(self) -> int:
        """All parts on the device."""
        return sum(self.device.values())

    @property
    def tensor_bytes(self) -> int:
        """Of the tensors alone, without the runtime of a GPU."""
        return self.device_bytes - self.device.get("runtime", 0)

    @property
    def host_bytes(self) -> int:
        """All parts in host memory."""
        return sum(self.host.values())

    @property
    def largest(self) -> str:
        """The part that takes most of the device."""
        return max(self.device, key=lambda part: self.device[part])


def plan_memory(
    model: Finch,
    chunk: ChunkPlan,
    *,
    spread: Spread = Spread(),  # noqa: B008 (frozen)
    optimizer: OptimizerPlan = OptimizerPlan(),
    device: Device = "cuda",
) -> MemoryPlan:
    """Memory by part of a model as a run has it: adapter attached, precision applied; on the meta device or any other.

    Args:
        chunk: what is computed at once.
        spread: over which ranks, and how.
        device: kind of device that is planned for.
    """
    on_device, on_host = _stored(model, spread, optimizer, device)
    update = _update_bytes(model, spread, optimizer, device)
    phase = max(_phases(model, chunk, spread, device), key=lambda phase: phase.total)
    on_device |= {
        "gathered parameters": phase.gathered,
        "activations": phase.activations,
        "weights in compute precision": phase.weight_copies,
        "working memory": phase.working,
        "communication buckets": phase.sent,
    }
    if model.config.n_attention:
        cache, is_here = chunk.cache, device == "cpu" or not chunk.cache.on_host
        sums = phase.cache if is_here else cache.sums(model.config, chunk.rows)
        place = on_device if is_here else on_host
        place[CACHE] = cache.vectors(model.config, chunk.rows)
        place[CACHE_GRADIENT] = cache.gradient(model.config, chunk.rows) + sums
    one_state = state_bytes(ModelState.zeros(model.config, chunk.rows, dtype=torch.float32, device="meta"))
    on_device["states of the chunk"] = LIVE_STATES * one_state
    on_device["runtime"] = RUNTIME_BYTES if device == "cuda" else 0
    if device == "cpu":
        # Its memory is the host's.
        on_device |= {part: on_device.get(part, 0) + size for part, size in on_host.items()}
        on_host = {}
    without = MemoryPlan(
        device={part: size for part, size in on_device.items() if size},
        host={part: size for part, size in on_host.items() if size},
        one_state=one_state,
        more_at_update=max(0, update - phase.total),
    )
    return with_boundaries(without, chunk, device)


def with_boundaries(plan: MemoryPlan, chunk: ChunkPlan, device: Device) -> MemoryPlan:
    """The same with the boundary states of this chunk plan in place of its own."""
    of_others = (BOUNDARIES, UPDATE)
    on_device, on_host = ({p: s for p, s in of.items() if p not in of_others} for of in (plan.device, plan.host))
    untouched = 0
    if chunk.boundaries != "disk":
        # On a CPU host memory is the device's, and memory is taken for several small ones at once.
        place = on_host if chunk.boundaries == "host" and device != "cpu" else on_device
        at_once = max(1, BLOCK_BYTES // plan.one_state)
        place[BOUNDARIES] = -(-chunk.boundary_states // at_once) * at_once * plan.one_state
        untouched = place[BOUNDARIES] - chunk.boundary_states * plan.one_state
    if (more := plan.more_at_update - on_device.get(BOUNDARIES, 0)) > 0:
        on_device[UPDATE] = more
        untouched = 0
    return replace(plan, device=on_device, host=on_host, untouched=untouched)


def _stored(
    model: Finch, spread: Spread, optimizer: OptimizerPlan, device: Device
) -> tuple[dict[str, int], dict[str, int]]:
    """What stays from step to step, and the gradient."""
    sharded = spread.shards_parameters
    frozen = _bytes((p for p in model.parameters() if not p.requires_grad), spread, is_sharded=sharded)
    frozen += sum(buffer.nbytes for buffer in model.buffers())
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = {"frozen weights": frozen, "trained weights": _bytes(trained, spread, is_sharded=sharded)}
    gradients = {"gradients": _elements(trained, spread, is_sharded=spread.shards_gradients) * 4}
    moments = {"optimizer moments": moment_bytes_of(trained, spread, optimizer, device)}
    if optimizer.is_averaged:
        weights["averaged weights"] = _elements(trained, spread, is_sharded=sharded) * 4
    if spread.offload == "all":
        return {}, weights | gradients | moments
    if spread.offload == "optimizer" or optimizer.name == "adamw-offloaded":
        # DeepSpeed's gradients go to its optimizer as they come; our own optimizer fetches them when it steps.
        sent = spread.offload == "optimizer" and spread.shards_gradients
        return (weights, moments | gradients) if sent else (weights | gradients, moments)
    return weights | gradients | moments, {}


def _update_bytes(model: Finch, spread: Spread, optimizer: OptimizerPlan, device: Device) -> int:
    """What AdamW holds beside its moments while it updates, when no graph is there any more."""
    is_fused = device == "cuda" if optimizer.is_fused is None else optimizer.is_fused
    if optimizer.name != "adamw" or is_fused or spread.offload != "none":
        return 0
    held = [
        spread.elements_held(p.shape, is_sharded=spread.shards_moments) for p in model.parameters() if p.requires_grad
    ]
    # A CPU takes one tensor after the other, and its denominator in two pieces of memory; a GPU all at once, in one.
    return 4 * (2 * max(held, default=0) if device == "cpu" else sum(held))


def moment_bytes_of(trained: list[nn.Parameter], spread: Spread, optimizer: OptimizerPlan, device: Device) -> int:
    """Bytes of the optimizer's moments and of what it keeps beside them, on the rank that has most."""
    if optimizer.name == "adamw-8bit":
        # Two codes, and for each a scale of 256 of them; small tensors keep float32.
        return sum(
            p.numel() * 2 + 2 * 4 * -(-p.numel() // 256) if p.numel() >= SMALLEST_8_BIT_ELEMENTS else p.numel() * 8
            for p in trained
        )
    elements = _elements(trained, spread, is_sharded=spread.shards_moments)
    # DeepSpeed's optimizers work on a copy of the weights.
    beside = 4 if spread.strategy.startswith("deepspeed") else 0
    if optimizer.name == "adamw-offloaded":
        # Host copies of weights and, while it steps, of gradients, which on a CPU are there.
        beside = 8 if device == "cuda" else 4
    return elements * (8 + beside)


def _communication(model: Finch, spread: Spread, device: Device) -> Communication:
    """Whole parameters that a rank holds while it computes, and gradients on their way.

    DDP: gradients lie in the buckets they are sent from. FSDP2: the root (embedding, head, norms) from the first chunk
    of a step on, and in the backward pass two blocks, one at work and one on its way, in both directions (a CPU waits
    for what it sends: one); whole gradients of the root stay until its end. ZeRO: as many elements as it may keep, at
    most all, and a bucket, which is as large as it may become; stage 2 copies what is in it.
    """
    if spread.strategy == "fsdp" and spread.ranks > 1:
        root = _root_bytes(model, _gradient_bytes)
        largest = max(_gradient_bytes(block.parameters()) for block in model.blocks)
        blocks = largest if device == "cpu" else _two_largest(model, _gradient_bytes)
        return Communication(
            gathered_at_loss=_root_bytes(model, _whole),
            gathered_at_block=_root_bytes(model, _whole) + _two_largest(model, _whole),
            sent_at_loss=0,
            sent_at_block=root + max(blocks, root),
        )
    gathered = bucket = copy = 0
    if spread.strategy.startswith("deepspeed") and spread.ranks > 1:
        bucket = BUCKET_ELEMENTS * 4
    if spread.strategy == "deepspeed_2":
        copy = min(bucket, _gradient_bytes(model.parameters()))
    if spread.strategy == "deepspeed_3":
        elements = sum(p.numel() for p in model.parameters())
        gathered = round(_whole(model.parameters()) * min(1.0, MOST_GATHERED_ELEMENTS / elements))
    return Communication(
        gathered_at_loss=gathered, gathered_at_block=gathered, sent_at_loss=bucket, sent_at_block=bucket + copy
    )


def _phases(model: Finch, chunk: ChunkPlan, spread: Spread, device: Device) -> tuple[Phase, ...]:
    hidden_bytes = torch.finfo(model.compute_dtype or model.embedding.weight.dtype).bits // 8
    per_token = activation_bytes_per_token(model, hidden_bytes=hidden_bytes, device=device)
    return busy_phases(
        model,
        per_token,
        num_tokens=chunk.tokens_at_once(spread),
        hidden_bytes=hidden_bytes,
        is_recomputed=chunk.is_recomputed,
        # ZeRO-3 gathers the head when it is called, so that it cannot be fused with the loss; FSDP2 before.
        has_fused_loss=spread.strategy != "deepspeed_3" and not hasattr(model.head, "base_layer"),
        device=device,
        communication=_communication(model, spread, device),
        rows=chunk.rows,
        # A CPU has no other memory.
        cache=replace(chunk.cache, on_host=chunk.cache.on_host and device != "cpu"),
    )


def _elements(parameters: Iterable[nn.Parameter], spread: Spread, *, is_sharded: bool) -> int:
    return sum(spread.elements_held(p.shape, is_sharded=is_sharded) for p in parameters)


def _bytes(parameters: Iterable[nn.Parameter], spread: Spread, *, is_sharded: bool) -> int:
    return sum(spread.elements_held(p.shape, is_sharded=is_sharded) * p.element_size() for p in parameters)


def _whole(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters)


def _gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * 4 for p in parameters if p.requires_grad)


def _two_largest(model: Finch, measure: Callable[[Iterable[nn.Parameter]], int]) -> int:
    return sum(sorted(measure(block.parameters()) for block in model.blocks)[-2:])


def _root_bytes(model: Finch, measure: Callable[[Iterable[nn.Parameter]], int]) -> int:
    """Of what is in no block."""
    parts = (model.embedding, model.input_norm, model.output_norm, model.head, model.token_cat)
    return sum(measure(part.parameters()) for part in parts if part is not None)
