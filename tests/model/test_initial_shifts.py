"""Tuned vectors in the place of the token before a document's first: packed equals separate, gradients, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import infctx
from infctx.checkpoint.model_file import read_model_file
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from infctx.model.state import ModelState

VERSIONS = ["6", "5.2"]
LENGTHS = [5, 1, 29, 2]


@pytest.fixture(params=VERSIONS)
def model(request: pytest.FixtureRequest, make_finch: Callable[..., Finch]) -> Finch:
    return make_finch(request.param, n_layer=2, dtype=torch.float64, has_initial_state=True, has_initial_shifts=True)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of the same lengths, other tokens; where their documents start."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, sum(LENGTHS)), generator=generator)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, [0, 5, 6, 35]] = True
    return tokens, starts


def with_previous_token(model: Finch, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one document by putting each layer's vectors where its shift state lies, and no starts at all."""
    blocks = model.blocks
    state = ModelState(
        torch.stack([block.time_mix.initial_state for block in blocks])[:, None],
        torch.stack([block.time_mix.initial_shift for block in blocks])[:, None],
        torch.stack([block.channel_mix.initial_shift for block in blocks])[:, None],
    )
    return model(tokens, state)[0]


def test_packed_documents_equal_separate_ones(model: Finch) -> None:
    tokens, starts = batch()
    unrelated = ModelState(*(torch.randn_like(t) for t in model.fresh_state(2)))
    packed, state = model(tokens, unrelated, starts=starts)
    for row in range(2):
        alone = [with_previous_token(model, part[None]) for part in tokens[row].split(LENGTHS)]
        torch.testing.assert_close(packed[row : row + 1], torch.cat(alone, 1), rtol=1e-10, atol=1e-10)
    last, expected = model(tokens[:, -LENGTHS[-1] :])
    torch.testing.assert_close(packed[:, -LENGTHS[-1] :], last, rtol=1e-10, atol=1e-10)
    for found, other in zip(state, expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10)
    advanced = model.advance(tokens, unrelated, starts=starts)
    assert all(torch.equal(found, other) for found, other in zip(advanced, state, strict=True))


@pytest.mark.parametrize("is_packed", [True, False])
def test_chunked_gradient_equals_autograd_over_each_document_alone(model: Finch, is_packed: bool) -> None:
    tokens, starts = batch()
    if not is_packed:
        tokens, starts = tokens[:, :29], None
    lengths = LENGTHS if is_packed else [29]
    losses, count = [], 0
    for row in tokens:
        for document in row.split(lengths):
            logits = with_previous_token(model, document[None])[0]
            losses.append(F.cross_entropy(logits[:-1], document[1:], reduction="sum") if len(document) > 1 else 0.0)
            count += len(document) - 1
    names = dict(model.named_parameters())
    expected = torch.autograd.grad(sum(losses) / count, list(names.values()))
    infctx.backward_through_chunks(model, tokens, starts=starts, chunk_tokens=7)
    for (name, parameter), reference in zip(names.items(), expected, strict=True):
        assert float(reference.norm()) > 0, name
        assert float((parameter.grad - reference).norm() / reference.norm()) < 1e-10, name


def test_float32_is_float64_rounded(model: Finch) -> None:
    tokens, starts = batch()
    exact, _ = model(tokens, starts=starts)
    torch.testing.assert_close(model.float()(tokens, starts=starts)[0].double(), exact, rtol=0, atol=1e-4)


def test_safetensors_keeps_them_and_a_pth_is_refused_unless_they_are_zero(model: Finch, tmp_path: Path) -> None:
    model = model.float()
    tokens, _ = batch()
    expected, _ = model(tokens)
    infctx.save_model(model, tmp_path / "m.safetensors", format="safetensors", dtype=torch.float32)
    loaded = infctx.load_model(tmp_path / "m.safetensors")
    assert torch.equal(loaded(tokens)[0], expected)
    assert torch.equal(loaded.blocks[1].channel_mix.initial_shift, model.blocks[1].channel_mix.initial_shift)
    with pytest.raises(CheckpointError, match=r"4 tuned token-shift start vectors.*safetensors"):
        infctx.save_model(model, tmp_path / "m.pth", dtype=torch.float32)
    assert not (tmp_path / "m.pth").exists()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("initial_shift"):
                parameter.zero_()
    infctx.save_model(model, tmp_path / "m.pth", dtype=torch.float32)
    plain = read_model_file(tmp_path / "m.pth").model
    assert plain.has_initial_state
    assert not plain.has_initial_shifts
    assert torch.equal(plain(tokens)[0], model(tokens)[0])
