"""What a slice of the tokens does to the state that enters it: enough to carry a state past slices held elsewhere.

Over any run of tokens the recurrence is an affine map of the state that enters, and row by row at that:

    state behind = decay · state before + written

`decay` [B, H, N] is the product of the tokens' decays, `written` [B, H, N, N] what zeros that enter have become behind.
Backward it is the same map with other constants: the gradient before is decay · gradient behind + read, where `read`
follows from the gradients of the slice's outputs alone. A document that starts in the slice makes its decay 0.

What is written is the operator's own state behind zeros, and what is read the same with time running backwards, so the
compiled backends compute both; they are several times as fast as the matrix products that do it in torch operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from infctx_kernels.dispatch import Backend, choose_backend
from infctx_kernels.wkv6.op import wkv6_from_raw_decay

COMPILED = (Backend.TRITON, Backend.CPP)


@torch.no_grad()
def summarise_writes(
    key: Float[Tensor, "B T H N"],
    value: Float[Tensor, "B T H N"],
    raw_decay: Float[Tensor, "B T H N"],
    *,
    dtype: torch.dtype,
    starts: Bool[Tensor, "B T"] | None = None,
    start_state: Float[Tensor, "H N N"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B H N"], Float[Tensor, "B H N N"]]:
    """The decay of a slice and what it writes.

    Args:
        key, value, raw_decay, starts, start_state, backend: as in `wkv6_from_raw_decay`.
        dtype: of the state; both results have it.
    Returns:
        decay, 0 to 1 per key channel, 0 in a row with a start; and what is written, key axis before value axis. No
        gradient flows through either.
    Source: Eagle and Finch paper, the Finch time-mix recurrence, unrolled.
    """
    with torch.autocast(key.device.type, enabled=False):
        decay = torch.exp(_log_decay(raw_decay, dtype).sum(1))
        if starts is not None:
            decay = decay.masked_fill(starts.any(1)[:, None, None], 0.0)
        if _is_compiled(key, backend):
            written = _state_behind_zeros(key, value, raw_decay, dtype, starts, start_state, backend)
        else:
            written = _products_of_writes(key, value, raw_decay, dtype, starts, start_state)
        return decay, written


@torch.no_grad()
def summarise_reads(
    receptance: Float[Tensor, "B T H N"],
    output_gradient: Float[Tensor, "B T H N"],
    raw_decay: Float[Tensor, "B T H N"],
    *,
    dtype: torch.dtype,
    starts: Bool[Tensor, "B T"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "B H N N"]:
    """The gradient, with respect to the state that enters a slice, of what its own outputs read from that state.

    Args:
        receptance, raw_decay, starts, backend: as in `wkv6_from_raw_decay`.
        output_gradient: of the slice's output, in receptance's dtype.
        dtype: of the state; the result has it.
    Returns:
        Key axis before value axis.
    Source: the derivative of the unrolled recurrence.
    """
    with torch.autocast(receptance.device.type, enabled=False):
        if starts is not None:
            # A document that starts here reads nothing of what was before.
            receptance = receptance.masked_fill((starts.cumsum(1) > 0)[:, :, None, None], 0.0)
        if _is_compiled(receptance, backend):
            # A read at t passes the decays of the tokens before t, as a write at t those of the tokens behind it.
            backwards = (x.flip(1) for x in (receptance, output_gradient, raw_decay))
            return _state_behind_zeros(*backwards, dtype, None, None, backend)
        log_decay = _log_decay(raw_decay, dtype)
        since_front = F.pad(log_decay[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1)
        return _outer_sum(receptance.to(dtype) * torch.exp(since_front), output_gradient.to(dtype))


def carry(
    state: Float[Tensor, "B H N N"], decay: Float[Tensor, "B H N"], written: Float[Tensor, "B H N N"]
) -> Float[Tensor, "B H N N"]:
    """decay · state + written: the state behind a slice from the one before, or a gradient before from that behind."""
    # Not by a product with 0: a state that is not finite would outlive its document.
    return torch.where(decay[..., None] == 0.0, written, decay[..., None] * state + written)


def _log_decay(raw_decay: Tensor, dtype: torch.dtype) -> Tensor:
    # Minus infinity is as good as any sum that is exponentiated to 0: nothing is subtracted from it.
    return -torch.exp(raw_decay.to(dtype))


def _is_compiled(key: Tensor, backend: str | None) -> bool:
    return choose_backend(backend, device=key.device, head_size=key.shape[-1], dtype=key.dtype) in COMPILED


def _state_behind_zeros(
    key: Tensor,
    value: Tensor,
    raw_decay: Tensor,
    dtype: torch.dtype,
    starts: Tensor | None,
    start_state: Tensor | None,
    backend: str | None,
) -> Tensor:
    rows, _, heads, head_size = key.shape
    zeros = key.new_zeros(rows, heads, head_size, head_size, dtype=dtype)
    # Nobody reads the output: any receptance and any bonus will do.
    return wkv6_from_raw_decay(
        key,
        key,
        value,
        raw_decay,
        zeros[0, :, 0],
        zeros,
        starts=starts,
        start_state=start_state,
        backend=backend,
    )[1]


def _products_of_writes(
    key: Tensor,
    value: Tensor,
    raw_decay: Tensor,
    dtype: torch.dtype,
    starts: Tensor | None,
    start_state: Tensor | None,
) -> Tensor:
    """What is written, as one matrix product over time.

    Every factor is the exponential of a sum of log decays, all of one sign; nothing is divided by a decay.
    """
    log_decay = _log_decay(raw_decay, dtype)
    until_end = F.pad(log_decay[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # [B, T, H, N], of later tokens
    left = key.to(dtype) * torch.exp(until_end)
    if starts is None:
        return _outer_sum(left, value.to(dtype))
    num_starts = starts.cumsum(1)
    is_of_earlier_document = num_starts < num_starts[:, -1:]
    written = _outer_sum(left.masked_fill(is_of_earlier_document[:, :, None, None], 0.0), value.to(dtype))
    if start_state is None:
        return written
    rows = torch.arange(starts.shape[0], device=starts.device)
    # Of the row's last start; of its first token where there is none.
    since_start = torch.exp((until_end + log_decay)[rows, is_of_earlier_document.sum(1)])  # [B, H, N]
    left_of_start_state = since_start[..., None] * start_state.to(dtype)
    return written + left_of_start_state.masked_fill(~starts.any(1)[:, None, None, None], 0.0)


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """Σ_t left_t right_t^T, [B, H, N, N]."""
    return left.permute(0, 2, 3, 1) @ right.transpose(1, 2)
