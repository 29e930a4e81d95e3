"""Loss by distance: which tokens count, by counting what each sees, and their losses with and without the far past."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from infctx.data.document import Document
from infctx.evaluation.by_distance import is_at_distance, measure_by_distance
from infctx.model.finch import Finch

MakeFinch = Callable[..., Finch]


def make_documents(*lengths: int) -> list[Document]:
    generator = np.random.default_rng(3)
    return [
        Document(
            tokens=generator.integers(50, size=length).astype(np.uint16),
            weights=np.concatenate([[0], generator.choice([0.0, 0.5, 1.0], size=length - 1)]).astype(np.float32),
            origin=f"documents.jsonl:{number}",
        )
        for number, length in enumerate(lengths, start=1)
    ]


def token_losses(model: Finch, ids: torch.Tensor) -> np.ndarray:
    """Of every token but the first, all of it read in one piece."""
    with torch.no_grad():
        logits, _ = model(ids[None])
    return F.cross_entropy(logits[0, :-1], ids[1:], reduction="none").numpy()


def by_hand(model: Finch, documents: list[Document], distance: int) -> tuple[float, float, float]:
    """Sums of the losses with the near past alone and with everything, and the weight, token after token."""
    near = far = total = 0.0
    for document in documents:
        ids = torch.from_numpy(document.tokens.astype(np.int64))
        whole = token_losses(model, ids)
        step = 2 * distance
        # Each part with the token behind it, which its last token predicts.
        parts = {begin: token_losses(model, ids[begin : begin + step + 1]) for begin in range(0, len(ids) - 1, step)}
        for position in range(1, len(document)):
            begin = (position - 1) // step * step
            num_seen = position - begin
            if begin == 0 or not distance <= num_seen < step:
                continue
            weight = float(document.weights[position])
            near += weight * parts[begin][num_seen - 1]
            far += weight * whole[position - 1]
            total += weight
    return near, far, total


def test_the_losses_are_those_of_tokens_that_see_so_much(make_finch: MakeFinch) -> None:
    model, documents = make_finch(dtype=torch.float64, n_layer=2), make_documents(70, 33, 9, 50)
    found = measure_by_distance(model, documents, distances=(4, 16, 40), chunk_tokens=13, rows=2)
    for one in found[:2]:
        near, far, total = by_hand(model, documents, one.distance)
        assert one.weight == pytest.approx(total)
        assert one.near == pytest.approx(near / total, rel=1e-10)
        assert one.far == pytest.approx(far / total, rel=1e-10)
        assert one.gain == pytest.approx((near - far) / total, rel=1e-6)
        assert one.interval is not None
        assert one.interval[0] <= one.gain <= one.interval[1]
    # No document has 80 tokens and as many again.
    assert (found[2].near, found[2].far, found[2].gain, found[2].weight) == (None, None, None, 0.0)


def test_no_token_counts_that_sees_the_same_either_way() -> None:
    positions = np.arange(1, 41)
    # d = 4: the state is set back at 8, 16, 24, 32; tokens 9..16 see 1..8 of their part.
    assert positions[is_at_distance(positions, 4)].tolist() == [
        12,
        13,
        14,
        15,
        20,
        21,
        22,
        23,
        28,
        29,
        30,
        31,
        36,
        37,
        38,
        39,
    ]
