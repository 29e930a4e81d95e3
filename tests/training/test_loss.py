"""The loss of a chunk: fused with the head or through the module, with the penalty on the largest logit or without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.model.linear import Linear
from infctx.training import loss as module
from infctx.training.bptt import ChunkObjective
from infctx.training.loss import LossTerms, is_plain_matrix, weighted_loss_sum

IDS, CHANNELS = 50, 24


def make_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, CHANNELS, generator=generator, dtype=torch.float64)
    weight = torch.randn(IDS, CHANNELS, generator=generator, dtype=torch.float64)
    targets = torch.randint(IDS, (2, 9), generator=generator)
    loss_weight = torch.rand(2, 9, generator=generator, dtype=torch.float64)
    loss_weight[0, 3:5] = 0.0
    return hidden, weight, targets, loss_weight


def expected_terms(hidden: Tensor, weight: Tensor, targets: Tensor, loss_weight: Tensor, terms: LossTerms) -> Tensor:
    """By the formulas; what is below the threshold has the same value and no gradient."""
    logits = (hidden @ weight.t()).flatten(0, 1)
    log_total = logits.exp().sum(-1).log()
    cross_entropy = log_total - logits.gather(1, targets.flatten()[:, None])[:, 0]
    losses = cross_entropy + terms.l2_wrap / 2 * logits.amax(-1).square() + terms.z_loss * log_total.square()
    if terms.min_token_loss is not None:
        has_gradient = (cross_entropy >= terms.min_token_loss).double().detach()
        losses = losses * has_gradient + losses.detach() * (1 - has_gradient)
    return losses * loss_weight.flatten()


class Doubled(nn.Module):
    """A head that is more than its weight, as one with an adapter is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() * 2


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(
    "terms",
    [
        LossTerms(),
        LossTerms(l2_wrap=0.1),
        LossTerms(z_loss=0.1),
        LossTerms(min_token_loss=8.0),
        LossTerms(l2_wrap=0.1, z_loss=0.1, min_token_loss=8.0),
    ],
)
@pytest.mark.parametrize("is_plain", [True, False])
def test_loss_and_gradients(is_plain: bool, terms: LossTerms, pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", 4 * IDS)
    hidden, weight, targets, loss_weight = make_case()
    if is_plain:
        head = Linear(CHANNELS, IDS).double()
        with torch.no_grad():
            head.weight.copy_(weight)
    else:
        head = Doubled(weight)
    hidden.requires_grad_()
    loss = weighted_loss_sum(hidden, head, targets, loss_weight, vocab_size=IDS, terms=terms)
    found = torch.autograd.grad(loss, [hidden, head.weight])
    weight.requires_grad_()
    expected = expected_terms(hidden, weight, targets, loss_weight, terms).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0.0)
    of_hidden, of_weight = torch.autograd.grad(expected, [hidden, weight])
    torch.testing.assert_close(found[0], of_hidden, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[1], of_weight * (1 if is_plain else 2), rtol=1e-11, atol=1e-13)

    fixed = {"vocab_size": IDS, "terms": terms, "with_token_losses": True}
    again, of_tokens = weighted_loss_sum(hidden, head, targets, loss_weight, **fixed)
    assert torch.equal(again, loss)
    assert all(
        torch.equal(*pair) for pair in zip(torch.autograd.grad(again, [hidden, head.weight]), found, strict=True)
    )
    assert not of_tokens.requires_grad
    torch.testing.assert_close(
        of_tokens, expected_terms(hidden, weight, targets, loss_weight, terms), rtol=1e-13, atol=0
    )


def test_which_heads_are_plain() -> None:
    head = Linear(4, 3)
    assert is_plain_matrix(head)
    assert is_plain_matrix(nn.Linear(4, 3, bias=False))
    assert not is_plain_matrix(nn.Linear(4, 3))
    assert not is_plain_matrix(Doubled(torch.zeros(3, 4)))
    # An engine that gathers parameters when a module is called says so with a hook.
    head.register_forward_pre_hook(lambda *_: None)
    assert not is_plain_matrix(head)


@pytest.mark.parametrize("name", ["l2_wrap", "z_loss"])
def test_penalties_are_trained_and_not_validated(name: str) -> None:
    model = Finch(new_config(version="6", n_layer=2, n_embd=16, vocab_size=IDS, head_size=8)).double()
    initialise_(model, seed=0)
    tokens = torch.randint(IDS, (1, 12), generator=torch.Generator().manual_seed(0))
    logits, _ = model(tokens[:, :-1])
    weights = torch.ones(1, 11, dtype=torch.float64)
    cross_entropy = F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum")
    penalty = {"l2_wrap": logits.amax(-1).square() / 2, "z_loss": logits.logsumexp(-1).square()}[name].sum()
    objective = ChunkObjective(model, terms=LossTerms(**{name: 0.25}))
    state = model.fresh_state(1)
    losses = {}
    for is_training in (True, False):
        model.train(is_training)
        losses[is_training], *_ = objective(tokens[:, :-1], tokens[:, 1:], weights, None, *state, with_loss=True)
    torch.testing.assert_close(losses[True], cross_entropy + 0.25 * penalty)
    torch.testing.assert_close(losses[False], cross_entropy)
    assert bool(penalty > 0)


def test_a_target_that_is_no_id_is_named() -> None:
    model = Finch(new_config(version="6", n_layer=1, n_embd=16, vocab_size=IDS, head_size=8))
    initialise_(model, seed=0)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    targets = torch.tensor([[1, 2, IDS, 3]])
    objective = ChunkObjective(model)
    state = model.fresh_state(1)
    with pytest.raises(ValueError, match=f"got {IDS} at token 2"):
        objective(tokens, targets, torch.ones(1, 4), None, *state, with_loss=True)
