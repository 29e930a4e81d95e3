"""The attention half of a block: token shift, projections, the WKV6 recurrence, group norm, gate, output.

Finch and Eagle share everything but how the inputs are mixed with the previous token and where the decay comes from.
Finch-C2 has a second value in the place of gate and bonus. Sources: Eagle and Finch paper, sections on Eagle and Finch
time mixing; GoldFinch paper (arXiv 2407.12077), section on Finch-C2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from infctx.model.config import FinchConfig
from infctx.model.layer_norm import LayerNorm
from infctx.model.linear import Linear
from infctx.model.time_parallel import SlicedWkv6, TimeGroup
from infctx.model.token_shift import shift_behind, token_shift, vector_before
from infctx.shapes import Activations, LayerShift, LayerWkv, Starts
from infctx_kernels import group_norm_gate, wkv6_from_raw_decay
from infctx_kernels.linear import linear
from infctx_kernels.wkv6.op import LARGEST_RAW_DECAY


class MixedInputs(NamedTuple):
    """What goes into each projection, all [B, T, C], and the raw decay [B, T, A] or [A] in the state's dtype.

    side: of what acts beside the recurrence, the gate; in Finch-C2 the second value.
    """

    receptance: Tensor
    key: Tensor
    value: Tensor
    side: Tensor
    raw_decay: Tensor


class RecurrenceValues(NamedTuple):
    """What goes into the recurrence and what comes out of it, all [B, T, H, N]; log_decay in the state's dtype."""

    receptance: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    output: Tensor


class TimeMix(nn.Module):
    """What Finch and Eagle share; `_mix` differs."""

    has_gate = False

    def __init__(self, config: FinchConfig, *, has_initial_state: bool) -> None:
        super().__init__()
        channels, width = config.n_embd, config.dim_att
        self.n_head, self.head_size = config.n_head, config.head_size
        self.receptance = Linear(channels, width)
        self.key = Linear(channels, width)
        self.value = Linear(channels, width)
        if self.has_gate:
            self.gate = Linear(channels, width)
        self.output = Linear(width, channels)
        self.bonus = nn.Parameter(torch.empty(config.n_head, config.head_size))
        initial_shape = (config.n_head, config.head_size, config.head_size)
        self.initial_state = nn.Parameter(torch.zeros(initial_shape)) if has_initial_state else None
        # What a document's first token takes for the one before it; None = zeros.
        self.initial_shift: nn.Parameter | None = None
        self.backend: str | None = None
        self.surrounding_backend: str | None = None
        # The ranks that hold the other slices of each chunk; None = this one has it whole.
        self.time_group: TimeGroup | None = None

    def forward(
        self, hidden: Activations, shift: LayerShift, wkv: LayerWkv, starts: Starts | None
    ) -> tuple[Activations, LayerShift, LayerWkv]:
        """Mix over time; hidden is the block's normalised input. Returns the output and the two new states."""
        before, after = vector_before(hidden, shift, self.time_group)
        mixed = self._mix(hidden, before, starts, work=wkv.dtype)
        output, side, new_wkv = self._recur(mixed, wkv, starts)
        return self.output(self._normed(output, side)), shift_behind(hidden, shift, after), new_wkv

    @torch.no_grad()
    def recurrence_values(
        self, hidden: Activations, shift: LayerShift, wkv: LayerWkv, starts: Starts | None
    ) -> RecurrenceValues:
        """What `forward` would compute on the way, to be looked at; takes the arguments of `forward`, on one rank."""
        assert self.time_group is None, "a slice of a chunk alone does not know the state before it"
        mixed = self._mix(hidden, shift, starts, work=wkv.dtype)
        output, _, _ = self._recur(mixed, wkv, starts)
        projected = (self.receptance(mixed.receptance), self._key(mixed), self.value(mixed.value))
        log_decay = -torch.exp(mixed.raw_decay.expand(*projected[0].shape[:2], -1))
        return RecurrenceValues(*(tensor.view(output.shape) for tensor in (*projected, log_decay)), output)

    def _recur(self, mixed: MixedInputs, wkv: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The recurrence's output [B, T, H, N], what acts beside it [B, T, A] and its new state."""
        rows, num_tokens, _ = mixed.key.shape
        by_head = (rows, num_tokens, self.n_head, self.head_size)
        if self.time_group is None:
            output, new_wkv = wkv6_from_raw_decay(
                self.receptance(mixed.receptance).view(by_head),
                self._key(mixed).view(by_head),
                self.value(mixed.value).view(by_head),
                mixed.raw_decay.expand(rows, num_tokens, -1).view(by_head),
                self.bonus_in_use(),
                wkv,
                starts=starts,
                start_state=self.initial_state,
                backend=self.backend,
            )
            return output, self._side(mixed), new_wkv
        sliced = SlicedWkv6(
            self.time_group,
            self._key(mixed).view(by_head),
            self.value(mixed.value).view(by_head),
            mixed.raw_decay.expand(rows, num_tokens, -1).view(by_head),
            wkv,
            starts=starts,
            start_state=self.initial_state,
            backend=self.backend,
        )
        # While the ranks talk.
        receptance, side = self.receptance(mixed.receptance).view(by_head), self._side(mixed)
        output, new_wkv = sliced.run(receptance, self.bonus_in_use())
        return output, side, new_wkv

    def _mix(self, hidden: Tensor, shift: Tensor, starts: Tensor | None, *, work: torch.dtype) -> MixedInputs:
        raise AssertionError("a time mix of some version")

    def _key(self, mixed: MixedInputs) -> Tensor:
        return self.key(mixed.key)

    def bonus_in_use(self) -> Tensor:
        """What the current token is weighed with, [H, N]."""
        return self.bonus

    def _side(self, mixed: MixedInputs) -> Tensor:
        raise AssertionError("GatedTimeMix or FinchC2TimeMix")

    def _normed(self, output: Tensor, side: Tensor) -> Tensor:
        raise AssertionError("GatedTimeMix or FinchC2TimeMix")


class GatedTimeMix(TimeMix):
    """A norm of each head, and a gate."""

    has_gate = True

    def __init__(self, config: FinchConfig, *, has_initial_state: bool) -> None:
        super().__init__(config, has_initial_state=has_initial_state)
        self.group_norm = nn.GroupNorm(config.n_head, config.dim_att, eps=config.group_norm_eps)

    def _side(self, mixed: MixedInputs) -> Tensor:
        return self.gate(mixed.side)

    def _normed(self, output: Tensor, side: Tensor) -> Tensor:
        norm, backend = self.group_norm, self.surrounding_backend
        return group_norm_gate(output, side, norm.weight, norm.bias, eps=norm.eps, backend=backend)


class DynamicTimeMix(TimeMix):
    """The mixes and the decay depend on the token through low-rank pairs."""

    # The last is of what acts beside the recurrence.
    MIX_ORDER: tuple[str, ...]

    def __init__(self, config: FinchConfig, *, has_initial_state: bool) -> None:
        super().__init__(config, has_initial_state=has_initial_state)
        channels, width = config.n_embd, config.dim_att
        self.lerp_input = nn.Parameter(torch.empty(channels))
        for name in self.MIX_ORDER:
            self.register_parameter(f"lerp_{name}", nn.Parameter(torch.empty(channels)))
        # Used as x @ P, stored [in, out]; five groups of `lerp_rank` columns in MIX_ORDER.
        self.lerp_down = nn.Parameter(torch.empty(channels, 5 * config.lerp_rank))
        self.lerp_up = nn.Parameter(torch.empty(5, config.lerp_rank, channels))
        self.decay_base = nn.Parameter(torch.empty(width))
        self.decay_down = nn.Parameter(torch.empty(channels, config.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(config.decay_rank, width))

    def _mix(self, hidden: Tensor, shift: Tensor, starts: Tensor | None, *, work: torch.dtype) -> MixedInputs:
        rows, num_tokens, channels = hidden.shape
        backend = self.surrounding_backend
        start = self.initial_shift
        (first,) = token_shift(hidden, shift, self.lerp_input[None], starts=starts, start=start, backend=backend)
        low = torch.tanh(linear(first, self.lerp_down.t().to(hidden.dtype)))
        low = low.view(rows * num_tokens, 5, -1).transpose(0, 1)  # [5, B·T, D]
        dynamic = torch.bmm(low, self.lerp_up.to(low.dtype)).view(5, rows, num_tokens, channels)
        static = torch.stack([getattr(self, f"lerp_{name}") for name in self.MIX_ORDER])
        mixed = token_shift(hidden, shift, static, dynamic=dynamic, starts=starts, start=start, backend=backend)
        inputs = dict(zip(self.MIX_ORDER, mixed, strict=True))
        x = inputs.pop("decay")
        inputs["side"] = inputs.pop(self.MIX_ORDER[-1])
        low_decay = linear(torch.tanh(linear(x, self.decay_down.t().to(x.dtype))), self.decay_up.t().to(x.dtype))
        return MixedInputs(**inputs, raw_decay=self.decay_base.to(work) + low_decay.to(work))


class FinchTimeMix(DynamicTimeMix, GatedTimeMix):
    """RWKV-6."""

    MIX_ORDER = ("decay", "key", "value", "receptance", "gate")


class FinchC2TimeMix(DynamicTimeMix):
    """Finch-C2: no gate; a token's own value comes around the recurrence, as a second one that has no decay.

    A switch that is off leaves its parameters in place, with gradients of 0: an engine waits for all of them.
    """

    MIX_ORDER = ("receptance", "key", "value", "decay", "value2")

    def __init__(self, config: FinchConfig, *, has_initial_state: bool) -> None:
        super().__init__(config, has_initial_state=has_initial_state)
        self.uses_value2, self.weakens_keys = config.uses_value2, config.weakens_keys
        self.value2_down = nn.Parameter(torch.empty(config.n_embd, config.value_rank))
        self.value2_up = nn.Parameter(torch.empty(config.value_rank, config.dim_att))
        self.output_norm = LayerNorm(config.dim_att, eps=config.layer_norm_eps)

    def _key(self, mixed: MixedInputs) -> Tensor:
        key = self.key(mixed.key)
        if not self.weakens_keys:
            return key
        # 1 - w, accurate where w is almost 1.
        return (key * -torch.expm1(-torch.exp(mixed.raw_decay.clamp(max=LARGEST_RAW_DECAY)))).to(key.dtype)

    def bonus_in_use(self) -> Tensor:
        """Zeros where the second value takes its place."""
        return self.bonus * 0.0 if self.uses_value2 else self.bonus

    def _side(self, mixed: MixedInputs) -> Tensor:
        x = mixed.side
        low = torch.tanh(linear(x, self.value2_down.t().to(x.dtype)))
        value = self.value(x) + linear(low, self.value2_up.t().to(x.dtype))
        return value if self.uses_value2 else value * 0.0

    def _normed(self, output: Tensor, side: Tensor) -> Tensor:
        return self.output_norm(output.flatten(-2).to(side.dtype) + side)


class EagleTimeMix(GatedTimeMix):
    """RWKV-5.2: fixed mixes, weighting the token itself and the previous one, and a fixed decay for each channel."""

    def __init__(self, config: FinchConfig, *, has_initial_state: bool) -> None:
        super().__init__(config, has_initial_state=has_initial_state)
        channels = config.n_embd
        self.mix_key = nn.Parameter(torch.empty(channels))
        self.mix_value = nn.Parameter(torch.empty(channels))
        self.mix_receptance = nn.Parameter(torch.empty(channels))
        self.mix_gate = nn.Parameter(torch.empty(channels))
        self.decay_base = nn.Parameter(torch.empty(config.n_head, config.head_size))

    def _mix(self, hidden: Tensor, shift: Tensor, starts: Tensor | None, *, work: torch.dtype) -> MixedInputs:
        names = ("receptance", "key", "value", "gate")
        # Eagle's weights are those of the token itself.
        static = 1.0 - torch.stack([getattr(self, f"mix_{name}") for name in names])
        start, backend = self.initial_shift, self.surrounding_backend
        mixed = token_shift(hidden, shift, static, starts=starts, start=start, backend=backend)
        return MixedInputs(*mixed, raw_decay=self.decay_base.to(work).reshape(-1))
