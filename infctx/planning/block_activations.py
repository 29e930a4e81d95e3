"""What one block keeps of each token for its backward pass, by the kind of its time mix; see `activations`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from infctx.model.config import BlockKind, FinchConfig

# The Triton backend keeps the recurrence's state every so many tokens; the CPU's recomputes from the chunk's first.
WKV_CHECKPOINT_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """Numbers that are kept of a token: in the dtype of the activations; in float32; and norms of so many channels,
    whose inputs may be kept in either. shared_norms: of inputs that something else keeps, too, in the activations'
    dtype."""

    hidden: int = 0
    exact: int = 0
    norms: tuple[int, ...] = ()
    shared_norms: tuple[int, ...] = ()


def time_mix_numbers(
    time_mix: nn.Module, kind: BlockKind, config: FinchConfig, *, keeps_inputs: bool, on_gpu: bool
) -> Numbers:
    """Of the attention half of a block, without the norm in front of it.

    Args:
        keeps_inputs: whether every matrix product keeps its input; else those that something is learnt from.
        on_gpu: the recurrence keeps some of its states there.
    """
    if kind == "gold":
        return _gold(time_mix, config, keeps_inputs=keeps_inputs)
    if kind == "gptalpha":
        return _gptalpha(time_mix, config, keeps_inputs=keeps_inputs)
    channels, width = config.n_embd, config.dim_att
    # Input of the token shift; receptance, key, value and what acts beside the recurrence; what comes out of it.
    hidden = channels + 5 * width + products_numbers(time_mix, keeps_inputs=keeps_inputs)
    exact = width  # the decay; Eagle's is written out for every token
    if on_gpu:
        exact += width * config.head_size // WKV_CHECKPOINT_TOKENS
    if kind == "5.2":
        return Numbers(hidden=hidden, exact=exact)
    hidden += 5 * channels + 5 * config.lerp_rank + config.decay_rank  # moving weights and both low-rank middles
    hidden += _loose(time_mix, ("lerp_down", "decay_down"), channels, keeps_inputs=keeps_inputs)
    if kind == "6":
        return Numbers(hidden=hidden, exact=exact)
    # No gate: the sum that is normed is all that is kept of the recurrence's output and of the second value.
    hidden += config.value_rank - 2 * width + kept_by_product(time_mix.value, keeps_inputs=keeps_inputs)
    if not kept_by_product(time_mix.value, keeps_inputs=keeps_inputs):
        hidden += _loose(time_mix, ("value2_down",), channels, keeps_inputs=keeps_inputs)
    if config.weakens_keys:
        # The key before it, and three steps from the decay to what it is multiplied with.
        hidden, exact = hidden + width, exact + 3 * width
    return Numbers(hidden=hidden, exact=exact, norms=(width,))


def channel_mix_numbers(channel_mix: nn.Module, config: FinchConfig, *, keeps_inputs: bool) -> Numbers:
    """Of the feed-forward half, without the norm in front of it: the shift's input, the squared ReLU's, two factors."""
    products = products_numbers(channel_mix, keeps_inputs=keeps_inputs)
    return Numbers(hidden=3 * config.n_embd + config.dim_ffn + products)


def products_numbers(part: nn.Module, *, keeps_inputs: bool) -> int:
    """Of the inputs of all matrices of a half."""
    return sum(kept_by_product(matrix, keeps_inputs=keeps_inputs) for matrix in matrices_of(part))


def matrices_of(part: nn.Module) -> Iterator[nn.Module]:
    """The matrices of half a block, with an adapter or without."""
    for child in part.children():
        if not isinstance(child, nn.LayerNorm | nn.GroupNorm):
            yield child


def kept_by_product(matrix: nn.Module, *, keeps_inputs: bool) -> int:
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


def _gold(time_mix: nn.Module, config: FinchConfig, *, keeps_inputs: bool) -> Numbers:
    channels, width = config.n_embd, config.dim_att
    # Input of both token shifts, the moving weights and their middle; the query, and what was attended to.
    hidden = 2 * channels + config.lerp_rank + 2 * width
    hidden += _loose(time_mix, ("lerp_query_down",), channels, keeps_inputs=keeps_inputs)
    hidden += products_numbers(time_mix, keeps_inputs=keeps_inputs)
    if config.uses_rope:
        hidden += config.head_size
    # Of the softmax a number for each head.
    return Numbers(hidden=hidden, exact=config.n_head, norms=(width,), shared_norms=(width,))


def _gptalpha(time_mix: nn.Module, config: FinchConfig, *, keeps_inputs: bool) -> Numbers:
    channels, width = config.n_embd, config.dim_att
    # Input of both token shifts, the moving weights and their middles; query, key, value and what was attended to.
    hidden = 4 * channels + 3 * config.lerp_rank + 4 * width
    hidden += _loose(time_mix, ("lerp_down",), channels, keeps_inputs=keeps_inputs)
    hidden += products_numbers(time_mix, keeps_inputs=keeps_inputs)
    if config.uses_rope:
        # Sine and cosine, for queries and again for keys where those are the chunk's own.
        hidden += config.head_size
    return Numbers(hidden=hidden, exact=config.n_head, norms=3 * (width,), shared_norms=(width,))


def _loose(time_mix: nn.Module, names: tuple[str, ...], channels: int, *, keeps_inputs: bool) -> int:
    """Inputs of the low-rank pairs' first matrices, which are no modules."""
    return sum(channels for name in names if keeps_inputs or getattr(time_mix, name).requires_grad)
