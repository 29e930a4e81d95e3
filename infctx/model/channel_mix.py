"""The feed-forward half of a block: token shift, squared ReLU, a sigmoid gate.

Source: Eagle and Finch paper, channel mixing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infctx.model.config import FinchConfig
from infctx.model.token_shift import lerp, token_shift
from infctx.shapes import Activations, LayerShift, Starts


class ChannelMix(nn.Module):
    """What Finch and Eagle share; `_mix` differs."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__()
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.receptance = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, hidden: Activations, shift: LayerShift, starts: Starts | None) -> tuple[Activations, LayerShift]:
        """Mix over channels; hidden is the block's normalised input. Returns the output and the new shift state."""
        previous, new_shift = token_shift(hidden, shift, starts)
        key_input, receptance_input = self._mix(hidden, previous)
        value = self.value(F.relu(self.key(key_input)).square())
        return torch.sigmoid(self.receptance(receptance_input)) * value, new_shift

    def _mix(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("FinchChannelMix or EagleChannelMix")


class FinchChannelMix(ChannelMix):
    """RWKV-6: the weight is that of the previous token."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__(config)
        self.lerp_key = nn.Parameter(torch.empty(config.n_embd))
        self.lerp_receptance = nn.Parameter(torch.empty(config.n_embd))

    def _mix(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        difference = previous - hidden
        return lerp(hidden, difference, self.lerp_key), lerp(hidden, difference, self.lerp_receptance)


class EagleChannelMix(ChannelMix):
    """RWKV-5.2: the weight is that of the token itself."""

    def __init__(self, config: FinchConfig) -> None:
        super().__init__(config)
        self.mix_key = nn.Parameter(torch.empty(config.n_embd))
        self.mix_receptance = nn.Parameter(torch.empty(config.n_embd))

    def _mix(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        difference = hidden - previous
        return lerp(previous, difference, self.mix_key), lerp(previous, difference, self.mix_receptance)
