"""What ranks send each other: the collectives of a chunk and of a step, with the bytes that a rank receives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.planning.spread import Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A collective, some times over.

    what: for people. received_bytes: that one rank gets from others in one of them. ranks: that take part. count: how
    often. is_hidden: runs beside the arithmetic.
    """

    what: str
    received_bytes: int
    ranks: int
    count: int = 1
    is_hidden: bool = False


def chunk_messages(
    model: Finch, spread: Spread, *, rows: int, chunks: int, sweep_1_chunks: int, is_recomputed: bool
) -> list[Message]:
    """The collectives of a step's chunks, the same for each: gathering, reducing, and those of a shared chunk.

    Args:
        rows: computed at once by ranks that share a chunk.
        chunks: of the step, each with a forward and a backward pass.
        sweep_1_chunks: of them, run through without a gradient first.
        is_recomputed: each block's forward pass is run again in the backward pass.
    """
    messages = []
    if spread.shards_parameters and spread.ranks > 1:
        passes = 2 * chunks + sweep_1_chunks
        *blocks, root = [_gather(unit, spread, count=passes) for unit in _units(model)]
        # FSDP2 keeps the root whole from the forward pass to the end of the backward pass, and through all of sweep 1.
        messages += [*blocks, replace(root, count=chunks) if spread.strategy == "fsdp" else root]
    if spread.shards_gradients and spread.ranks > 1:
        messages += [
            _reduce(unit, spread, count=chunks) for unit in _units(model) if any(p.requires_grad for p in unit)
        ]
    if spread.time_parallel > 1:
        hidden_bytes = torch.finfo(model.compute_dtype or model.embedding.weight.dtype).bits // 8
        messages += time_parallel_messages(
            model.config,
            spread.time_parallel,
            rows=rows,
            hidden_bytes=hidden_bytes,
            forwards=(1 + is_recomputed) * chunks + sweep_1_chunks,
            backwards=chunks,
        )
    return messages


def step_messages(model: Finch, spread: Spread) -> list[Message]:
    """The collectives that come once in a step: whole gradients added up, updated weights sent round."""
    if spread.ranks == 1:
        return []
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    part = trained * (spread.ranks - 1) // spread.ranks
    messages = []
    if spread.strategy == "ddp":
        messages.append(Message(what="gradients, all-reduce", received_bytes=2 * part, ranks=spread.ranks))
    if spread.strategy == "deepspeed_1":
        messages.append(Message(what="gradients, reduce-scatter", received_bytes=part, ranks=spread.ranks))
    if spread.strategy in ("deepspeed_1", "deepspeed_2"):
        messages.append(Message(what="updated weights, all-gather", received_bytes=part, ranks=spread.ranks))
    return messages


def time_parallel_messages(
    config: FinchConfig, ranks: int, *, rows: int, hidden_bytes: int, forwards: int, backwards: int
) -> list[Message]:
    """What ranks that share a chunk exchange in it; none of it grows with the chunk.

    Forward, in each layer: summaries of the recurrence (a state and a decay of every key channel, float32), and before
    each half of the block the last token's hidden vector. Backward: gradients of states and of those vectors.

    Args:
        ranks: that share the chunk, P.
        forwards, backwards: passes through all layers.
    """
    heads, size, channels = config.n_head, config.head_size, config.n_embd
    others = rows * (ranks - 1)
    forward = [
        Message(what="summaries", received_bytes=others * (heads * size * size + heads * size) * 4, ranks=ranks),
        Message(what="last token, time mix", received_bytes=others * channels * hidden_bytes, ranks=ranks),
        Message(what="last token, channel mix", received_bytes=others * channels * hidden_bytes, ranks=ranks),
    ]
    backward = [
        Message(what="state gradients", received_bytes=others * heads * size * size * 4, ranks=ranks),
        Message(what="last token's gradient, time mix", received_bytes=others * channels * 4, ranks=ranks),
        Message(what="last token's gradient, channel mix", received_bytes=others * channels * 4, ranks=ranks),
    ]
    counted = [(message, forwards * config.n_layer) for message in forward]
    counted += [(message, backwards * config.n_layer) for message in backward]
    return [
        Message(what=message.what, received_bytes=message.received_bytes, ranks=ranks, count=count)
        for message, count in counted
    ]


def _units(model: Finch) -> list[list[nn.Parameter]]:
    """What is gathered together: each block, and the rest."""
    blocks = [list(block.parameters()) for block in model.blocks]
    in_blocks = {id(p) for block in blocks for p in block}
    return [*blocks, [p for p in model.parameters() if id(p) not in in_blocks]]


def _gather(unit: Iterable[nn.Parameter], spread: Spread, *, count: int) -> Message:
    """All parts but the rank's own, as large as the largest."""
    part = sum(spread.elements_held(p.shape, is_sharded=True) * p.element_size() for p in unit)
    received = part * (spread.ranks - 1)
    return Message(what="parameters", received_bytes=received, ranks=spread.ranks, count=count, is_hidden=True)


def _reduce(unit: Iterable[nn.Parameter], spread: Spread, *, count: int) -> Message:
    """The rank's own part of every other rank's gradient, float32."""
    part = sum(spread.elements_held(p.shape, is_sharded=True) * 4 for p in unit if p.requires_grad)
    received = part * (spread.ranks - 1)
    return Message(what="gradients", received_bytes=received, ranks=spread.ranks, count=count, is_hidden=True)
