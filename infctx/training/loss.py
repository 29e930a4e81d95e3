"""Next-token loss as one weighted sum, without ever holding the logits of all tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infctx.shapes import Activations, Scalar, Targets, TokenWeights

# Logits alive at once: 2**24 float32 values are 64 MB, 256 tokens of a World vocabulary.
LOGITS_AT_ONCE = 2**24


def weighted_loss_sum(
    hidden: Activations, head: nn.Module, targets: Targets, loss_weight: TokenWeights, *, vocab_size: int
) -> Scalar:
    """Sum over tokens of loss_weight · cross entropy, in float32 (float64 for float64 activations).

    Args:
        hidden: what the head is applied to.
        head: [.., C] -> [.., V]. Called in pieces, each recomputed in the backward pass; called as a module, because
            engines that shard parameters gather them there.
        targets: the id each token should predict; any id where the weight is 0.
        loss_weight: weight of the target.
    Returns:
        A sum, never a mean: it is divided once, by the weights of the whole step.
    """
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    flat_weight = loss_weight.flatten()
    piece = max(1, LOGITS_AT_ONCE // vocab_size)
    if flat_hidden.shape[0] <= piece:
        return _piece_loss(head, flat_hidden, flat_targets, flat_weight)
    pieces = zip(flat_hidden.split(piece), flat_targets.split(piece), flat_weight.split(piece), strict=True)
    losses = [checkpoint(_piece_loss, head, *part, use_reentrant=False) for part in pieces]
    return torch.stack(losses).sum()


def _piece_loss(head: nn.Module, hidden: Tensor, targets: Tensor, loss_weight: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * loss_weight.to(losses.dtype)).sum()
