"""What a chunk's forward and backward pass hold at their busiest moment, beside what stays from chunk to chunk.

Two moments can be it: the loss, when the graph of all blocks is complete, and the start of the backward pass through
the last block (where layers are recomputed: with that block's graph made again). In a model with attention also that of
the last layer's attention, and the one when all layers have added to the gradient of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from infctx.model.bitsandbytes_linear import BnbInt8Linear
from infctx.model.finch import Finch
from infctx.model.quantized_linear import Int8Linear, QuantizedLinear
from infctx.planning.activations import ActivationBytes, Device, is_trained
from infctx.planning.attention_memory import CachePlan, attention_bytes, chunk_cache_bytes
from infctx.training.loss import LOGITS_AT_ONCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Bytes at one moment. weight_copies: of trained float32 weights in the dtype of the matrix products. gathered:
    weights of which the rank has a part only, otherwise. sent: gradients on their way. cache: sums for the gradient of
    the cache, where that is on the device."""

    activations: int
    weight_copies: int
    working: int
    gathered: int
    sent: int
    cache: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.weight_copies + self.working + self.gathered + self.sent + self.cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Communication:
    """Bytes that weights and gradients of other ranks take, at the loss and while a block goes backward."""

    gathered_at_loss: int
    gathered_at_block: int
    sent_at_loss: int
    sent_at_block: int


def busy_phases(
    model: Finch,
    per_token: ActivationBytes,
    *,
    num_tokens: int,
    hidden_bytes: int,
    is_recomputed: bool,
    has_fused_loss: bool,
    device: Device,
    communication: Communication,
    rows: int = 1,
    cache: CachePlan = CachePlan(),  # noqa: B008 (frozen)
) -> tuple[Phase, ...]:
    """The moments of a chunk one of which takes most: at the loss, in the last block's backward pass, and with
    attention in that of its attention, and behind all of that.

    Args:
        num_tokens: of all rows that this rank computes at once.
        is_recomputed: whether each block's graph is made again in the backward pass.
        has_fused_loss: whether head and loss are one operator; else the head is called in pieces, each recomputed.
    """
    kept = per_token.between * len(per_token.blocks) if is_recomputed else sum(per_token.blocks)
    blocks = kept + per_token.cached
    if model.config.n_attention:
        blocks += chunk_cache_bytes(model.config, hidden_bytes)
    copies = [_copies_bytes(block, hidden_bytes) for block in model.blocks]
    at_loss = Phase(
        activations=(per_token.embedding + blocks + per_token.last_norm + per_token.hidden) * num_tokens,
        # Only the graph of a block holds on to weights that autocast has cast.
        weight_copies=0 if is_recomputed else sum(copies),
        working=_loss_bytes(model, num_tokens, hidden_bytes, has_fused_loss=has_fused_loss, device=device),
        gathered=communication.gathered_at_loss,
        sent=communication.sent_at_loss,
    )
    # Those that attend are alike.
    last = per_token.blocks[-1] if model.config.n_attention else max(per_token.blocks)
    again = last - per_token.shared if is_recomputed else 0
    matrix = _matrix_bytes(model.blocks[-1], hidden_bytes, device=device)
    # The gradient of the residual stream has taken the place of what the loss kept.
    at_block = Phase(
        activations=(per_token.embedding + blocks + again + per_token.hidden) * num_tokens,
        weight_copies=max(copies) if is_recomputed else sum(copies),
        working=max(per_token.at_product * num_tokens + matrix, per_token.at_square * num_tokens),
        gathered=communication.gathered_at_block,
        sent=communication.sent_at_block,
    )
    if not model.config.n_attention:
        return at_loss, at_block
    sums = (0, 0) if cache.on_host else (cache.sums(model.config, rows, num_layers=1), cache.sums(model.config, rows))
    working = attention_bytes(model, cache, num_tokens=num_tokens, rows=rows, hidden_bytes=hidden_bytes)
    freed = per_token.behind_attention * num_tokens
    at_attention = replace(at_block, activations=at_block.activations - freed, working=working, cache=sums[0])
    front = per_token.blocks[: model.config.n_recurrent]
    left = per_token.between * len(front) + max(front, default=0) if is_recomputed else sum(front)
    behind = replace(
        at_block,
        activations=(per_token.embedding + left + per_token.cached + per_token.hidden) * num_tokens,
        weight_copies=max(copies) if is_recomputed else sum(copies[: len(front)]),
        cache=sums[1],
    )
    return at_loss, at_block, at_attention, behind


def _copies_bytes(block: nn.Module, hidden_bytes: int) -> int:
    """Of the trained matrices, where they are stored in another dtype than they are multiplied in."""
    return sum(
        p.numel() * hidden_bytes
        for p in block.parameters()
        if p.requires_grad and p.dim() > 1 and p.element_size() != hidden_bytes
    )


def _matrix_bytes(block: nn.Module, hidden_bytes: int, *, device: Device) -> int:
    """A gradient of the largest trained matrix before it is added to the sum, or a quantised matrix made whole."""
    as_cast = hidden_bytes if hidden_bytes < 4 else 0
    sizes = [p.numel() * (4 + as_cast) for p in block.parameters() if p.requires_grad and p.dim() > 1]
    for layer in block.modules():
        if isinstance(layer, QuantizedLinear):
            sizes.append(layer.in_features * layer.out_features * _bytes_to_dequantize(layer, hidden_bytes, device))
    return max(sizes, default=0)


def _bytes_to_dequantize(layer: QuantizedLinear, hidden_bytes: int, device: Device) -> int:
    """For each weight: of the matrix, and of what it is made from."""
    if isinstance(layer, BnbInt8Linear):
        return 8 + (hidden_bytes if hidden_bytes < 4 else 0)
    # A CPU makes int8 matrices a few rows at a time, a GPU in float32.
    return hidden_bytes + (4 if isinstance(layer, Int8Linear) and device == "cuda" else 0)


def _loss_bytes(model: Finch, num_tokens: int, hidden_bytes: int, *, has_fused_loss: bool, device: Device) -> int:
    config = model.config
    as_cast = hidden_bytes if hidden_bytes < 4 else 0
    rows = min(num_tokens, max(1, LOGITS_AT_ONCE // config.vocab_size))
    logits = config.vocab_size * rows
    head = config.vocab_size * config.n_embd if is_trained(model.head) else 0
    hidden = num_tokens * config.n_embd * hidden_bytes
    if not has_fused_loss:
        if hasattr(model.head, "base_layer"):
            head = max(p.numel() for p in model.head.parameters() if p.requires_grad) if head else 0
        # Log-probabilities, their gradient, that of the logits and its cast; a gradient of the head beside its sum.
        return hidden + logits * (12 + as_cast) + head * (4 + 2 * as_cast)
    # The logits' gradient takes their place. The head's is summed in float32, beside the head as it is multiplied.
    forward = hidden + 2 * rows * config.n_embd * hidden_bytes + logits * hidden_bytes + head * (4 + as_cast)
    if device == "cpu" and head:
        # Only CUDA multiplies bf16 into a float32 sum, and in pieces.
        forward += head * 4 + (logits * 4 if as_cast else 0)
    # The backward pass scales both gradients into new tensors.
    return max(forward, head * 8 + hidden)
