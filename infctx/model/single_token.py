"""One token for each row, without gradients: what generating text does between two draws.

The formulas are those of `Finch.forward` at T = 1, where nothing is chunked, shifted within a chunk or kept for a
backward pass. What is left is about forty operations a layer; the state is changed where it is. Measured beside the
forward pass in benchmarks/generate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from infctx.model.block import Block
from infctx.model.finch import Finch
from infctx.model.linear import Linear
from infctx.model.single_token_attention import AttentionStep
from infctx.model.state import ModelState
from infctx.model.time_mix import DynamicTimeMix, FinchC2TimeMix, GatedTimeMix, TimeMix
from infctx_kernels.linear import linear
from infctx_kernels.wkv6.op import LARGEST_RAW_DECAY

Product = Callable[[Tensor], Tensor]
# The normalised input and its way to the token before, both [B, C] -> the inputs of receptance, key, value and of what
# acts beside the recurrence [B, C], the decay, of the state's dtype, [B, A] or [1, A], and the key's factor; None = 1.
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """A block's tensors and products, looked up once."""

    time_norm: Product
    mix: Mix
    receptance: Product
    key: Product
    value: Product
    output: Product
    bonus: Tensor  # [H, N], of the state's dtype
    # The input of what acts beside the recurrence, and the recurrence's output [B, A], in the state's dtype -> both
    # together, normed.
    close: Callable[[Tensor, Tensor], Tensor]
    channel_norm: Product
    channel_weights: Tensor  # [2, 1, C]
    channel_key: Product
    channel_receptance: Product
    channel_value: Product


class SingleTokenStep:
    """The model at one token a row. It shares the model's weights: those that are added or changed later are not seen.

    Args:
        model: whose matrices may be quantised, or have adapters.
    """

    def __init__(self, model: Finch) -> None:
        self._dtype = model.compute_dtype or model.embedding.weight.dtype
        self._embedding = model.embedding.weight.detach()
        self._input_norm = _norm(model.input_norm, self._dtype)
        self._output_norm = _norm(model.output_norm, self._dtype)
        self._head = _product(model.head)
        with torch.inference_mode():
            recurrent = model.blocks[: model.config.n_recurrent]
            self._layers = [_layer(block, self._dtype, model.state_dtype) for block in recurrent]
        self._attention = AttentionStep(model) if model.config.n_attention else None

    @torch.inference_mode()
    def advance_(self, tokens: Int[Tensor, " B"], state: ModelState) -> tuple[Float[Tensor, "B V"], ModelState]:
        """Give the logits after one more token of each row, and the state behind it.

        Args:
            tokens: int64 ids on the model's device.
            state: of B rows; what does not grow of it is changed, and is part of the state that is given back.
        """
        x = self._input_norm(F.embedding(tokens, self._embedding).to(self._dtype))  # [B, C]
        layers = zip(*(part.unbind(0) for part in state.recurrent), strict=False)
        for layer, (wkv, att_shift, ffn_shift) in zip(self._layers, layers, strict=False):
            x = x + _time_mix_(layer, layer.time_norm(x), wkv, att_shift)
            x = x + _channel_mix_(layer, layer.channel_norm(x), ffn_shift)
        if self._attention is not None:
            x, state = self._attention.advance_(x, tokens, state)
        return self._head(self._output_norm(x)), state


def _time_mix_(layer: _Layer, hidden: Tensor, wkv: Tensor, shift: Tensor) -> Tensor:
    """The time mix of one token; wkv [B, H, N, N] and shift [B, C] become those behind it."""
    rows, heads, size, _ = wkv.shape
    towards = shift.to(hidden.dtype) - hidden
    shift.copy_(hidden)
    receptance_input, key_input, value_input, side_input, decay, factor = layer.mix(hidden, towards)
    receptance = layer.receptance(receptance_input).to(wkv.dtype).view(rows, heads, 1, size)
    key = layer.key(key_input)
    if factor is not None:
        key = (key * factor).to(key.dtype)
    key = key.to(wkv.dtype).view(rows, heads, size, 1)
    value = layer.value(value_input).to(wkv.dtype).view(rows, heads, 1, size)
    # What is read is the state before this token, and the token itself with the bonus: r·S + (r · (u ∘ k)) v.
    own = torch.matmul(receptance * layer.bonus[:, None], key)
    output = torch.addcmul(torch.matmul(receptance, wkv), own, value)
    wkv.mul_(decay.view(-1, heads, size, 1)).addcmul_(key, value)
    return layer.output(layer.close(side_input, output.view(rows, -1)))


def _channel_mix_(layer: _Layer, hidden: Tensor, shift: Tensor) -> Tensor:
    """The channel mix of one token; shift [B, C] becomes that behind it."""
    towards = shift.to(hidden.dtype) - hidden
    shift.copy_(hidden)
    key_input, receptance_input = torch.addcmul(hidden, towards, layer.channel_weights).unbind(0)
    value = layer.channel_value(F.relu(layer.channel_key(key_input)).square())
    return torch.sigmoid(layer.channel_receptance(receptance_input)) * value


def _layer(block: Block, dtype: torch.dtype, work: torch.dtype) -> _Layer:
    time_mix, channel_mix = block.time_mix, block.channel_mix
    assert time_mix.time_group is None, "text is generated by one rank"
    make_mix = _dynamic_mix if isinstance(time_mix, DynamicTimeMix) else _eagle_mix
    is_c2 = isinstance(time_mix, FinchC2TimeMix)
    return _Layer(
        time_norm=_norm(block.time_mix_norm, dtype),
        mix=make_mix(time_mix, dtype, work),
        receptance=_product(time_mix.receptance),
        key=_product(time_mix.key),
        value=_product(time_mix.value),
        output=_product(time_mix.output),
        bonus=time_mix.bonus_in_use().to(work),
        close=_value2_close(time_mix, dtype) if is_c2 else _gated_close(time_mix, work),
        channel_norm=_norm(block.channel_mix_norm, dtype),
        channel_weights=channel_mix.mix_weights().to(dtype)[:, None],
        channel_key=_product(channel_mix.key),
        channel_receptance=_product(channel_mix.receptance),
        channel_value=_product(channel_mix.value),
    )


def _gated_close(time_mix: GatedTimeMix, work: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    norm, gate = time_mix.group_norm, _product(time_mix.gate)
    group_norm = partial(
        F.group_norm,
        num_groups=norm.num_groups,
        weight=norm.weight.detach().to(work),
        bias=norm.bias.detach().to(work),
        eps=norm.eps,
    )

    def close(gate_input: Tensor, output: Tensor) -> Tensor:
        gated = gate(gate_input)
        return group_norm(output).to(gated.dtype) * F.silu(gated)

    return close


def _value2_close(time_mix: FinchC2TimeMix, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    norm, value = _norm(time_mix.output_norm, dtype), _product(time_mix.value)
    down, up = (part.detach().to(dtype) for part in (time_mix.value2_down, time_mix.value2_up))

    def close(value_input: Tensor, output: Tensor) -> Tensor:
        output = output.to(value_input.dtype)
        if time_mix.uses_value2:
            output = output + value(value_input) + torch.tanh(value_input @ down) @ up
        return norm(output)

    return close


def _dynamic_mix(time_mix: DynamicTimeMix, dtype: torch.dtype, work: torch.dtype) -> Mix:
    lerp_input, lerp_down, lerp_up = (
        part.detach().to(dtype) for part in (time_mix.lerp_input, time_mix.lerp_down, time_mix.lerp_up)
    )
    static = torch.stack([getattr(time_mix, f"lerp_{name}") for name in time_mix.MIX_ORDER]).to(dtype)[:, None]
    decay_down, decay_up = time_mix.decay_down.detach().to(dtype), time_mix.decay_up.detach().to(dtype)
    decay_base = time_mix.decay_base.detach().to(work)
    order = time_mix.MIX_ORDER
    places = [order.index(name) for name in ("receptance", "key", "value", order[-1], "decay")]

    weakens_keys = isinstance(time_mix, FinchC2TimeMix) and time_mix.weakens_keys

    def mix(hidden: Tensor, towards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        first = torch.addcmul(hidden, towards, lerp_input)
        low = torch.tanh(first @ lerp_down).view(hidden.shape[0], 5, -1).transpose(0, 1)  # [5, B, D]
        amounts = torch.baddbmm(static, low, lerp_up)  # [5, B, C]
        inputs = torch.addcmul(hidden, towards, amounts).unbind(0)
        receptance, key, value, side, decay_input = (inputs[place] for place in places)
        raw_decay = decay_base + (torch.tanh(decay_input @ decay_down) @ decay_up).to(work)
        log_decay = -torch.exp(raw_decay.clamp(max=LARGEST_RAW_DECAY))
        # 1 - w, accurate where w is almost 1.
        factor = -torch.expm1(log_decay) if weakens_keys else None
        return receptance, key, value, side, torch.exp(log_decay), factor

    return mix


def _eagle_mix(time_mix: TimeMix, dtype: torch.dtype, work: torch.dtype) -> Mix:
    # Eagle's weights are those of the token itself.
    names = ("receptance", "key", "value", "gate")
    weights = (1.0 - torch.stack([getattr(time_mix, f"mix_{name}") for name in names])).to(dtype)[:, None]
    raw_decay = time_mix.decay_base.detach().to(work).reshape(1, -1)
    decay = torch.exp(-torch.exp(raw_decay.clamp(max=LARGEST_RAW_DECAY)))

    def mix(hidden: Tensor, towards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
        receptance, key, value, gate = torch.addcmul(hidden, towards, weights).unbind(0)
        return receptance, key, value, gate, decay, None

    return mix


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Product:
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    return partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=weight, bias=bias, eps=norm.eps)


def _product(layer: nn.Module) -> Product:
    # A quantised matrix, or one with an adapter, knows its own product.
    return partial(linear, weight=layer.weight.detach()) if type(layer) is Linear else layer
