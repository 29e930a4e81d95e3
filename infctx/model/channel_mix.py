"""The feed-forward half of a block: token shift, squared ReLU, a sigmoid gate.

Source: Eagle and Finch paper, channel mixing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infctx.model.config import FinchConfig
from infctx.model.linear import Linear
from infctx.model.time_parallel import TimeGroup
from infctx.model.token_shift import shift_behind, token_shift, vector_before
from infctx.shapes import Activations, LayerShift, Starts
from infctx_kernels import sigmoid_gate, squared_relu


class ChannelMix(nn.Module):
    """What Finch and Eagle share; `mix_weights` differs."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__()
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.receptance = Linear(config.n_embd, config.n_embd)
        self.value = Linear(config.dim_ffn, config.n_embd)
        # What a document's first token takes for the one before it; None = zeros.
        self.initial_shift: nn.Parameter | None = None
        self.surrounding_backend: str | None = None
        # The ranks that hold the other slices of each chunk; None = this one has it whole.
        self.time_group: TimeGroup | None = None

    def forward(self, hidden: Activations, shift: LayerShift, starts: Starts | None) -> tuple[Activations, LayerShift]:
        """Mix over channels; hidden is the block's normalised input. Returns the output and the new shift state."""
        backend = self.surrounding_backend
        before, after = vector_before(hidden, shift, self.time_group)
        key_input, receptance_input = token_shift(
            hidden, before, self.mix_weights(), starts=starts, start=self.initial_shift, backend=backend
        )
        value = self.value(squared_relu(self.key(key_input), backend=backend))
        output = sigmoid_gate(self.receptance(receptance_input), value, backend=backend)
        return output, shift_behind(hidden, shift, after)

    def advance(self, last: LayerShift, shift: LayerShift) -> LayerShift:
        """The new shift state alone, from hidden at the last token."""
        if self.time_group is None:
            return last.to(shift.dtype)
        return self.time_group.exchange(last, shift)[1]

    def mix_weights(self) -> Tensor:
        """How far the inputs of key and receptance move towards the token before, [2, C]."""
        raise AssertionError("FinchChannelMix or EagleChannelMix")


class FinchChannelMix(ChannelMix):
    """RWKV-6: the weight is that of the previous token."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__(config)
        self.lerp_key = nn.Parameter(torch.empty(config.n_embd))
        self.lerp_receptance = nn.Parameter(torch.empty(config.n_embd))

    def mix_weights(self) -> Tensor:
        """The weights, [2, C]."""
        return torch.stack([self.lerp_key, self.lerp_receptance])


class EagleChannelMix(ChannelMix):
    """RWKV-5.2: the weight is that of the token itself."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__(config)
        self.mix_key = nn.Parameter(torch.empty(config.n_embd))
        self.mix_receptance = nn.Parameter(torch.empty(config.n_embd))

    def mix_weights(self) -> Tensor:
        """One minus the weights, [2, C]."""
        return 1.0 - torch.stack([self.mix_key, self.mix_receptance])
