"""Finch -> GoldFinch: what stays is bit for bit what it was, what is added adds nothing yet, and trains at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import build_model, tensors_of
from infctx.errors import CheckpointError, RecipeError
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.fresh import origins_of
from infctx.surgery.to_goldfinch import upgrade_to_goldfinch
from infctx.surgery.upgrade_path import upgrade


def tokens(length: int = 45) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(3))


def loss_of(model: Finch) -> Tensor:
    """Over two chunks, so that every state and the cache have a part in it."""
    logits, state = model(tokens()[:, :17])
    more, _ = model(tokens()[:, 17:], state)
    both = torch.cat([logits, more], dim=1)
    return torch.nn.functional.cross_entropy(both[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


@pytest.mark.parametrize("version", ["6", "6c2"])
def test_layers_behind_all_others_add_nothing_yet(make_finch: Callable[..., Finch], version: str) -> None:
    source = make_finch(version, n_layer=6, has_initial_state=True, has_initial_shifts=True, dtype=torch.float64)
    result = upgrade_to_goldfinch(tensors_of(source), layers="add")
    model = build_model(result, dtype=torch.float64)
    assert (model.config.version, model.config.front) == ("goldfinch", version)
    # 5 of 6: the fewest layers of which 6 stay.
    assert (model.config.n_layer, model.config.n_recurrent) == (8, 6)
    with torch.no_grad():
        (ours, our_state), (theirs, their_state) = (one(tokens()) for one in (model, source))
    assert torch.equal(ours, theirs)
    assert torch.equal(our_state.wkv, their_state.wkv)
    assert torch.equal(our_state.att_shift[:6], their_state.att_shift)
    assert torch.equal(our_state.ffn_shift[:6], their_state.ffn_shift)
    for one in (model, source):
        loss_of(one).backward()
    found = dict(model.named_parameters())
    for name, parameter in source.named_parameters():
        assert torch.equal(found[name], parameter)
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-12, atol=1e-13 * largest)


def test_added_layers_train_from_the_first_step(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("6", dtype=torch.float64))
    model = build_model(upgrade_to_goldfinch(source, ratio=3, layers="add"), dtype=torch.float64)
    assert model.config.n_attention == 2
    loss_of(model).backward()
    for block in model.blocks[3:]:
        for matrix in (block.time_mix.output, block.channel_mix.value):
            assert not matrix.weight.any()
            assert float(matrix.weight.grad.abs().max()) > 0
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        loss_of(model).backward()
    silent = [name for name, parameter in model.named_parameters() if not bool(parameter.grad.any())]
    assert silent == []


@pytest.mark.parametrize(("version", "n_layer", "ratio", "kept"), [("6", 6, 6, 5), ("6c2", 3, 3, 2), ("6", 4, 2, 2)])
def test_last_layers_lose_their_recurrence_alone(
    make_finch: Callable[..., Finch], version: str, n_layer: int, ratio: int, kept: int
) -> None:
    source = make_finch(version, n_layer=n_layer, has_initial_shifts=True, dtype=torch.float64)
    before = tensors_of(source)
    result = upgrade_to_goldfinch(before, ratio=ratio)
    model = build_model(result, dtype=torch.float64)
    assert (model.config.n_layer, model.config.n_recurrent) == (n_layer, kept)
    new = {name for name, stored in result.tensors.items() if stored is not before.tensors.get(name)}
    att = {f"blocks.{layer}.att" for layer in range(kept, n_layer)}
    assert new == {
        name
        for name in result.tensors
        if name.startswith("w_kv_cache") or (name.rpartition(".att.")[0] + ".att" in att and "shift_state" not in name)
    }
    sizes = [sum(result.tensors[name].num_elements for name in names) for names in (result.tensors, new)]
    assert origins_of(result, before) == (sizes[0] - sizes[1], 0, sizes[1])
    # With an output of zero, attention is as if it were not there.
    with torch.no_grad():
        for block in source.blocks[kept:]:
            block.time_mix.output.weight.zero_()
        assert torch.equal(model(tokens())[0], source(tokens())[0])


def test_an_eagle_becomes_a_goldfinch_in_one_go(make_finch: Callable[..., Finch]) -> None:
    eagle = make_finch("5.2", dtype=torch.float64)
    before = tensors_of(eagle)
    result = upgrade(before, to="goldfinch", layers="add", lerp_rank=3, decay_rank=5)
    assert (result.config.version, result.config.front, result.config.n_layer) == ("goldfinch", "6", 4)
    assert (result.config.lerp_rank, result.config.decay_rank) == (3, 5)
    found = build_model(result, dtype=torch.float64)(tokens())[0]
    torch.testing.assert_close(found, eagle(tokens())[0], rtol=0, atol=1e-12)
    new = sum(t.num_elements for name, t in result.tensors.items() if name not in before.tensors)
    origins = origins_of(result, before)
    assert sum(origins) == result.num_parameters
    # Eagle's four mixes of the time mix and two of the channel mix have other names in a Finch; the two of the
    # low-rank terms' inputs are made of the key's. And its decay is stored in another shape.
    mixes, decays = 3 * (6 + 2) * 32, 3 * 32
    assert origins.changed == mixes + decays
    assert origins.fresh == new - mixes


@pytest.mark.parametrize("layers", ["keep", "add"])
def test_names_shapes_and_dtypes(make_finch: Callable[..., Finch], layers: str) -> None:
    source = tensors_of(make_finch("6", n_embd=64, head_size=16, has_initial_shifts=True, dtype=torch.bfloat16))
    result = upgrade_to_goldfinch(source, layers=layers)
    n_layer = 3 if layers == "keep" else 4
    expected = new_config(
        version="goldfinch", front="6", ratio=6, n_layer=n_layer, n_embd=64, vocab_size=50, head_size=16, dim_ffn=101
    )
    assert result.config == dataclasses.replace(expected, lerp_rank=4, decay_rank=6)
    with torch.device("meta"):
        wanted = tensors_of(Finch(result.config, has_initial_shifts=True)).tensors
    assert list(result.tensors) == list(wanted)
    for name, stored in result.tensors.items():
        value = stored.read()
        assert tuple(value.shape) == stored.shape == wanted[name].shape, name
        assert value.dtype == stored.dtype == torch.bfloat16, name


def test_initial_values_of_what_is_new(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("6"))
    result = upgrade_to_goldfinch(source, layers="add", ratio=3)
    read = {name: stored.read() for name, stored in result.tensors.items()}
    num_layers, channels = 5, 32
    for layer in (3, 4):
        att = f"blocks.{layer}.att"
        curve = 1 - (torch.arange(channels) / channels) ** (0.5 * (1 - layer / num_layers))
        torch.testing.assert_close(read[f"{att}.time_maa_q"].flatten(), curve)
        torch.testing.assert_close(read[f"{att}.ln_x.weight"], torch.full((32,), ((1 + layer) / num_layers) ** 0.7))
        query, down = read[f"{att}.query.weight"], read[f"{att}.time_key_w1"]
        torch.testing.assert_close(query @ query.t(), torch.eye(32), rtol=0, atol=1e-5)
        assert not down.any()
        assert 0 < float(read[f"{att}.time_key_w2"].abs().max()) <= 0.01
        for norm in ("ln1", "ln2", "att.ln_q", "att.ln_k", "att.ln_v"):
            assert bool((read[f"blocks.{layer}.{norm}.weight"] == 1).all())
            assert not read[f"blocks.{layer}.{norm}.bias"].any()
    compress = read["w_kv_cache_a.weight"]
    assert compress.shape == (2, 32)
    torch.testing.assert_close(compress @ compress.t(), torch.eye(2), rtol=0, atol=1e-5)


def test_random_values_depend_on_seed_and_place_alone(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("6"))
    result, other = (upgrade_to_goldfinch(source, layers="add", ratio=3, seed=seed) for seed in (0, 1))
    names = [f"blocks.{layer}.{name}" for layer in (3, 4) for name in ("att.query.weight", "ffn.key.weight")]
    names += ["w_kv_cache_a.weight", "w_kv_cache_b.weight"]
    forth = [result.tensors[name].read() for name in names]
    back = [result.tensors[name].read() for name in reversed(names)]
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))
    assert not torch.equal(forth[0], forth[2])
    assert not any(torch.equal(a, other.tensors[name].read()) for a, name in zip(forth, names, strict=True))


@pytest.mark.parametrize("layers", ["keep", "add"])
def test_nothing_is_read_before_it_is_asked_for(make_finch: Callable[..., Finch], layers: str) -> None:
    def read() -> Tensor:
        raise AssertionError("read too early")

    source = tensors_of(make_finch("6"))
    tensors = {name: StoredTensor(stored.shape, stored.dtype, read) for name, stored in source.tensors.items()}
    upgrade_to_goldfinch(dataclasses.replace(source, tensors=tensors), layers=layers)


def test_refused(make_finch: Callable[..., Finch]) -> None:
    def named(model: Finch) -> ModelTensors:
        return dataclasses.replace(tensors_of(model), origin="mine.pth")

    finch = named(make_finch("6"))
    for version in ("goldfinch", "gptalpha"):
        with pytest.raises(CheckpointError, match=r"mine\.pth: expected a Finch or a Finch-C2.*attention already"):
            upgrade_to_goldfinch(named(make_finch(version)))
    with pytest.raises(CheckpointError, match=r"found version 5\.2, Eagle\. Make it a Finch first"):
        upgrade_to_goldfinch(named(make_finch("5.2")))
    with pytest.raises(CheckpointError, match="ratio 1: expected 2"):
        upgrade_to_goldfinch(finch, ratio=1)
    with pytest.raises(CheckpointError, match="layers 'more': expected one of keep, add"):
        upgrade_to_goldfinch(finch, layers="more")
    with pytest.raises(CheckpointError, match=r"GOLD of all 1 layers.*--layers add"):
        upgrade_to_goldfinch(named(make_finch("6", n_layer=1)))
    tuned = named(make_finch("6", has_initial_state=True))
    with pytest.raises(CheckpointError, match=r"tuned initial states.*blocks\.2\.att\.time_state\. .*--layers add"):
        upgrade_to_goldfinch(tuned)
    narrow = dataclasses.replace(finch, config=dataclasses.replace(finch.config, n_head=2))
    with pytest.raises(CheckpointError, match="2 heads of 8 at width 32"):
        upgrade_to_goldfinch(narrow)
    with pytest.raises(RecipeError, match="channels 24: expected a multiple of 16"):
        upgrade_to_goldfinch(named(make_finch("6", n_embd=24)))


# Finch -> Finch-C2


def test_a_finch_c2_mixes_its_inputs_as_the_finch(make_finch: Callable[..., Finch]) -> None:
    source = make_finch("6", dtype=torch.float64, has_initial_state=True, has_initial_shifts=True)
    before = tensors_of(source)
    result = upgrade(before, to="finch-c2")
    model = build_model(result, dtype=torch.float64)
    assert model.config == dataclasses.replace(source.config, version="6c2", value_rank=64)
    hidden = torch.randn(2, 7, 32, dtype=torch.float64)
    shift = torch.randn(2, 32, dtype=torch.float64)
    for ours, theirs in zip(model.blocks, source.blocks, strict=True):
        found, expected = (block.time_mix._mix(hidden, shift, None, work=torch.float64) for block in (ours, theirs))
        for name in ("receptance", "key", "value", "raw_decay"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)
        # Its second value is mixed as the first; and begins as it.
        torch.testing.assert_close(found.side, expected.value, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.time_mix._side(found), ours.time_mix.value(expected.value))
    moved = {name for name in result.tensors if name.endswith(("maa_w1", "maa_w2"))}
    fresh = {name for name in result.tensors if "time_value2" in name}
    for name in result.tensors.keys() - moved - fresh:
        assert result.tensors[name] is before.tensors[name.replace("time_maa_v2", "time_maa_v")], name
    gone = {f"blocks.{layer}.att.{name}" for layer in range(3) for name in ("gate.weight", "time_maa_g")}
    assert before.tensors.keys() - result.tensors.keys() == gone
    sizes = [sum(result.tensors[name].num_elements for name in names) for names in (moved, fresh)]
    assert list(origins_of(result, before)[1:]) == sizes


def test_an_eagle_becomes_a_finch_c2(make_finch: Callable[..., Finch]) -> None:
    result = upgrade(tensors_of(make_finch("5.2")), to="finch-c2")
    assert result.config.version == "6c2"
    build_model(result)(tokens())


@pytest.mark.parametrize(
    ("version", "arguments", "words"),
    [
        ("6", {"to": "gptalpha"}, "--to gptalpha: expected one of finch, finch-c2, goldfinch"),
        ("6", {"to": "finch-c2", "ratio": 3}, "--to goldfinch only"),
        ("5.2", {"to": "finch", "layers": "add"}, "--to goldfinch only"),
        ("6", {"to": "goldfinch", "lerp_rank": 3}, "an Eagle only.*model grow"),
        ("6c2", {"to": "finch-c2"}, "expected a Finch .*found version 6c2"),
        ("goldfinch", {"to": "finch-c2"}, "expected a Finch .*found version goldfinch"),
        ("6", {"to": "finch"}, "expected an Eagle .*found version 6"),
    ],
)
def test_refused_ways(make_finch: Callable[..., Finch], version: str, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        upgrade(tensors_of(make_finch(version)), **arguments)
