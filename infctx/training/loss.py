"""Next-token loss as one weighted sum, without ever holding the logits of all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infctx.model.linear import Linear
from infctx.shapes import Activations, Scalar, Targets, TokenWeights
from infctx_kernels import linear_cross_entropy

# Logits alive at once: 2**24 float32 values are 64 MB, 256 tokens of a World vocabulary.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """What the training loss of a token is, beside its cross entropy; all of it is 0 in a validation.

    Attributes:
        l2_wrap: weight of half the square of the largest logit.
        z_loss: weight of the square of the log-sum-exp of the logits. Source: PaLM, arXiv 2204.02311, section 5.
        min_token_loss: tokens whose cross entropy, in nats, is below this have no gradient; their loss is as ever.
    """

    l2_wrap: float = 0.0
    z_loss: float = 0.0
    min_token_loss: float | None = None

    @property
    def needs_logits(self) -> bool:
        """Whether there is something the loss that is fused with the head cannot compute."""
        return self.z_loss != 0.0 or self.min_token_loss is not None


CROSS_ENTROPY = LossTerms()


def weighted_loss_sum(
    hidden: Activations,
    head: nn.Module,
    targets: Targets,
    loss_weight: TokenWeights,
    *,
    vocab_size: int,
    terms: LossTerms = CROSS_ENTROPY,
    backend: str | None = None,
    with_token_losses: bool = False,
    most_tokens: int = 0,
) -> Scalar | tuple[Scalar, Float[Tensor, " B*T"]]:
    """Sum over tokens of loss_weight · (cross entropy + l2_wrap / 2 · largest logit² + z_loss · log-sum-exp²), float32
    (or float64).

    Args:
        hidden: what the head is applied to.
        head: [.., C] -> [.., V]. A plain matrix is fused with the loss; anything else (an adapter, parameters that an
            engine gathers when the module is called), and any head with terms that need the logits, is called as a
            module, in pieces, each recomputed in the backward pass.
        most_tokens: on any of the ranks that gather the head together and so have to call it equally often; 0 = here.
        targets: the id each token should predict; any id where the weight is 0.
        loss_weight: weight of the target.
        terms: beside the cross entropy.
        backend: of the fused loss; None = the fastest.
        with_token_losses: give back the terms of the sum too.
    Returns:
        A sum, never a mean: it is divided once, by the weights of the whole step. With token losses a pair: the sum, to
        the same bits, and its terms, weighted, flat [B·T], through which no gradient flows.
    """
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    flat_weight = loss_weight.flatten()
    if is_plain_matrix(head) and not terms.needs_logits:
        return linear_cross_entropy(
            flat_hidden,
            head.weight,
            flat_targets,
            flat_weight,
            l2_wrap=terms.l2_wrap,
            backend=backend,
            with_token_losses=with_token_losses,
        )
    piece = max(1, LOGITS_AT_ONCE // vocab_size)
    num_pieces = -(-max(most_tokens, flat_hidden.shape[0]) // piece)
    if num_pieces == 1:
        loss, token_losses = _piece_loss(head, flat_hidden, flat_targets, flat_weight, terms)
        return (loss, token_losses) if with_token_losses else loss
    parts = zip(*(whole.tensor_split(num_pieces) for whole in (flat_hidden, flat_targets, flat_weight)), strict=True)
    pieces = [checkpoint(_piece_loss, head, *part, terms, use_reentrant=False) for part in parts]
    loss = torch.stack([of_piece for of_piece, _ in pieces]).sum()
    return (loss, torch.cat([of_tokens for _, of_tokens in pieces])) if with_token_losses else loss


def is_plain_matrix(module: nn.Module) -> bool:
    """Whether calling the module is multiplying by its weight, and nothing else happens on the way."""
    if type(module) not in (Linear, nn.Linear) or module.bias is not None or type(module.weight) is not nn.Parameter:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _piece_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, loss_weight: Tensor, terms: LossTerms
) -> tuple[Tensor, Tensor]:
    """The weighted sum, and its terms without a gradient."""
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    cross_entropy = losses = F.cross_entropy(logits, targets, reduction="none")
    if terms.l2_wrap != 0.0:
        losses = losses + 0.5 * terms.l2_wrap * logits.max(dim=-1).values.square()
    if terms.z_loss != 0.0:
        losses = losses + terms.z_loss * logits.logsumexp(dim=-1).square()
    if terms.min_token_loss is not None:
        losses = torch.where(cross_entropy.detach() < terms.min_token_loss, losses.detach(), losses)
    losses = losses * loss_weight.to(losses.dtype)
    return losses.sum(), losses.detach()
