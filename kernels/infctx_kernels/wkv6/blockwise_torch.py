"""The recurrence in blocks, by recursive halving: exact for every decay, on any device, with torch alone.

Inside a block, token i reads token j < i through the decays between them. Cut the block in halves: then every such pair
across the cut decays from j to the cut and from the cut to i, so that

    scores[second half, first half] = (r · decay since the cut) (k · decay up to the cut)^T

and the same again inside each half. Going from halves of one token upwards, r and k only have to be multiplied by the
decay of the other half at each level. No factor is ever above 1, nothing is divided by a decay and no exponent is a
difference of two long sums, which is where chunked forms lose their digits (or overflow, and are then given a clamp on
the decay that changes the model).

A document that starts inside a block is a cut of infinite decay before its first token, and reads from the start state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TOKENS = 32
# exp of either is 0 in float64 too, and sums of a block of them stay finite: no 0 · inf in the backward pass.
SMALLEST_LOG_DECAY = -1.0e5
DOCUMENT_CUT = -1.0e6


def wkv6_blockwise(
    receptance: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    starts: Tensor | None,
    start_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence in the state's dtype; shapes as in `op.wkv6`, all tensors already in that dtype."""
    rows, num_tokens, heads, head_size = receptance.shape
    if starts is not None:
        # Not by a product with 0: a state that is not finite would stay.
        fresh = torch.zeros_like(state) if start_state is None else start_state.expand_as(state)
        state = torch.where(starts[:, 0, None, None, None], fresh, state)
    block = min(BLOCK_TOKENS, 1 << (num_tokens - 1).bit_length())
    # Padding tokens read nothing, write nothing (key 0) and do not decay (log 0): the state stays the last token's.
    padding = -num_tokens % block
    num_blocks = (num_tokens + padding) // block

    def in_blocks(x: Tensor) -> Tensor:  # [B, T, H, N] -> [B, H, blocks, block, N]
        x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        # Contiguous: every level reshapes these, and would copy them each time.
        return x.view(rows, num_blocks, block, heads, head_size).permute(0, 3, 1, 2, 4).contiguous()

    r, k, v = in_blocks(receptance), in_blocks(key), in_blocks(value)
    log_w = in_blocks(log_decay.clamp(min=SMALLEST_LOG_DECAY))
    starts_in_blocks = None if starts is None else F.pad(starts, (0, padding)).view(rows, num_blocks, block)

    own = (r * k * bonus[:, None, None, :]).sum(-1, keepdim=True) * v
    reads, since_front, until_end, total = _halves(r, k, v, log_w, starts_in_blocks)
    output = own + reads
    written = until_end.transpose(-1, -2) @ v  # [B, H, blocks, N, N]
    if starts_in_blocks is not None and start_state is not None:
        start_reads, rest = _reads_of_start_state(r, log_w, starts_in_blocks, start_state)
        output, written = output + start_reads, written + rest

    block_decay = torch.exp(total)[..., None]
    block_states = []
    for i in range(num_blocks):
        block_states.append(state)
        state = block_decay[:, :, i] * state + written[:, :, i]
    output = output + since_front @ torch.stack(block_states, dim=2)
    output = output.permute(0, 2, 3, 1, 4).reshape(rows, num_blocks * block, heads, head_size)
    return output[:, :num_tokens], state


def _halves(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each token reads from earlier tokens of its block, and what ties the block to its neighbours.

    Returns: reads [.., block, N]; r times the decay from the block's front to each token, and k times the decay from
    behind each token to the block's end, both [.., block, N]; the block's whole log decay [.., N].
    """
    lead, block, head_size = r.shape[:-2], r.shape[-2], r.shape[-1]
    # The way into token i crosses i's own cut but not i's own decay; the way out of j crosses neither of j's.
    total = log_w
    if starts is not None:
        cut = starts[:, None, :, :, None]
        r, total = r.masked_fill(cut, 0.0), log_w.masked_fill(cut, DOCUMENT_CUT)
    reads = torch.zeros_like(v)
    half = 1
    while half < block:
        pairs = (*lead, block // (2 * half), 2, half, head_size)
        r, k, reads = r.reshape(pairs), k.reshape(pairs), reads.reshape(pairs)
        scores = r[..., 1, :, :] @ k[..., 0, :, :].transpose(-1, -2)
        late_reads = scores @ v.reshape(pairs)[..., 0, :, :]
        reads = reads + F.pad(late_reads.unsqueeze(-3), (0, 0, 0, 0, 1, 0))

        totals = total.reshape(*lead, block // (2 * half), 2, head_size)
        decay_first, decay_second = torch.exp(totals).unbind(-2)
        untouched = torch.ones_like(decay_first)
        r = r * torch.stack([untouched, decay_first], dim=-2)[..., None, :]
        k = k * torch.stack([decay_second, untouched], dim=-2)[..., None, :]
        total = totals.sum(-2)
        half *= 2
    in_block = (*lead, block, head_size)
    return reads.reshape(in_block), r.reshape(in_block), k.reshape(in_block), total.reshape(*lead, head_size)


def _reads_of_start_state(r: Tensor, log_w: Tensor, starts: Tensor, start_state: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens read from the start state of a document that began in their block, and what is left of it at the end.

    Returns: reads [B, H, blocks, block, N] and rest [B, H, blocks, N, N].
    """
    block = starts.shape[-1]
    document = starts.cumsum(-1)  # 0 = the document that was running when the block began
    same_document = document[..., :, None] == document[..., None, :]
    before = torch.ones(block, block, dtype=torch.bool, device=r.device).tril(-1)
    since_start = (same_document & before).to(r.dtype)[:, None] @ log_w  # [B, H, blocks, block, N]
    began_here = (document > 0)[:, None, :, :, None]
    reads = torch.where(began_here, r * torch.exp(since_start), 0.0) @ start_state[:, None]
    at_end = torch.exp(since_start[..., -1, :] + log_w[..., -1, :])
    rest = torch.where(began_here[..., -1, :], at_end, 0.0)[..., None] * start_state[:, None]
    return reads, rest
