"""Bytes that a chunk's graph keeps for its backward pass, counted from the operators of a block.

An operator keeps what its gradient needs: a norm its input, a token shift its input and the moving weights, WKV6 its
four inputs and states, the gates their two factors, the squared ReLU its input. A matrix product keeps its input only
if the matrix, or a LoRA on it, is trained; oneDNN's, which float32 takes on some CPUs, always. Everything else is freed
as the forward pass goes on. Where one tensor feeds two operators it is kept once. `tests/planning` holds the sums to
what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from infctx.model.config import FinchConfig
from infctx.model.finch import Block, Finch
from infctx_kernels import linear as products

Device = Literal["cuda", "cpu"]
# Of float32: decays, statistics of norms, recurrent states.
_EXACT = 4
_ID_BYTES = 8
# The Triton backend keeps the recurrence's state every so many tokens; the CPU's recomputes from the chunk's first.
WKV_CHECKPOINT_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationBytes:
    """Bytes for one token.

    blocks: kept by each block where nothing is recomputed. between: kept before each block where they are.
    shared: part of a recomputed block that is kept before it, too. embedding: kept in front of the blocks. last_norm:
    kept behind them. hidden: one activation of all channels. at_product, at_square: what the backward pass of a block
    holds beyond what was kept, while it multiplies with the wide matrix and while it goes through the squared ReLU.
    """

    blocks: tuple[int, ...]
    between: int
    shared: int
    embedding: int
    last_norm: int
    hidden: int
    at_product: int
    at_square: int


def activation_bytes_per_token(model: Finch, *, hidden_bytes: int, device: Device = "cuda") -> ActivationBytes:
    """What a token of a chunk costs in a model whose trained parameters are marked; values are not looked at.

    Args:
        hidden_bytes: of an activation: 2 for bf16, 4 for float32.
        device: where it runs: the backends keep different states, and autocast on CUDA norms in float32.
    """
    config = model.config
    keeps_inputs = device == "cpu" and hidden_bytes == _EXACT and products.onednn_is_faster()
    normed = _EXACT if device == "cuda" else hidden_bytes
    hidden, norm = config.n_embd * hidden_bytes, config.n_embd * normed + 2 * normed
    blocks = [
        _block_bytes(block, config, hidden_bytes=hidden_bytes, device=device, keeps_inputs=keeps_inputs) + 2 * norm
        for block in model.blocks
    ]
    has_embedding_gradient = is_trained(model.embedding) or is_trained(model.input_norm)
    if not has_embedding_gradient:
        # No gradient goes beyond the first token shift: the norm before it keeps nothing.
        blocks[0] -= norm
    working = [
        _working_bytes(block, config, hidden_bytes=hidden_bytes, keeps_inputs=keeps_inputs) for block in model.blocks
    ]
    return ActivationBytes(
        blocks=tuple(blocks),
        between=hidden,
        # The first norm keeps its input as it is, or a copy of it.
        shared=hidden if normed == hidden_bytes else 0,
        embedding=_ID_BYTES + norm if has_embedding_gradient else 0,
        last_norm=norm,
        hidden=hidden,
        at_product=max(at_product for at_product, _ in working),
        at_square=max(at_square for _, at_square in working),
    )


def is_trained(module: nn.Module) -> bool:
    """Whether a part of a model, or an adapter on it, has anything to learn."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _block_bytes(block: Block, config: FinchConfig, *, hidden_bytes: int, device: Device, keeps_inputs: bool) -> int:
    channels, width, feed = config.n_embd, config.dim_att, config.dim_ffn
    time_mix, channel_mix = block.time_mix, block.channel_mix
    # Inputs of both token shifts; receptance, key, value and gate; the recurrence's output; the channel mix's factors.
    numbers = 2 * channels + 5 * width + feed + 2 * channels
    for matrix in (time_mix.receptance, time_mix.key, time_mix.value, time_mix.gate, time_mix.output):
        numbers += _kept_by_product(matrix, keeps_inputs)
    for matrix in (channel_mix.key, channel_mix.receptance, channel_mix.value):
        numbers += _kept_by_product(matrix, keeps_inputs)
    exact = 0
    if config.version == "6":
        numbers += 5 * channels + 5 * config.lerp_rank + config.decay_rank  # moving weights and both low-rank middles
        for loose in (time_mix.lerp_down, time_mix.decay_down):
            numbers += channels if loose.requires_grad or keeps_inputs else 0
    exact += width  # the decay; Eagle's is written out for every token
    if device == "cuda":
        exact += width * config.head_size // WKV_CHECKPOINT_TOKENS
    return numbers * hidden_bytes + exact * _EXACT


def _kept_by_product(matrix: nn.Module, keeps_inputs: bool) -> int:
    """Numbers that a matrix with or without an adapter keeps of each token's input."""
    if not hasattr(matrix, "base_layer"):
        # A quantised matrix has a product of its own, which keeps nothing.
        is_kept = matrix.weight.requires_grad or (keeps_inputs and matrix.weight.is_floating_point())
        return matrix.in_features if is_kept else 0
    # A LoRA keeps its input and what its first matrix gives; other kinds are counted as one.
    base = matrix.get_base_layer()
    kept = base.in_features + sum(factor.out_features for factor in getattr(matrix, "lora_A", {}).values())
    masks = sum(base.in_features for drop in getattr(matrix, "lora_dropout", {}).values() if getattr(drop, "p", 0) > 0)
    return kept + masks


def _working_bytes(block: Block, config: FinchConfig, *, hidden_bytes: int, keeps_inputs: bool) -> tuple[int, int]:
    """The two busiest moments of a block's backward pass, both in its channel mix, the wide half."""
    channels, feed = config.n_embd, config.dim_ffn
    mix = block.channel_mix
    freed_input = channels if _kept_by_product(mix.receptance, keeps_inputs) else 0
    # Gradients of the output, receptance's input, both factors and the value product's input; the factors are gone.
    at_product = (2 * channels + feed - freed_input) * hidden_bytes
    if hasattr(mix.value, "base_layer") and hidden_bytes < _EXACT:
        # The gradient that comes through the adapter is cast to float32, as its weights are, and back.
        at_product += feed * (hidden_bytes + _EXACT)
    # The gradient goes back through the squared ReLU, whose input is kept until it is through.
    at_square = (2 * feed - freed_input - (feed if _kept_by_product(mix.value, keeps_inputs) else 0)) * hidden_bytes
    return at_product, max(0, at_square)
