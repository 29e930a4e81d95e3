"""Deeper models and wider low-rank parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import build_model, tensors_of
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.tensors import ModelTensors
from infctx.surgery.grow import grow_depth, grow_ranks

TOKENS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(3))


def sources_of(result: ModelTensors, source: ModelTensors) -> list[int]:
    """The source layer of each layer of a grown model, by its unchanged first norm."""
    of = {id(source.tensors[f"blocks.{i}.ln1.weight"]): i for i in range(source.config.n_layer)}
    return [of[id(result.tensors[f"blocks.{i}.ln1.weight"])] for i in range(result.config.n_layer)]


def by_hand(model: Finch, layers: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Logits of a model's own layers in another order, with what each adds to the stream scaled."""
    state = model.fresh_state(len(TOKENS))
    x = model.input_norm(model.embedding(TOKENS))
    for layer, scale in zip(layers, scales, strict=True):
        block = model.blocks[layer]
        x = x + scale * block.time_mix(block.time_mix_norm(x), state.att_shift[layer], state.wkv[layer], None)[0]
        x = x + scale * block.channel_mix(block.channel_mix_norm(x), state.ffn_shift[layer], None)[0]
    return model.head(model.output_norm(x))


@pytest.mark.parametrize("version", ["6", "5.2", "6c2"])
@pytest.mark.parametrize(
    ("num_layers", "layers"), [(4, [0, 0, 1, 2]), (6, [0, 0, 1, 1, 2, 2]), (7, [0, 0, 0, 1, 1, 2, 2])]
)
def test_interleaved_growth_is_exact(
    make_finch: Callable[..., Finch], version: str, num_layers: int, layers: list[int]
) -> None:
    model = make_finch(version, has_initial_state=True)
    source = tensors_of(model)
    result = grow_depth(source, num_layers=num_layers)
    assert sources_of(result, source) == layers
    grown = build_model(result)
    (logits, state), (expected, before) = grown(TOKENS), model(TOKENS)
    assert torch.equal(logits, expected)
    first_of = [layers.index(layer) for layer in range(3)]
    for ours, theirs in zip(state, before, strict=True):
        assert torch.equal(ours[first_of], theirs)
    more = grown(TOKENS, state)[0]
    assert torch.equal(more, model(TOKENS, before)[0])


def test_copies_train_at_once_and_originals_as_before(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", dtype=torch.float64)
    grown = build_model(grow_depth(tensors_of(model), num_layers=6), dtype=torch.float64)
    for each in (model, grown):
        logits, _ = each(TOKENS)
        logits.square().sum().backward()
    for layer in range(3):
        copy = grown.blocks[2 * layer + 1]
        for matrix in (copy.time_mix.output.weight, copy.channel_mix.value.weight):
            assert not matrix.any()
            assert matrix.grad.abs().max() > 0
        ours, theirs = dict(grown.blocks[2 * layer].named_parameters()), dict(model.blocks[layer].named_parameters())
        for name, parameter in theirs.items():
            bound = 1e-10 * float(parameter.grad.abs().max())
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-10, atol=bound)


def test_a_stack_runs_the_layers_once_more(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", has_initial_state=True, dtype=torch.float64)
    source = tensors_of(model)
    for num_layers, layers in ((6, [0, 1, 2, 0, 1, 2]), (5, [0, 1, 0, 1, 2]), (7, [0, 0, 1, 2, 0, 1, 2])):
        result = grow_depth(source, num_layers=num_layers, how="stack")
        assert sources_of(result, source) == layers
        found, _ = build_model(result, dtype=torch.float64)(TOKENS)
        torch.testing.assert_close(found, by_hand(model, layers, [1.0] * num_layers), rtol=0, atol=1e-11)
        assert (found - model(TOKENS)[0]).abs().max() > 0.1


def test_the_depth_of_finch_14b() -> None:
    with torch.device("meta"):
        model = Finch(new_config(version="6", n_layer=32, n_embd=64, vocab_size=10))
    source = tensors_of(model)
    result = grow_depth(source, num_layers=61, how="stack")
    assert sources_of(result, source) == [*range(29), *range(32)]


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_scaled_copies(make_finch: Callable[..., Finch], scale: float) -> None:
    model = make_finch("6", dtype=torch.float64)
    grown = build_model(grow_depth(tensors_of(model), num_layers=5, how="scaled", scale=scale), dtype=torch.float64)
    expected = by_hand(model, [0, 0, 1, 1, 2], [1.0, scale, 1.0, scale, 1.0])
    torch.testing.assert_close(grown(TOKENS)[0], expected, rtol=0, atol=1e-11)


def test_layers_of_ones_own_choice(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", dtype=torch.float64)
    source = tensors_of(model)
    exact = grow_depth(source, num_layers=5, layers=[0, 1, 1, 2, 0])
    assert sources_of(exact, source) == [0, 1, 1, 2, 0]
    assert torch.equal(build_model(exact, dtype=torch.float64)(TOKENS)[0], model(TOKENS)[0])
    other = grow_depth(source, num_layers=4, how="stack", layers=[2, 2, 1, 0])
    # The norm of the embedding stays where it is, whichever layer comes first.
    assert [name for name in other.tensors if ".ln0." in name] == ["blocks.0.ln0.weight", "blocks.0.ln0.bias"]
    found, _ = build_model(other, dtype=torch.float64)(TOKENS)
    torch.testing.assert_close(found, by_hand(model, [2, 2, 1, 0], [1.0] * 4), rtol=0, atol=1e-11)


def test_zero_copies_keep_their_dtype(make_finch: Callable[..., Finch]) -> None:
    result = grow_depth(tensors_of(make_finch("6", dtype=torch.bfloat16)), num_layers=6)
    assert {stored.dtype for stored in result.tensors.values()} == {torch.bfloat16}
    assert {stored.read().dtype for stored in result.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_layers": 3}, "more than the 3"),
        ({"num_layers": 4, "how": "mirror"}, "'mirror'.*interleave, stack, scaled"),
        ({"num_layers": 4, "how": "scaled"}, "scale None"),
        ({"num_layers": 4, "how": "scaled", "scale": 0.0}, r"scale 0\.0"),
        ({"num_layers": 4, "how": "scaled", "scale": 1.5}, r"scale 1\.5"),
        ({"num_layers": 4, "how": "scaled", "scale": float("nan")}, "scale nan"),
        ({"num_layers": 4, "scale": 0.5}, r"scale 0\.5"),
        ({"num_layers": 4, "layers": [0, 1, 2]}, "expected 4 numbers"),
        ({"num_layers": 4, "layers": [0, 1, 2, 3]}, "from 0 to 2"),
        ({"num_layers": 4, "layers": [1, 0, 2, 2]}, "in order"),
        ({"num_layers": 4, "layers": [0, 1, 1, 1]}, "in order"),
    ],
)
def test_refused(make_finch: Callable[..., Finch], arguments: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        grow_depth(tensors_of(make_finch("6")), **arguments)


# Ranks


def test_wider_ranks_are_the_same_function_and_train(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", dtype=torch.float64)
    result = grow_ranks(tensors_of(model), lerp_rank=7, decay_rank=9)
    assert (result.config.lerp_rank, result.config.decay_rank) == (7, 9)
    grown = build_model(result, dtype=torch.float64)
    (found, state), (expected, before) = grown(TOKENS), model(TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.wkv, before.wkv, rtol=0, atol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(grown.blocks, model.blocks, strict=True):
        down, old_down = ours.time_mix.lerp_down, theirs.time_mix.lerp_down
        grouped, old_grouped = down.unflatten(1, (5, 7)), old_down.unflatten(1, (5, 4))
        assert torch.equal(grouped[:, :, :4], old_grouped)
        assert not grouped[:, :, 4:].any()
        gradient = down.grad.unflatten(1, (5, 7))
        torch.testing.assert_close(
            gradient[:, :, :4], old_down.grad.unflatten(1, (5, 4)), rtol=1e-9, atol=1e-9 * float(gradient.abs().max())
        )
        assert (gradient[:, :, 4:].abs().amax(dim=(0, 2)) > 0).all()
        assert ours.time_mix.decay_down.grad[:, 6:].abs().max() > 0
        assert torch.equal(ours.time_mix.decay_up[:6], theirs.time_mix.decay_up)
        assert 0 < ours.time_mix.decay_up[6:].abs().max() <= 0.01


def test_one_rank_alone(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("6"))
    result = grow_ranks(source, decay_rank=8)
    assert (result.config.lerp_rank, result.config.decay_rank) == (4, 8)
    assert result.tensors["blocks.0.att.time_maa_w1"] is source.tensors["blocks.0.att.time_maa_w1"]


def test_ranks_refused(make_finch: Callable[..., Finch]) -> None:
    with pytest.raises(CheckpointError, match="cannot shrink"):
        grow_ranks(tensors_of(make_finch("6")), lerp_rank=3)
    with pytest.raises(CheckpointError, match="Upgrade it first"):
        grow_ranks(tensors_of(make_finch("5.2")), lerp_rank=8)
