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

from infctx.model.config import BlockKind, FinchConfig
from infctx.model.finch import Finch
from infctx.planning.block_activations import channel_mix_numbers, kept_by_product, time_mix_numbers
from infctx_kernels import linear as products

Device = Literal["cuda", "cpu"]
# Of float32: decays, statistics of norms, recurrent states.
_EXACT = 4
_ID_BYTES = _PLACE_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationBytes:
    """Bytes for one token.

    blocks: kept by each block where nothing is recomputed. between: kept before each block where they are.
    shared: part of a recomputed block that is kept before it, too. embedding: kept in front of the blocks. last_norm:
    kept behind them. hidden: one activation of all channels. at_product, at_square: what the backward pass of a block
    holds beyond what was kept, while it multiplies with the wide matrix and while it goes through the squared ReLU.
    cached: kept once for all layers that attend, of what they cache. behind_attention: kept by the last block behind
    its attention, which is free by the time the backward pass is there.
    """

    blocks: tuple[int, ...]
    between: int
    shared: int
    embedding: int
    last_norm: int
    hidden: int
    at_product: int
    at_square: int
    cached: int = 0
    behind_attention: int = 0

    @property
    def kept(self) -> int:
        """All of it, where nothing is recomputed."""
        return self.embedding + sum(self.blocks) + self.last_norm + self.hidden + self.cached


@dataclass(frozen=True, kw_only=True, slots=True)
class _KeptAs:
    """hidden: bytes of an activation."""

    hidden: int
    device: Device

    @property
    def keeps_inputs(self) -> bool:
        """Whether every matrix product keeps its input."""
        return self.device == "cpu" and self.hidden == _EXACT and products.onednn_is_faster()

    @property
    def normed(self) -> int:
        """Bytes of a number in the input of a norm."""
        return _EXACT if self.device == "cuda" else self.hidden

    def norm(self, channels: int) -> int:
        """Of a norm: its input, and two numbers."""
        return (channels + 2) * self.normed

    def shared_norm(self, channels: int) -> int:
        """The same where the input is kept anyway; a copy in another dtype is not."""
        return self.norm(channels) - (channels * self.hidden if self.normed == self.hidden else 0)


def activation_bytes_per_token(model: Finch, *, hidden_bytes: int, device: Device = "cuda") -> ActivationBytes:
    """What a token of a chunk costs in a model whose trained parameters are marked; values are not looked at.

    Args:
        hidden_bytes: of an activation: 2 for bf16, 4 for float32.
        device: where it runs: the backends keep different states, and autocast on CUDA norms in float32.
    """
    config = model.config
    kept_as = _KeptAs(hidden=hidden_bytes, device=device)
    hidden, norm = config.n_embd * hidden_bytes, kept_as.norm(config.n_embd)
    blocks = [
        _block_bytes(block, config.kind(layer), config, kept_as) + 2 * norm for layer, block in enumerate(model.blocks)
    ]
    has_embedding_gradient = is_trained(model.embedding) or is_trained(model.input_norm)
    if not has_embedding_gradient:
        # No gradient goes beyond the first token shift: the norm before it keeps nothing.
        blocks[0] -= norm
    working = [
        _working_bytes(block, config, hidden_bytes=hidden_bytes, keeps_inputs=kept_as.keeps_inputs)
        for block in model.blocks
    ]
    return ActivationBytes(
        blocks=tuple(blocks),
        between=hidden,
        # The first norm keeps its input as it is, or a copy of it.
        shared=hidden if kept_as.normed == hidden_bytes else 0,
        embedding=_ID_BYTES + norm if has_embedding_gradient else 0,
        last_norm=norm,
        hidden=hidden,
        at_product=max(at_product for at_product, _ in working),
        at_square=max(at_square for _, at_square in working),
        cached=_cached_bytes(model, kept_as),
        behind_attention=norm + _behind_attention(model, kept_as) if config.n_attention else 0,
    )


def is_trained(module: nn.Module) -> bool:
    """Whether a part of a model, or an adapter on it, has anything to learn."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _block_bytes(block: nn.Module, kind: BlockKind, config: FinchConfig, kept_as: _KeptAs) -> int:
    halves = (
        time_mix_numbers(
            block.time_mix, kind, config, keeps_inputs=kept_as.keeps_inputs, on_gpu=kept_as.device == "cuda"
        ),
        channel_mix_numbers(block.channel_mix, config, keeps_inputs=kept_as.keeps_inputs),
    )
    return sum(
        half.hidden * kept_as.hidden
        + half.exact * _EXACT
        + sum(kept_as.norm(width) for width in half.norms)
        + sum(kept_as.shared_norm(width) for width in half.shared_norms)
        for half in halves
    )


def _working_bytes(block: nn.Module, config: FinchConfig, *, hidden_bytes: int, keeps_inputs: bool) -> tuple[int, int]:
    """The two busiest moments of a block's backward pass, both in its channel mix, the wide half."""
    channels, feed = config.n_embd, config.dim_ffn
    mix = block.channel_mix
    freed_input = channels if kept_by_product(mix.receptance, keeps_inputs=keeps_inputs) else 0
    # Gradients of the output, receptance's input, both factors and the value product's input; the factors are gone.
    at_product = (2 * channels + feed - freed_input) * hidden_bytes
    if hasattr(mix.value, "base_layer") and hidden_bytes < _EXACT:
        # The gradient that comes through the adapter is cast to float32, as its weights are, and back.
        at_product += feed * (hidden_bytes + _EXACT)
    # The gradient goes back through the squared ReLU, whose input is kept until it is through.
    kept_by_value = feed if kept_by_product(mix.value, keeps_inputs=keeps_inputs) else 0
    at_square = (2 * feed - freed_input - kept_by_value) * hidden_bytes
    return at_product, max(0, at_square)


def _cached_bytes(model: Finch, kept_as: _KeptAs) -> int:
    """The place of each query's first key; what GOLD's layers share, and its product's input."""
    if not model.config.n_attention:
        return 0
    if model.token_cat is None:
        return _PLACE_BYTES
    own = model.config.cache_rank * kept_as.hidden
    is_kept = kept_by_product(model.token_cat.compress, keeps_inputs=kept_as.keeps_inputs)
    # The next norm keeps it as well, but perhaps in another dtype.
    return _PLACE_BYTES + own + (is_kept * kept_as.hidden if kept_as.normed != kept_as.hidden else 0)


def _behind_attention(model: Finch, kept_as: _KeptAs) -> int:
    """Of the last block: the channel mix, and what the output's product and its norm keep."""
    config, block, keeps_inputs = model.config, model.blocks[-1], kept_as.keeps_inputs
    numbers = channel_mix_numbers(block.channel_mix, config, keeps_inputs=keeps_inputs).hidden
    numbers += kept_by_product(block.time_mix.output, keeps_inputs=keeps_inputs)
    return numbers * kept_as.hidden + kept_as.shared_norm(config.dim_att)
