"""How long a document takes, by an alpha-beta model: arithmetic at a rate, messages at a latency and a bandwidth.

Nothing here was measured on a GPU: rates and links are assumptions, which every result repeats. What is counted is
exact: multiplications by part, passes of each mode, bytes of each collective.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from infctx.model.finch import Finch
from infctx.model.time_mix import FinchC2TimeMix
from infctx.planning.activations import is_trained
from infctx.planning.attention_time import AttentionFlops, Walk, attention_flops
from infctx.planning.block_activations import matrices_of
from infctx.planning.spread import Spread
from infctx.planning.traffic import Message, chunk_messages, step_messages


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a computation runs on.

    flops_per_second: of one device, in the matrix products of a training step as it is, not of its data sheet.
    memory_bytes_per_second: of one device's memory; None = never waited for. in_node, between_nodes: bytes a second
    that a device receives over its links, the same way. latency_seconds: of a collective, in a node and between nodes.
    """

    flops_per_second: float = 350e12
    in_node_bytes_per_second: float = 300e9
    between_nodes_bytes_per_second: float = 40e9
    in_node_latency_seconds: float = 15e-6
    between_nodes_latency_seconds: float = 40e-6
    memory_bytes_per_second: float | None = None

    def assumptions(self) -> dict[str, float | None]:
        """Its fields by name, for whoever prints a result."""
        return asdict(self)

    def seconds(self, message: Message, spread: Spread) -> float:
        """Of one collective, over the slowest link its ranks have between them."""
        if message.ranks <= spread.devices_per_node:
            return self.in_node_latency_seconds + message.received_bytes / self.in_node_bytes_per_second
        return self.between_nodes_latency_seconds + message.received_bytes / self.between_nodes_bytes_per_second


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Floating-point operations for one token, a multiplication with its addition as two.

    blocks: forward through the blocks, of base and adapter. last_mix: the part of it that sweep 1 leaves out, the last
    block's channel mix; in a GoldFinch GOLD's layers. head: forward through the head. weights: of the gradients of what
    is trained. attention: what grows with the tokens before, which none of these has. between_blocks: the part of
    `blocks` that is never run again, what fills GOLD's cache.
    """

    blocks: int
    last_mix: int
    head: int
    weights: int
    attention: AttentionFlops = AttentionFlops()  # noqa: RUF009 (frozen)
    between_blocks: int = 0

    @property
    def model(self) -> int:
        """Forward, and gradients of activations and of trained weights: what has to be computed, without repetition."""
        return 2 * (self.blocks + self.head) + self.weights

    def executed(self, *, sweep_1_share: float, is_recomputed: bool) -> float:
        """The same with sweep 1, through a share of the chunks, and with layers run again."""
        again = self.blocks - self.between_blocks if is_recomputed else 0
        return self.model + sweep_1_share * (self.blocks - self.last_mix) + again


def flops_per_token(model: Finch) -> Flops:
    """Count the products of a model whose trained parameters are marked.

    The recurrence counts as blocks of 64 tokens: 256 multiplications for each channel and layer.
    """
    blocks = [_block_products(block) for block in model.blocks]
    head_forward, head_weights = _products(model.head)
    config = model.config
    recurrence = 2 * 256 * config.dim_att * config.n_recurrent
    compress = (0, 0) if model.token_cat is None else _products(model.token_cat.compress)
    last = model.blocks[-1].channel_mix
    last_mix = 2 * sum(_products(matrix)[0] for matrix in (last.key, last.receptance, last.value))
    of_attention = 2 * sum(forward for forward, _ in blocks[config.n_recurrent :])
    if config.n_attention:
        # Sweep 1 fills GOLD's cache alone, and takes GPTAlpha's layers as they are.
        last_mix = 0 if model.token_cat is None else of_attention
    return Flops(
        blocks=2 * (sum(forward for forward, _ in blocks) + compress[0]) + recurrence,
        last_mix=last_mix,
        head=2 * head_forward,
        weights=2 * (sum(weights for _, weights in blocks) + compress[1] + head_weights),
        attention=attention_flops(model, of_layers=of_attention) if config.n_attention else AttentionFlops(),
        between_blocks=2 * compress[0],
    )


# Low-rank pairs that are no modules, as far as a kind of block has them.
_LOOSE = tuple(f"{name}_{way}" for name in ("lerp", "decay", "value2", "lerp_query") for way in ("down", "up"))


def _block_products(block: nn.Module) -> tuple[int, int]:
    """Multiplications of a token: forward, and in the gradients of trained weights. Not those of GOLD's keys."""
    time_mix, mix = block.time_mix, block.channel_mix
    matrices = [*matrices_of(time_mix), mix.key, mix.receptance, mix.value]
    if isinstance(time_mix, FinchC2TimeMix):
        # The second value.
        matrices.append(time_mix.value)
    pairs = [_products(matrix) for matrix in matrices]
    forward, weights = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    for loose in (getattr(time_mix, name) for name in _LOOSE if hasattr(time_mix, name)):
        forward += loose.numel()
        weights += loose.numel() if loose.requires_grad else 0
    return forward, weights


def _products(matrix: nn.Module) -> tuple[int, int]:
    """Forward, and in trained weights' gradients, of a matrix and what an adapter puts on it."""
    if not hasattr(matrix, "base_layer"):
        size = matrix.in_features * matrix.out_features
        return size, size if is_trained(matrix) else 0
    base = matrix.get_base_layer()
    added = sum(p.numel() for p in matrix.parameters() if p.requires_grad and p is not base.weight and p.dim() == 2)
    whole = base.in_features * base.out_features
    return whole + added, added + (whole if base.weight.requires_grad else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is to be done.

    document_tokens: of each document; every group of ranks that share chunks takes one. chunk_tokens: of a chunk, all
    its slices together. rows: at once. window: chunks whose borders the gradient crosses, None = all; but for the last
    of a window they are run once more without it. is_thinned: and once more for the states that were not kept.
    is_recomputed: layers are run again in the backward pass. cached_before: tokens before the document's first here,
    that layers with attention see.
    """

    document_tokens: int
    chunk_tokens: int
    rows: int = 1
    window: int | None = None
    is_thinned: bool = False
    is_recomputed: bool = False
    cached_before: int = 0

    @property
    def num_chunks(self) -> int:
        """Of the document."""
        return -(-self.document_tokens // self.chunk_tokens)

    @property
    def walk(self) -> Walk:
        """Its chunks as attention sees them."""
        return Walk(
            document_tokens=self.document_tokens,
            chunk_tokens=min(self.chunk_tokens, self.document_tokens),
            cached_before=self.cached_before,
            window=self.window,
            sweeps=1 + self.is_thinned,
        )

    @property
    def sweep_1_chunks(self) -> int:
        """Of them, run through without a gradient: all but the last of each window."""
        windows = 1 if self.window is None else -(-self.num_chunks // self.window)
        return (1 + self.is_thinned) * (self.num_chunks - windows)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimePlan:
    """Seconds of one step: a document for each group of ranks.

    computing: arithmetic of the busiest rank. waiting: for messages that it does not hide. documents: of the step.
    tokens_per_second: of all ranks. efficiency: of that, against as many single devices that wait for nothing.
    attention_share: of the arithmetic, what grows with the tokens before each chunk; 0 without attention.
    """

    computing_seconds: float
    waiting_seconds: float
    documents: int
    tokens_per_second: float
    efficiency: float
    received_bytes: int
    attention_share: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.computing_seconds + self.waiting_seconds

    @property
    def seconds_per_document(self) -> float:
        """Of the step, divided by its documents."""
        return self.seconds / self.documents


def plan_time(model: Finch, work: Work, *, spread: Spread, machine: Machine, flops: Flops | None = None) -> TimePlan:
    """Predict the time of a step.

    Gathering and reducing of parameters (FSDP2, ZeRO) hide behind the arithmetic of the same pass, as far as that
    lasts; everything else is waited for: what ranks that share a chunk exchange, and what comes once in a step.

    Args:
        flops: of the model, where they are counted already.
    """
    flops = flops or flops_per_token(model)
    per_token = flops.executed(sweep_1_share=work.sweep_1_chunks / work.num_chunks, is_recomputed=work.is_recomputed)
    attention = 0.0
    if model.config.n_attention:
        attention = flops.attention.of_document(work.walk, is_recomputed=work.is_recomputed) / work.document_tokens
    per_token += attention
    # The rank with the longest slices.
    rank_tokens = work.rows * -(-work.document_tokens // spread.time_parallel)
    computing = per_token * rank_tokens / machine.flops_per_second
    if machine.memory_bytes_per_second is not None:
        # Short chunks wait for the weights, which every pass reads once.
        passes = (2 + work.is_recomputed) * work.num_chunks + work.sweep_1_chunks
        weights = sum(parameter.nbytes for parameter in model.parameters())
        computing = max(computing, passes * weights / machine.memory_bytes_per_second)
    messages = chunk_messages(
        model,
        spread,
        rows=work.rows,
        chunks=work.num_chunks,
        sweep_1_chunks=work.sweep_1_chunks,
        is_recomputed=work.is_recomputed,
    )
    hidden = sum(machine.seconds(message, spread) * message.count for message in messages if message.is_hidden)
    exposed = [message for message in messages if not message.is_hidden] + step_messages(model, spread)
    waiting = sum(machine.seconds(message, spread) * message.count for message in exposed)
    waiting += max(0.0, hidden - computing)
    documents = spread.groups * work.rows
    tokens = documents * work.document_tokens
    alone = tokens * per_token / machine.flops_per_second / spread.ranks
    return TimePlan(
        computing_seconds=computing,
        waiting_seconds=waiting,
        documents=documents,
        tokens_per_second=tokens / (computing + waiting),
        efficiency=alone / (computing + waiting),
        attention_share=attention / per_token,
        received_bytes=sum(message.received_bytes * message.count for message in messages)
        + sum(message.received_bytes for message in step_messages(model, spread)),
    )
