"""What a slice of the tokens does to the state that enters it: enough to carry a state past slices held elsewhere.

Over any run of tokens the recurrence is an affine map of the state that enters, and row by row at that:

    state behind = decay · state before + written

`decay` [B, H, N] is the product of the tokens' decays, `written` [B, H, N, N] what zeros that enter have become behind.
Backward it is the same map with other constants: the gradient before is decay · gradient behind + read, where `read`
follows from the gradients of the slice's outputs alone. A document that starts in the slice makes its decay 0.

Every factor is the exponential of a sum of log decays, all of one sign; nothing is divided by a decay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from infctx_kernels.wkv6.op import LARGEST_RAW_DECAY


@torch.no_grad()
def summarise_writes(
    key: Float[Tensor, "B T H N"],
    value: Float[Tensor, "B T H N"],
    raw_decay: Float[Tensor, "B T H N"],
    *,
    dtype: torch.dtype,
    starts: Bool[Tensor, "B T"] | None = None,
    start_state: Float[Tensor, "H N N"] | None = None,
) -> tuple[Float[Tensor, "B H N"], Float[Tensor, "B H N N"]]:
    """The decay of a slice and what it writes.

    Args:
        key, value, raw_decay, starts, start_state: as in `wkv6_from_raw_decay`.
        dtype: of the state; everything is computed and returned in it.
    Returns:
        decay, 0 to 1 per key channel, 0 in a row with a start; and what is written, key axis before value axis. No
        gradient flows through either.
    Source: Eagle and Finch paper, the Finch time-mix recurrence, unrolled.
    """
    with torch.autocast(key.device.type, enabled=False):
        log_decay = _log_decay(raw_decay, dtype)
        until_end = _sums_of_later(log_decay)  # [B, T, H, N]
        decay = torch.exp(until_end[:, 0] + log_decay[:, 0])
        left = key.to(dtype) * torch.exp(until_end)
        if starts is None:
            return decay, _outer_sum(left, value.to(dtype))
        num_starts = starts.cumsum(1)
        # Tokens of documents that ended in the slice have left nothing.
        left = left.masked_fill((num_starts < num_starts[:, -1:])[:, :, None, None], 0.0)
        written = _outer_sum(left, value.to(dtype))
        has_start = (num_starts[:, -1] > 0)[:, None, None]
        if start_state is not None:
            since_start = torch.exp((until_end + log_decay)[_last_start(num_starts)])  # [B, H, N]
            of_start_state = since_start[..., None] * start_state.to(dtype)
            written = written + of_start_state.masked_fill(~has_start[..., None], 0.0)
        return decay.masked_fill(has_start, 0.0), written


@torch.no_grad()
def summarise_reads(
    receptance: Float[Tensor, "B T H N"],
    output_gradient: Float[Tensor, "B T H N"],
    raw_decay: Float[Tensor, "B T H N"],
    *,
    dtype: torch.dtype,
    starts: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H N N"]:
    """The gradient, with respect to the state that enters a slice, of what its own outputs read from that state.

    Args:
        receptance, raw_decay, starts: as in `wkv6_from_raw_decay`.
        output_gradient: of the slice's output.
        dtype: of the state; everything is computed and returned in it.
    Returns:
        Key axis before value axis.
    Source: the derivative of the unrolled recurrence.
    """
    with torch.autocast(receptance.device.type, enabled=False):
        log_decay = _log_decay(raw_decay, dtype)
        since_front = F.pad(log_decay[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1)
        reads = receptance.to(dtype) * torch.exp(since_front)
        if starts is not None:
            reads = reads.masked_fill((starts.cumsum(1) > 0)[:, :, None, None], 0.0)
        return _outer_sum(reads, output_gradient.to(dtype))


def carry(
    state: Float[Tensor, "B H N N"], decay: Float[Tensor, "B H N"], written: Float[Tensor, "B H N N"]
) -> Float[Tensor, "B H N N"]:
    """decay · state + written: the state behind a slice from the one before, or a gradient before from that behind."""
    # Not by a product with 0: a state that is not finite would outlive its document.
    return torch.where(decay[..., None] == 0.0, written, decay[..., None] * state + written)


def _log_decay(raw_decay: Tensor, dtype: torch.dtype) -> Tensor:
    return -torch.exp(raw_decay.to(dtype).clamp(max=LARGEST_RAW_DECAY))


def _sums_of_later(log_decay: Tensor) -> Tensor:
    """For each token the sum over the tokens behind it, [B, T, H, N]."""
    return F.pad(log_decay[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """Σ_t left_t right_t^T, [B, H, N, N]."""
    return left.permute(0, 2, 3, 1) @ right.transpose(1, 2)


def _last_start(num_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of each row's last start; some place where there is none. num_starts: so far, [B, T]."""
    places = (num_starts < num_starts[:, -1:]).sum(1).clamp(max=num_starts.shape[1] - 1)
    return torch.arange(num_starts.shape[0], device=num_starts.device), places
