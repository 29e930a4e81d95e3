"""Draws against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from infctx.errors import CheckpointError, InfctxError
from infctx.generation.sampling import Sampler, SamplingOptions

VOCAB = 700
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


def probabilities(logits: list[float], *, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """What is drawn from, by the words of the documentation, one token after another."""
    largest = max(logits)
    weights = {place: math.exp((value - largest) / temperature) for place, value in enumerate(logits)}
    order = sorted(weights, key=lambda place: -weights[place])
    if top_k:
        order = order[:top_k]
    total, kept, so_far = sum(weights[place] for place in order), [], 0.0
    for place in order:
        if kept and so_far >= top_p:
            break
        kept.append(place)
        so_far += weights[place] / total
    total = sum(weights[place] for place in kept)
    return {place: weights[place] / total for place in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 0, 0.5),
        (2.0, 0, 0.999),
        (1.0, 5, 1.0),
        (1.5, 20, 0.6),
        (1.0, 0, 0.0),
        (1.0, 900, 0.3),
    ],
)
def test_frequencies_are_the_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    expected = probabilities(LOGITS.tolist(), temperature=temperature, top_k=top_k, top_p=top_p)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    sampler = Sampler(options, seed=0, usable_ids=VOCAB)
    draws = 3000
    counts: dict[int, int] = {}
    for _ in range(draws):
        token = sampler.draw(LOGITS)
        counts[token] = counts.get(token, 0) + 1
    assert counts.keys() <= expected.keys()
    for token, chance in expected.items():
        # Five standard deviations, and one for a chance too small to have any.
        slack = 5 * math.sqrt(chance * (1 - chance) / draws) + 1 / draws
        assert abs(counts.get(token, 0) / draws - chance) <= slack, token


def test_a_nucleus_of_more_tokens_than_are_looked_at_first() -> None:
    for num_ids, num_draws in ((1000, 3000), (10_000, 6000)):
        flat = torch.zeros(num_ids)
        sampler = Sampler(SamplingOptions(top_p=0.9), seed=0, usable_ids=num_ids)
        drawn = {sampler.draw(flat) for _ in range(num_draws)}
        assert 0.4 * num_ids < len(drawn) <= 0.9 * num_ids


def test_penalties_by_formula() -> None:
    """Taken before the draw; the count of a token grows by one, and all counts have decayed then."""
    options = SamplingOptions(temperature=0, presence_penalty=0.4, frequency_penalty=0.7, penalty_decay=0.9)
    sampler = Sampler(options, seed=0, usable_ids=VOCAB)
    counts: dict[int, float] = {}
    logits = (LOGITS / 4).tolist()
    for _ in range(60):
        penalised = [value - (0.4 + 0.7 * counts[i] if i in counts else 0.0) for i, value in enumerate(logits)]
        expected = max(range(VOCAB), key=lambda i: penalised[i])
        assert sampler.draw(LOGITS / 4) == expected
        counts = {i: count * 0.9 for i, count in counts.items()}
        counts[expected] = counts.get(expected, 0.0) + 1.0
    assert len(counts) > 5


def test_seeds() -> None:
    def text(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(), seed=seed, usable_ids=VOCAB)
        return [sampler.draw(LOGITS) for _ in range(20)]

    assert text(3) == text(3) != text(4)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1e-30}, {"top_p": 0.0}, {"top_k": 1}])
def test_the_most_probable(options: dict[str, float]) -> None:
    sampler = Sampler(SamplingOptions(**options), seed=9, usable_ids=VOCAB)
    assert {sampler.draw(LOGITS) for _ in range(20)} == {int(LOGITS.argmax())}


def test_rows_without_a_token_are_never_drawn() -> None:
    logits = torch.full((60,), -5.0)
    logits[50:] = 100.0
    sampler = Sampler(SamplingOptions(temperature=50.0), seed=0, usable_ids=50)
    assert all(sampler.draw(logits) < 50 for _ in range(200))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    logits = LOGITS.clone()
    logits[7] = value
    with pytest.raises(CheckpointError, match="not finite"):
        Sampler(SamplingOptions(), seed=0, usable_ids=VOCAB).draw(logits)
    # Beyond the tokens nobody looks.
    Sampler(SamplingOptions(), seed=0, usable_ids=7).draw(logits)


@pytest.mark.parametrize(
    "options",
    [{"temperature": math.nan}, {"temperature": -1.0}, {"top_p": 1.5}, {"top_k": -1}, {"penalty_decay": 1.1}],
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InfctxError, match=next(iter(options)).replace("_", "-")):
        SamplingOptions(**options)
