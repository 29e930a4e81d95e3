"""Growth, merges and vocabularies of Finch-C2 and of models with attention: right, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.checkpoint.model_file import build_model, tensors_of
from infctx.errors import CheckpointError
from infctx.export.catalog import save_model
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors
from infctx.surgery.grow import grow_depth, grow_ranks
from infctx.surgery.merge import merge_models
from infctx.surgery.vocabulary import resize_vocabulary

Make = Callable[..., Finch]
TOKENS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(3))
WITH_ATTENTION = ["goldfinch", "gptalpha"]


def named(model: Finch, name: str = "mine.pth") -> ModelTensors:
    return dataclasses.replace(tensors_of(model), origin=name)


def test_wider_ranks_of_a_finch_c2(make_finch: Make) -> None:
    model = make_finch("6c2", dtype=torch.float64)
    grown = build_model(grow_ranks(tensors_of(model), lerp_rank=7, decay_rank=9), dtype=torch.float64)
    assert (grown.config.lerp_rank, grown.config.decay_rank, grown.config.value_rank) == (7, 9, 64)
    torch.testing.assert_close(grown(TOKENS)[0], model(TOKENS)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("version", WITH_ATTENTION)
def test_models_with_attention_do_not_grow(make_finch: Make, version: str) -> None:
    source = named(make_finch(version))
    name = source.config.name
    with pytest.raises(CheckpointError, match=rf"mine\.pth: expected a model without attention, found a {name}.*--to"):
        grow_depth(source, num_layers=6)
    with pytest.raises(CheckpointError, match=rf"mine\.pth: expected a Finch or a Finch-C2, found a {name}.*--to"):
        grow_ranks(source, lerp_rank=50)


@pytest.mark.parametrize("version", ["6c2", *WITH_ATTENTION])
def test_another_vocabulary(make_finch: Make, version: str) -> None:
    """The embedding is also what GOLD makes its keys and values of, by id."""
    model = make_finch(version, dtype=torch.float64)
    larger = build_model(resize_vocabulary(tensors_of(model), 60), dtype=torch.float64)
    expected, state = model(TOKENS)
    found, our_state = larger(TOKENS)
    # A matrix of more columns is multiplied in another order.
    torch.testing.assert_close(found[..., :50], expected, rtol=0, atol=1e-12)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(our_state, state, strict=True))
    smaller = build_model(resize_vocabulary(tensors_of(model), 45, drops_rows=True), dtype=torch.float64)
    kept = TOKENS.clamp(max=44)
    torch.testing.assert_close(smaller(kept)[0], model(kept)[0][..., :45], rtol=0, atol=1e-12)


@pytest.mark.parametrize("version", ["6c2", *WITH_ATTENTION])
def test_merged(make_finch: Make, version: str) -> None:
    a, b = (named(make_finch(version, seed=seed), f"{seed}.pth") for seed in (0, 7))
    result = merge_models([a, b], method="linear", weights=[3.0, 1.0])
    assert result.config == a.config
    for name, stored in result.tensors.items():
        expected = 0.75 * a.tensors[name].read() + 0.25 * b.tensors[name].read()
        torch.testing.assert_close(stored.read(), expected)
    build_model(result)(TOKENS)


@pytest.mark.parametrize(
    ("version", "field", "value"),
    [("goldfinch", "uses_rope", True), ("6c2", "uses_value2", False), ("6c2", "weakens_keys", False)],
)
def test_models_that_compute_otherwise_are_not_merged(make_finch: Make, version: str, field: str, value: bool) -> None:
    a, b = (named(make_finch(version, seed=seed), f"{seed}.pth") for seed in (0, 7))
    b = dataclasses.replace(b, config=dataclasses.replace(b.config, **{field: value}))
    with pytest.raises(CheckpointError, match=rf"7\.pth: {field}: expected {not value} as in 0\.pth, found {value}"):
        merge_models([a, b], method="linear", weights=[1.0, 1.0])


def test_goldfinches_of_other_fronts_are_not_merged(make_finch: Make) -> None:
    from infctx.surgery.to_goldfinch import upgrade_to_goldfinch

    a, b = (upgrade_to_goldfinch(named(make_finch(version), version), ratio=3) for version in ("6", "6c2"))
    with pytest.raises(CheckpointError, match=r"6(c2)?: tensor blocks\.0\.att\.\w+.* is missing"):
        merge_models([a, b], method="linear", weights=[1.0, 1.0])


@pytest.mark.parametrize("version", ["6c2", *WITH_ATTENTION])
@pytest.mark.parametrize("format", ["hf", "fla", "gguf"])
def test_formats_that_do_not_know_it_refuse(make_finch: Make, tmp_path: Path, version: str, format: str) -> None:
    model = make_finch(version)
    path = tmp_path / ("model.gguf" if format == "gguf" else "model")
    with pytest.raises(CheckpointError, match=rf"{model.config.name}.*\.pth or \.safetensors"):
        save_model(model, path, format=format, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
