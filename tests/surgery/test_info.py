"""What is told of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from infctx.checkpoint.model_file import tensors_of
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.tensors import StoredTensor
from infctx.surgery.info import RELEASED, find_bad_tensors, model_facts, released_name, tensor_table


@pytest.mark.parametrize(("name", "version", "n_layer", "n_embd", "parameters"), RELEASED)
def test_released_models(name: str, version: str, n_layer: int, n_embd: int, parameters: int) -> None:
    config = new_config(version=version, n_layer=n_layer, n_embd=n_embd, vocab_size=65536)
    with torch.device("meta"):
        facts = model_facts(tensors_of(Finch(config).bfloat16()))
    assert facts["released"] == name
    assert facts["parameters"] == parameters == sum(facts["parts"].values())
    assert facts["bytes"] == {"bfloat16": 2 * parameters}
    assert released_name(dataclasses.replace(config, vocab_size=65540)) == f"{name} with another vocabulary"
    assert released_name(dataclasses.replace(config, n_layer=n_layer + 1)) is None


def test_parts_and_dtypes(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", has_initial_state=True)
    model.blocks[1].time_mix.bonus.data = model.blocks[1].time_mix.bonus.data.bfloat16()
    facts = model_facts(tensors_of(model, tokenizer="bytes"))
    counts = {name: sum(p.numel() for n, p in model.named_parameters() if name in n) for name in ("channel_mix.",)}
    assert facts["parts"]["channel mix"] == counts["channel_mix."]
    assert facts["parts"]["embedding"] == facts["parts"]["head"] == 50 * 32
    assert facts["parts"]["tuned state"] == 3 * 4 * 8 * 8
    assert facts["parts"]["norms"] == 2 * 32 * (3 * 2 + 2)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(facts["parts"].values()) == total
    assert facts["bytes"] == {"bfloat16": 2 * 32, "float32": 4 * (total - 32)}
    assert facts["initial_state"] is True
    assert facts["tokenizer"] == "bytes"


def test_the_table_of_tensors(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("6"))
    assert len(tensor_table(source)) == len(source.tensors)
    assert tensor_table(source, "blocks.[01].att.time_faaaa") == [
        {"name": f"blocks.{layer}.att.time_faaaa", "shape": [4, 8], "dtype": "float32"} for layer in (0, 1)
    ]
    with pytest.raises(CheckpointError, match="no tensor matches 'att"):
        tensor_table(source, "att.*")


def test_bad_values_are_found(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("6", dtype=torch.float16))
    assert list(find_bad_tensors(source)) == []
    value = source.tensors["emb.weight"].read().clone()
    value[3, :2], value[49, 31], value[0, 0] = float("nan"), float("inf"), float("-inf")
    spoilt = dataclasses.replace(source, tensors={**source.tensors, "emb.weight": StoredTensor.of(value)})
    (bad,) = find_bad_tensors(spoilt)
    assert bad == ("emb.weight", 2, 2)


@pytest.mark.parametrize(
    ("version", "layers"),
    [
        ("6", "1 to 3: Finch"),
        ("5.2", "1 to 3: Eagle"),
        ("6c2", "1 to 3: Finch-C2"),
        ("goldfinch", "1 to 2: Finch-C2; 3: GOLD (attention)"),
        ("gptalpha", "1 to 3: GPTAlpha (attention)"),
    ],
)
def test_layers_in_words(make_finch: Callable[..., Finch], version: str, layers: str) -> None:
    source = tensors_of(make_finch(version))
    facts = model_facts(source)
    assert facts["layers"] == layers
    assert sum(facts["parts"].values()) == facts["parameters"]
    if version == "goldfinch":
        # [2, 32] and [32, 32 + 2].
        assert facts["parts"]["cache"] == 2 * 32 + 32 * 34


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["goldfinch", "gptalpha", "6c2"])
def test_what_is_kept_of_a_token(make_finch: Callable[..., Finch], version: str, dtype: torch.dtype) -> None:
    model = make_finch(version, dtype=dtype)
    facts = model_facts(tensors_of(model))
    _, state = model(torch.randint(0, 50, (1, 11)))
    measured = sum(part.numel() * part.itemsize for part in state.cache)
    if version == "6c2":
        assert measured == 0
        assert "cache_bytes_per_token" not in facts
        return
    assert 11 * facts["cache_bytes_per_token"] == measured
    assert facts["transformer_cache_bytes_per_token"] == 2 * 3 * 32 * dtype.itemsize


@pytest.mark.parametrize(("n_layer", "n_embd", "ratio"), [(24, 2048, 756.2), (80, 8192, 2550.0)])
def test_the_published_ratio_of_caches(n_layer: int, n_embd: int, ratio: float) -> None:
    config = new_config(version="goldfinch", n_layer=n_layer, n_embd=n_embd, vocab_size=100)
    with torch.device("meta"):
        facts = model_facts(tensors_of(Finch(config).bfloat16()))
    assert round(facts["transformer_cache_bytes_per_token"] / facts["cache_bytes_per_token"], 1) == ratio
