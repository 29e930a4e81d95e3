"""Fresh weights: exact curves, zeros where they belong, scales of the random ones."""

from __future__ import annotations

import pytest
import torch

from infctx.errors import RecipeError
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config


def fresh(version: str, *, seed: int = 0) -> Finch:
    model = Finch(new_config(version=version, n_layer=4, n_embd=128, vocab_size=512, head_size=32))
    initialise_(model, seed=seed)
    return model


def test_finch_curves() -> None:
    model = fresh("6")
    x = torch.arange(128) / 128
    place = torch.arange(128) / 127
    for i, block in enumerate(model.blocks):
        up, down = i / 3, 1 - i / 4
        mix = block.time_mix
        for name in ("input", "decay", "key"):
            torch.testing.assert_close(getattr(mix, f"lerp_{name}"), 1 - x**down)
        torch.testing.assert_close(mix.lerp_value, 1 - (x**down + 0.3 * up))
        torch.testing.assert_close(mix.lerp_receptance, 1 - x ** (0.5 * down))
        torch.testing.assert_close(mix.lerp_gate, 1 - x ** (0.5 * down))
        torch.testing.assert_close(mix.decay_base, -6 + 5 * place ** (0.7 + 1.3 * up))
        zigzag = torch.tensor([0.0, 0.1, -0.1]).repeat(43)[:128]
        torch.testing.assert_close(mix.bonus.flatten(), up * (1 - place) + zigzag)
        torch.testing.assert_close(mix.group_norm.weight, torch.full((128,), ((1 + i) / 4) ** 0.7))
        torch.testing.assert_close(block.channel_mix.lerp_key, 1 - x ** (down**3))
        torch.testing.assert_close(block.channel_mix.lerp_receptance, 1 - x ** (down**3))


def test_eagle_curves_weigh_the_token_itself() -> None:
    model = fresh("5.2")
    x = torch.arange(128) / 128
    for i, block in enumerate(model.blocks):
        up, down = i / 3, 1 - i / 4
        torch.testing.assert_close(block.time_mix.mix_key, x**down)
        torch.testing.assert_close(block.time_mix.mix_value, x**down + 0.3 * up)
        torch.testing.assert_close(block.time_mix.mix_gate, x ** (0.5 * down))
        torch.testing.assert_close(block.channel_mix.mix_receptance, x**down)
        assert block.time_mix.decay_base.shape == (4, 32)


@pytest.mark.parametrize("version", ["6", "5.2"])
def test_matrices(version: str) -> None:
    model = fresh(version)
    assert float(model.embedding.weight.detach().abs().max()) <= 1e-4
    gram = model.head.weight.T @ model.head.weight
    torch.testing.assert_close(gram, torch.eye(128) * 0.25 * 512 / 128, rtol=1e-4, atol=1e-4)
    for block in model.blocks:
        for name, gain in (("receptance", 1.0), ("value", 1.0), ("key", 0.1), ("gate", 0.1)):
            weight = getattr(block.time_mix, name).weight
            torch.testing.assert_close(weight @ weight.T, torch.eye(128) * gain**2, rtol=1e-4, atol=1e-5)
        zeros = [block.time_mix.output, block.channel_mix.receptance, block.channel_mix.value]
        assert not any(bool(matrix.weight.any()) for matrix in zeros)
        assert bool((block.time_mix_norm.weight == 1).all())
        assert not bool(block.time_mix_norm.bias.any())
        if version == "6":
            assert not bool(block.time_mix.lerp_down.any())
            assert not bool(block.time_mix.decay_down.any())
            assert 0 < float(block.time_mix.lerp_up.detach().abs().max()) <= 0.01
            assert 0 < float(block.time_mix.decay_up.detach().abs().max()) <= 0.01


def test_no_parameter_is_left_unfilled_and_the_seed_decides() -> None:
    one, same, other = fresh("6"), fresh("6"), fresh("6", seed=1)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert bool(torch.isfinite(a).all()), name
        assert torch.equal(a, b), name
        if name.endswith((".key.weight", "_up")) or name in ("embedding.weight", "head.weight"):
            assert not torch.equal(a, c), name


def test_sizes_by_default_are_those_of_the_released_models() -> None:
    small = new_config(version="6", n_layer=24, n_embd=2048, vocab_size=65536)
    assert (small.dim_ffn, small.n_head, small.lerp_rank, small.decay_rank) == (7168, 32, 32, 64)
    wide = new_config(version="6", n_layer=32, n_embd=4096, vocab_size=65536)
    assert (wide.dim_ffn, wide.n_head, wide.lerp_rank, wide.decay_rank) == (14336, 64, 64, 128)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Finch(config).parameters()) for config in (small, wide)]
    assert counts == [1_599_873_024, 7_635_746_816]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(RecipeError, match="channels 100: expected a multiple of the head size 64"):
        new_config(version="6", n_layer=2, n_embd=100, vocab_size=10)
    with pytest.raises(RecipeError, match=r"version '7': expected one of 5\.2, 6, 6c2, goldfinch, gptalpha"):
        new_config(version="7", n_layer=2, n_embd=64, vocab_size=10)
