"""Noise on the embeddings and every term of the loss: the chunked gradient is that of autograd over everything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.data.chunking import RowSlice, chunk_rows
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import ChunkObjective, Window, backward_through_windows, draws_random_numbers
from infctx.training.loss import LossTerms

NUM_TOKENS, ROWS, IDS = 61, 2, 50
NOISE_SEED = 7
Gradients = dict[str, Tensor]


def make_rows() -> list[RowSlice]:
    """Rows with masked stretches and documents that start mid-chunk."""
    numbers = np.random.default_rng(5)
    rows = []
    for _ in range(ROWS):
        weights = (numbers.random(NUM_TOKENS) * (numbers.random(NUM_TOKENS) < 0.7)).astype(np.float32)
        weights[25:34] = 0
        ids = numbers.integers(0, IDS, NUM_TOKENS + 1)
        starts = numbers.random(NUM_TOKENS) < 0.05
        starts[0] = True
        rows.append(RowSlice(tokens=ids[:-1], targets=ids[1:], weights=weights, starts=starts))
    return rows


def stacked(rows: list[RowSlice], name: str) -> Tensor:
    return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))


def whole(model: Finch, terms: LossTerms, noise: Tensor | None, *, window: int) -> tuple[float, Gradients, ModelState]:
    """Loss, gradients and last state by autograd; the state is cut at the end of each window of so many tokens."""
    rows = make_rows()
    model.eval()
    model.zero_grad(set_to_none=True)
    initial = ModelState(*(tensor.clone().requires_grad_() for tensor in model.fresh_state(ROWS).detach()))
    state, pieces = initial, []
    for begin in range(0, NUM_TOKENS, window):
        place = slice(begin, begin + window)
        added = [] if noise is None else [model.embedding.register_forward_hook(lambda *a, p=place: a[2] + noise[:, p])]
        logits, state = model(stacked(rows, "tokens")[:, place], state, starts=stacked(rows, "starts")[:, place])
        for hook in added:
            hook.remove()
        pieces.append(logits)
        last, state = state, state.detach()
    logits = torch.cat(pieces, 1)
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), stacked(rows, "targets"), reduction="none")
    losses = cross_entropy + terms.l2_wrap / 2 * logits.amax(-1).square() + terms.z_loss * logits.logsumexp(-1).square()
    weights = stacked(rows, "weights").double()
    kept = weights if terms.min_token_loss is None else weights * (cross_entropy >= terms.min_token_loss)
    (losses * kept).sum().div(weights.sum()).backward()
    return float((losses * weights).sum().detach()), gradients_of(model), last.detach()


def gradients_of(model: Finch) -> Gradients:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def drawn_noise(model: Finch, chunk_tokens: int, alpha: float) -> Tensor:
    """What is drawn for one chunk after another, as one tensor."""
    largest = alpha / (chunk_tokens * model.config.n_embd) ** 0.5
    lengths = [min(chunk_tokens, NUM_TOKENS - begin) for begin in range(0, NUM_TOKENS, chunk_tokens)]
    parts = [torch.rand(ROWS, length, model.config.n_embd, dtype=torch.float64) for length in lengths]
    return (2 * torch.cat(parts, 1) - 1) * largest


@pytest.mark.parametrize("version", ["6", "5.2"])
@pytest.mark.parametrize(
    ("chunk_tokens", "window", "is_thinned", "is_recomputed"),
    [(7, "document", False, False), (7, "document", True, True), (16, 2, False, False), (61, "document", False, False)],
)
def test_noise_and_every_term(
    make_finch: Callable[..., Finch],
    version: str,
    chunk_tokens: int,
    window: Window,
    is_thinned: bool,
    is_recomputed: bool,
) -> None:
    model = make_finch(version, dtype=torch.float64)
    terms = LossTerms(l2_wrap=0.01, z_loss=0.02, min_token_loss=3.5)
    torch.manual_seed(NOISE_SEED)
    noise = drawn_noise(model, chunk_tokens, alpha=5.0)
    random_after = torch.get_rng_state()
    reach = NUM_TOKENS if window == "document" else window * chunk_tokens
    loss, expected, state = whole(model, terms, noise, window=reach)
    for changed, others in (("noise", (terms, None)), ("terms", (LossTerms(), noise))):
        _, other, _ = whole(model, *others, window=reach)
        assert worst(other, expected) > 0.01, f"this test could not tell that there are no {changed}"

    model.train()
    model.recompute_layers(is_recomputed)
    model.add_embedding_noise(5.0, chunk_tokens=chunk_tokens)
    assert draws_random_numbers(model)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(NOISE_SEED)
    sequence = chunk_rows(make_rows(), chunk_tokens=chunk_tokens)
    result = backward_through_windows(
        ChunkObjective(model, terms=terms),
        sequence.chunks,
        model.fresh_state(ROWS).detach(),
        window=window,
        weight_total=sequence.weight_total,
        keeps_random_state=draws_random_numbers(model),
        boundaries=BoundaryPlan(is_thinned=is_thinned),
    )
    assert worst(gradients_of(model), expected) < 1e-10
    assert float(result.loss_sum) == pytest.approx(loss, rel=1e-12)
    for found, wanted in zip(result.state, state, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert float(result.largest_difference) == 0.0, "sweep 2 had other numbers than sweep 1"
    assert torch.equal(torch.get_rng_state(), random_after), "each number is drawn once, as far as the next step sees"


def worst(found: Gradients, expected: Gradients) -> float:
    return max(float((found[name] - wanted).norm() / wanted.norm()) for name, wanted in expected.items())


def test_noise_is_in_training_only_and_of_the_stated_size(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    seen: list[Tensor] = []
    model.input_norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    tokens = torch.randint(IDS, (2, 200))
    plain = model.embedding(tokens).detach()
    model.add_embedding_noise(5.0, chunk_tokens=128)
    model(tokens)
    model.train()
    model(tokens)
    assert torch.equal(seen[0], plain)
    noise = seen[1] - plain
    largest = 5.0 / (128 * 32) ** 0.5
    assert 0.99 * largest < noise.max() <= largest * 1.001
    assert -1.001 * largest <= noise.min() < -0.99 * largest
    # Of a uniform distribution.
    assert float(noise.std()) == pytest.approx(largest / 3**0.5, rel=0.02)
    model.add_embedding_noise(0.0, chunk_tokens=128)
    assert not draws_random_numbers(model)
