"""Files of Finch-C2, GPTAlpha and GoldFinch: what is told by their tensors, what by switches, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import infctx
from infctx.checkpoint.model_file import load_model, official_tensors
from infctx.checkpoint.switches import SUFFIX, SWITCHES_KEY, DefaultedSwitchesWarning
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from tests.conftest import random_finch

HEAD_SIZE = 8
MODELS: dict[str, dict[str, Any]] = {
    "Finch-C2": {"version": "6c2"},
    "GPTAlpha": {"version": "gptalpha", "n_layer": 2},
    "GoldFinch": {"version": "goldfinch", "n_layer": 4, "ratio": 2},
    "GoldFinch behind Finch": {"version": "goldfinch", "front": "6", "uses_rope": True},
}
# As the published configs have them; of a GPTAlpha in heads of 8 that size belongs to it.
PUBLISHED: dict[str, dict[str, bool | int]] = {
    "Finch-C2": {"use_v2": True, "use_one_minus_w": True},
    "GPTAlpha": {"rope": True, "head_size": HEAD_SIZE},
    "GoldFinch": {"use_v2": True, "use_one_minus_w": True, "rope": False},
    "GoldFinch behind Finch": {"rope": False},
}
GOLD_NAMES = [
    name for name in official_tensors(random_finch("goldfinch")) if name.startswith(("blocks.2.att.", "w_kv_"))
]


@pytest.fixture(scope="module", params=MODELS)
def named(request: pytest.FixtureRequest) -> tuple[str, Finch]:
    return request.param, random_finch(**MODELS[request.param])


def other_switches(model: Finch) -> Finch:
    """The same parameters, trained in the other way."""
    config = model.config
    config = replace(
        config,
        uses_rope=bool(config.n_attention) and not config.uses_rope,
        uses_value2="6c2" not in config.kinds,
        weakens_keys="6c2" not in config.kinds,
    )
    other = Finch(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def write_pth(tensors: Mapping[str, Tensor], folder: Path, switches: object = None) -> Path:
    """A .pth as another program leaves it; switches: text, or what is written as JSON."""
    path = folder / "model.pth"
    torch.save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    if switches is not None:
        beside(path).write_text(switches if isinstance(switches, str) else json.dumps(switches))
    return path


def beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def assert_same(found: Finch, expected: Finch) -> None:
    assert found.config == expected.config
    theirs, ours = dict(found.named_parameters()), dict(expected.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("format", ["pth", "safetensors", "folder"])
def test_saved_and_read_again_bit_for_bit(named: tuple[str, Finch], tmp_path: Path, format: str) -> None:
    """With the switches of either kind, and the same answers."""
    tokens = torch.arange(12)[None]
    for model in (named[1], other_switches(named[1])):
        path = tmp_path / ("model" if format == "folder" else f"model.{format}")
        infctx.save_model(model, path, format="pth" if format == "pth" else "safetensors", dtype=torch.float32)
        assert beside(path).is_file() == (format == "pth")
        loaded = load_model(path)
        assert_same(loaded, model)
        with torch.no_grad():
            assert torch.equal(loaded(tokens)[0], model(tokens)[0])


def test_no_switches_are_left_of_the_model_that_was_there(tmp_path: Path) -> None:
    gold, finch, c2 = random_finch("goldfinch", uses_rope=True), random_finch("6"), random_finch("6c2")
    infctx.save_model(gold, tmp_path / "m.pth")
    infctx.save_model(finch, tmp_path / "m.pth")
    assert not beside(tmp_path / "m.pth").exists()
    # Somebody's own, of a file without metadata.
    beside(tmp_path / "m.safetensors").write_text('{"use_v2": false, "use_one_minus_w": true}')
    infctx.save_model(c2, tmp_path / "m.safetensors", format="safetensors")
    assert load_model(tmp_path / "m.safetensors").config == c2.config


def test_any_order_of_keys_a_prefix_and_squeezed_tensors(named: tuple[str, Finch], tmp_path: Path) -> None:
    name, model = named
    tensors = official_tensors(model)
    generator = torch.Generator().manual_seed(0)
    shuffled = [list(tensors)[i] for i in torch.randperm(len(tensors), generator=generator)]
    switches = PUBLISHED[name] | {"rope": model.config.uses_rope} if model.config.n_attention else PUBLISHED[name]
    for prefix in ("_forward_module.", "model.", ""):
        written = {prefix + key: tensors[key].squeeze() for key in shuffled}
        assert_same(load_model(write_pth(written, tmp_path, switches)), model)


@pytest.mark.parametrize("version", ["6c2", "goldfinch"])
def test_squeezed_tensors_of_one_head(version: str, tmp_path: Path) -> None:
    model = random_finch(version, head_size=32, has_initial_state=True)
    squeezed = {name: tensor.squeeze() for name, tensor in official_tensors(model).items()}
    assert squeezed["blocks.0.att.time_faaaa"].dim() == 1
    switches = {"use_v2": True, "use_one_minus_w": True} | ({"rope": False} if version == "goldfinch" else {})
    assert_same(load_model(write_pth(squeezed, tmp_path, switches)), model)


def test_what_a_layer_is_is_read_from_each(tmp_path: Path) -> None:
    for n_layer, ratio, recurrent in ((6, 3, 4), (6, 6, 5), (6, 2, 3)):
        model = random_finch("goldfinch", n_layer=n_layer, ratio=ratio, n_embd=16)
        config = load_model(write_pth(official_tensors(model), tmp_path, PUBLISHED["GoldFinch"])).config
        assert (config.n_layer, config.n_recurrent, config.front) == (n_layer, recurrent, "6c2")
        assert config == model.config


def load_warned(path: Path) -> tuple[Finch, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(path)
    assert all(warning.category is DefaultedSwitchesWarning for warning in caught)
    return model, [str(warning.message) for warning in caught]


def test_without_switches_those_of_the_published_models(named: tuple[str, Finch], tmp_path: Path) -> None:
    name, model = named
    if name == "GPTAlpha":
        model = random_finch("gptalpha", n_layer=2, n_embd=64, head_size=64)
    path = write_pth(official_tensors(model), tmp_path)
    save_file({key: tensor.contiguous() for key, tensor in official_tensors(model).items()}, tmp_path / "m.safetensors")
    expected = PUBLISHED[name] | ({"head_size": 64} if name == "GPTAlpha" else {})
    for file in (path, tmp_path / "m.safetensors"):
        found, (message,) = load_warned(file)
        assert message.startswith(f"{file}: ")
        assert json.dumps(expected) in message
        assert str(beside(file)) in message
        assert found.config == replace(model.config, uses_rope=expected.get("rope", False))


def test_the_switches_that_are_not_told_are_named(tmp_path: Path) -> None:
    path = write_pth(official_tensors(random_finch("goldfinch")), tmp_path, {"rope": True})
    model, (message,) = load_warned(path)
    assert model.config.uses_rope
    assert '{"use_v2": true, "use_one_minus_w": true}' in message
    assert message.startswith(str(beside(path)))
    # No model without switches has anything to be told.
    assert load_warned(write_pth(official_tensors(random_finch("6")), tmp_path, {}))[1] == []


def test_the_file_beside_a_model_is_believed_before_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in official_tensors(random_finch("6c2")).items()}
    save_file(tensors, path, {SWITCHES_KEY: '{"use_v2": false, "use_one_minus_w": true}'})
    assert not load_model(path).config.uses_value2
    beside(path).write_text('{"use_v2": true, "use_one_minus_w": false}')
    config = load_model(path).config
    assert (config.uses_value2, config.weakens_keys) == (True, False)


@pytest.mark.parametrize(
    ("version", "switches", "message"),
    [
        ("goldfinch", '{"rope": tr', r'expected switches as a JSON object, as \{"rope": false\}'),
        ("goldfinch", "[1]", "expected switches as a JSON object"),
        ("goldfinch", "[" * 100_000, "expected switches as a JSON object"),
        ("goldfinch", {"rop": True}, "'rop': this model has the switches use_v2, use_one_minus_w, rope"),
        ("goldfinch", {"rope": 1}, "rope: expected true or false, found 1"),
        ("goldfinch", {"use_v2": "yes"}, 'use_v2: expected true or false, found "yes"'),
        ("goldfinch", {"head_size": 8}, "'head_size': this model has the switches"),
        ("6c2", {"rope": False}, "'rope': this model has the switches use_v2, use_one_minus_w"),
        ("6", {"rope": True}, "'rope': this model has no switches"),
        ("gptalpha", {"head_size": 0}, "head_size: expected a number above 0, found 0"),
        ("gptalpha", {"head_size": "8"}, 'head_size: expected a number above 0, found "8"'),
        ("gptalpha", {"head_size": True}, "head_size: expected a number above 0, found true"),
        ("gptalpha", {"use_v2": True, "head_size": 8}, "'use_v2': this model has the switches rope, head_size"),
    ],
)
def test_wrong_switches_are_refused(version: str, switches: object, message: str, tmp_path: Path) -> None:
    path = write_pth(official_tensors(random_finch(version)), tmp_path, switches)
    with pytest.raises(CheckpointError, match=rf"model\.pth\.switches\.json: {message}"):
        load_model(path)


def test_the_size_of_a_gptalphas_heads(tmp_path: Path) -> None:
    tensors = official_tensors(random_finch("gptalpha"))
    for size in (8, 16):
        config = load_model(write_pth(tensors, tmp_path, {"rope": True, "head_size": size})).config
        assert (config.head_size, config.n_head) == (size, 32 // size)
    with pytest.raises(CheckpointError, match=r"query\.weight: expected rows in heads of 7, found 32"):
        load_model(write_pth(tensors, tmp_path, {"rope": True, "head_size": 7}))
    beside(tmp_path / "model.pth").unlink()
    with pytest.raises(CheckpointError, match=r'heads of 64, as every published .* switches .*"head_size": 32'):
        load_model(tmp_path / "model.pth")


@pytest.fixture(scope="module")
def gold() -> dict[str, Tensor]:
    return official_tensors(random_finch("goldfinch", n_layer=4, ratio=2))


@pytest.mark.parametrize("name", GOLD_NAMES)
def test_a_missing_tensor_is_named(gold: dict[str, Tensor], name: str, tmp_path: Path) -> None:
    for layer in (2, 3):
        missing = name.replace("blocks.2.", f"blocks.{layer}.")
        without = {key: tensor for key, tensor in gold.items() if key != missing}
        with pytest.raises(CheckpointError, match=rf"model\.pth: .*\b{missing}\b"):
            load_model(write_pth(without, tmp_path, PUBLISHED["GoldFinch"]))


def exchanged(tensors: Mapping[str, Tensor], one: int, other: int) -> dict[str, Tensor]:
    """Two layers in each other's place; ln0 stays."""
    places = {str(one): str(other), str(other): str(one)}

    def renamed(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "blocks" and parts[2] != "ln0":
            parts[1] = places.get(parts[1], parts[1])
        return ".".join(parts)

    return {renamed(name): tensor for name, tensor in tensors.items()}


def test_layers_and_matrices_that_do_not_go_together(gold: dict[str, Tensor], tmp_path: Path) -> None:
    c2, alpha = official_tensors(random_finch("6c2")), official_tensors(random_finch("gptalpha"))
    cache = {name: tensor for name, tensor in gold.items() if name.startswith("w_kv_cache")}
    gold_and_alpha = {name: tensor for name, tensor in gold.items() if not name.startswith("blocks.3.")}
    gold_and_alpha |= {
        name.replace("blocks.2.", "blocks.3."): tensor for name, tensor in alpha.items() if name.startswith("blocks.2.")
    }
    cases: list[tuple[Mapping[str, Tensor], str]] = [
        (c2 | cache, r"has w_kv_cache_a\.weight, of a GoldFinch, and no GOLD layer"),
        (exchanged(gold, 1, 2), r"attention in all layers from 1 on, .*blocks\.2\.att is a recurrence"),
        (exchanged(exchanged(gold, 0, 2), 1, 3), r"from 0 on, .*blocks\.2\.att is a recurrence"),
        (gold_and_alpha, r"blocks\.2\.att has it \(gold\); blocks\.3\.att is gptalpha"),
        (gold | {"w_kv_cache_b.weight": torch.zeros(32, 33)}, r"w_kv_cache_b\.weight: expected .*34.*found \[32, 33\]"),
        (gold | {"w_kv_cache_b.weight": torch.zeros(30, 34)}, r"w_kv_cache_b\.weight: expected shape \[32, 34\]"),
        (gold | {"w_kv_cache_a.weight": torch.zeros(2, 30)}, r"w_kv_cache_a\.weight: expected shape \[2, 32\]"),
        (gold | {"w_kv_cache_c.weight": torch.zeros(2, 32)}, r"do not belong .*w_kv_cache_c"),
    ]
    for tensors, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load_model(write_pth(tensors, tmp_path, PUBLISHED["GoldFinch"]))
