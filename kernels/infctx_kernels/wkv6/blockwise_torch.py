"""The recurrence in blocks, by recursive halving: exact for every decay, on any device, with torch alone.

Inside a block, token i reads token j < i through the decays between them. Cut the block in halves: then every such pair
across the cut is (sum of decays from j to the cut) + (sum from the cut to i), so that

    scores[second half, first half] = (r · exp(prefix)) (k · exp(suffix))^T

and the same again inside each half. Prefixes and suffixes grow from the bottom up by adding the other half's total.
No exponent is ever positive and none is a difference of two long sums, which is where chunked forms lose their digits
(or overflow, and are then given a clamp on the decay that changes the model).

A document that starts inside a block is a cut of infinite decay before its first token, and reads from the start state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TOKENS = 32
# exp of either is 0 in float64 too, and sums of a block of them stay finite: no inf - inf, no 0 * inf in the backward.
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
    block = min(BLOCK_TOKENS, 1 << (num_tokens - 1).bit_length())
    # Padding tokens read nothing, write nothing (key 0) and do not decay (log 0): the state stays the last token's.
    padding = -num_tokens % block
    num_blocks = (num_tokens + padding) // block

    def in_blocks(x: Tensor) -> Tensor:  # [B, T, H, N] -> [B, H, blocks, block, N]
        x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        return x.view(rows, num_blocks, block, heads, head_size).permute(0, 3, 1, 2, 4)

    r, k, v = in_blocks(receptance), in_blocks(key), in_blocks(value)
    log_w = in_blocks(log_decay.clamp(min=SMALLEST_LOG_DECAY))
    starts_in_blocks = None if starts is None else F.pad(starts, (0, padding)).view(rows, num_blocks, block)

    output = (r * k * bonus[:, None, None, :]).sum(-1, keepdim=True) * v
    within, prefix, suffix, total = _halves(r, k, v, log_w, starts_in_blocks)
    output = output + within
    written = (k * torch.exp(suffix)).transpose(-1, -2) @ v  # [B, H, blocks, N, N]
    if starts_in_blocks is not None and start_state is not None:
        reads, rest = _reads_of_start_state(r, log_w, starts_in_blocks, start_state)
        output, written = output + reads, written + rest

    block_decay = torch.exp(total)[..., None]
    block_states = []
    for i in range(num_blocks):
        block_states.append(state)
        state = block_decay[:, :, i] * state + written[:, :, i]
    output = output + (r * torch.exp(prefix)) @ torch.stack(block_states, dim=2)
    output = output.permute(0, 2, 3, 1, 4).reshape(rows, num_blocks * block, heads, head_size)
    return output[:, :num_tokens], state


def _halves(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each token reads from earlier tokens of its block, and the block's decay sums.

    Returns: reads [.., block, N]; prefix [.., block, N], the log decay from the block's front to each token; suffix,
    from behind each token to the block's end; total [.., N]. A document's start is in all three as DOCUMENT_CUT.
    """
    lead, block, head_size = r.shape[:-2], r.shape[-2], r.shape[-1]
    cut = torch.zeros_like(log_w[..., :1])
    if starts is not None:
        cut = cut.masked_fill(starts[:, None, :, :, None], DOCUMENT_CUT)
    # The path into token i crosses i's own cut but not i's own decay; the path out of j crosses neither of j's.
    prefix = cut.expand_as(log_w)
    suffix = torch.zeros_like(log_w)
    total = log_w + cut
    reads = torch.zeros_like(v)
    half = 1
    while half < block:
        pairs = (*lead, block // (2 * half), 2, half, head_size)
        _, r_second = r.reshape(pairs).unbind(-3)
        k_first, _ = k.reshape(pairs).unbind(-3)
        v_first, _ = v.reshape(pairs).unbind(-3)
        prefix_first, prefix_second = prefix.reshape(pairs).unbind(-3)
        suffix_first, suffix_second = suffix.reshape(pairs).unbind(-3)
        total_first, total_second = total.reshape(*lead, block // (2 * half), 2, head_size).unbind(-2)

        scores = (r_second * torch.exp(prefix_second)) @ (k_first * torch.exp(suffix_first)).transpose(-1, -2)
        late_reads = (scores @ v_first).unsqueeze(-3)
        reads = reads + F.pad(late_reads, (0, 0, 0, 0, 1, 0)).reshape(reads.shape)

        prefix = torch.stack([prefix_first, prefix_second + total_first[..., None, :]], dim=-3).reshape(reads.shape)
        suffix = torch.stack([suffix_first + total_second[..., None, :], suffix_second], dim=-3).reshape(reads.shape)
        total = total_first + total_second
        half *= 2
    return reads, prefix, suffix, total.reshape(*lead, head_size)


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
