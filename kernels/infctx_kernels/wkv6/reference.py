"""The recurrence, one token at a time: slow, readable, exact in float64. Every other backend is compared with it."""

from __future__ import annotations

import torch
from torch import Tensor


def wkv6_reference(
    receptance: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    starts: Tensor | None,
    start_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence in the state's dtype; shapes as in `op.wkv6`, all tensors already in that dtype.

    Source: Eagle and Finch paper, the Finch time-mix recurrence:
        y_t = r_t (S_{t-1} + diag(u) k_t^T v_t),    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t
    """
    outputs = []
    for t in range(receptance.shape[1]):
        if starts is not None:
            fresh = torch.zeros_like(state) if start_state is None else start_state.expand_as(state)
            state = torch.where(starts[:, t, None, None, None], fresh, state)
        key_value = key[:, t, :, :, None] * value[:, t, :, None, :]  # [B, H, N, N]
        read = state + bonus[:, :, None] * key_value
        outputs.append((receptance[:, t, :, None, :] @ read).squeeze(-2))
        state = torch.exp(log_decay[:, t, :, :, None]) * state + key_value
    return torch.stack(outputs, dim=1), state
