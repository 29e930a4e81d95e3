"""Several models in one, each tensor held to the formula."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import build_model, tensors_of
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.merge import merge_models

Make = Callable[..., Finch]


def models(make_finch: Make, count: int, **sizes: object) -> list[ModelTensors]:
    return [
        dataclasses.replace(tensors_of(make_finch("6", seed=10 * seed, **sizes)), origin=f"{seed}.pth")
        for seed in range(count)
    ]


def assert_formula(result: ModelTensors, formula: Callable[[str], Tensor]) -> None:
    for name, stored in result.tensors.items():
        found = stored.read()
        assert (found.dtype, tuple(found.shape)) == (stored.dtype, stored.shape)
        torch.testing.assert_close(found.double(), formula(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_linear(make_finch: Make, is_normalised: bool) -> None:
    a, b, c = models(make_finch, 3, has_initial_state=True)
    result = merge_models([a, b, c], method="linear", weights=[1.0, 0.5, -0.25], is_normalised=is_normalised)
    total = 1.25 if is_normalised else 1.0

    def formula(name: str) -> Tensor:
        x, y, z = (model.tensors[name].read().double() for model in (a, b, c))
        return (x + 0.5 * y - 0.25 * z) / total

    assert_formula(result, formula)
    assert build_model(result).config == a.config


def test_slerp(make_finch: Make) -> None:
    a, b = models(make_finch, 2)
    result = merge_models([a, b], method="slerp", weights=[0.9, 0.3])

    def formula(name: str) -> Tensor:
        x, y = (model.tensors[name].read().double() for model in (a, b))
        cosine = float((x * y).sum() / x.norm() / y.norm())
        if abs(cosine) > 0.9995:
            return 0.75 * x + 0.25 * y
        angle = math.acos(cosine)
        return (math.sin(0.75 * angle) * x + math.sin(0.25 * angle) * y) / math.sin(angle)

    assert_formula(result, formula)
    name = "blocks.0.att.key.weight"
    x, y = (model.tensors[name].read().double() for model in (a, b))
    assert abs(float((x * y).sum() / x.norm() / y.norm())) < 0.5
    assert (result.tensors[name].read() - (0.75 * x + 0.25 * y)).norm() > 0.1 * x.norm()


def with_tensor(model: ModelTensors, name: str, value: Tensor) -> ModelTensors:
    return dataclasses.replace(model, tensors={**model.tensors, name: StoredTensor.of(value)})


def test_slerp_where_there_is_no_arc(make_finch: Make) -> None:
    (a,) = models(make_finch, 1)
    name = "blocks.0.att.receptance.weight"
    start = a.tensors[name].read()
    for end in (3 * start, -2 * start, torch.zeros_like(start), start + 1e-4 * torch.randn(start.shape)):
        result = merge_models([a, with_tensor(a, name, end)], method="slerp", weights=[1.0, 1.0])
        torch.testing.assert_close(result.tensors[name].read(), 0.5 * start + 0.5 * end)


def test_slerp_keeps_the_length_of_orthogonal_tensors(make_finch: Make) -> None:
    (a,) = models(make_finch, 1)
    name = "blocks.0.att.key.weight"
    basis = torch.linalg.qr(torch.randn(1024, 2))[0]
    start, end = (column.reshape(32, 32).contiguous() for column in basis.t())
    pair = [with_tensor(a, name, start), with_tensor(a, name, end)]
    merged = merge_models(pair, method="slerp", weights=[2.0, 1.0]).tensors[name].read()
    assert merged.norm() == pytest.approx(1.0, abs=1e-5)
    assert float((merged * start).sum()) == pytest.approx(math.cos(math.pi / 6), abs=1e-5)


def test_task_arithmetic(make_finch: Make) -> None:
    base, a, b = models(make_finch, 3)
    result = merge_models([a, b], method="task", weights=[0.7, 1.5], base=base)

    def formula(name: str) -> Tensor:
        origin, x, y = (model.tensors[name].read().double() for model in (base, a, b))
        return origin + 0.7 * (x - origin) + 1.5 * (y - origin)

    assert_formula(result, formula)
    alone = merge_models([a], method="task", weights=[1.0], base=base)
    assert_formula(alone, lambda name: a.tensors[name].read().double())


def test_dtypes(make_finch: Make) -> None:
    a, b = (tensors_of(make_finch("6", seed=seed, dtype=torch.bfloat16)) for seed in (0, 5))
    name = "blocks.1.ffn.key.weight"
    x, y = (model.tensors[name].read().float() for model in (a, b))
    kept = merge_models([a, b], method="linear", weights=[1.0, 2.0]).tensors[name].read()
    # Rounded once, at the end: half of bf16's last place.
    torch.testing.assert_close(kept.float(), (x + 2 * y) / 3, rtol=1.001 * 2**-8, atol=1e-7)
    exact = merge_models([a, b], method="linear", weights=[1.0, 2.0], dtype=torch.float32).tensors[name]
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.read(), (x + 2 * y) / 3, rtol=1e-5, atol=1e-6)
    wide = [tensors_of(make_finch("6", seed=seed, dtype=torch.float64)) for seed in (0, 5)]
    merged = merge_models(wide, method="linear", weights=[1.0, 2.0]).tensors[name].read()
    x, y = (model.tensors[name].read() for model in wide)
    torch.testing.assert_close(merged, (x + 2 * y) / 3, rtol=1e-14, atol=1e-14)


def test_a_whole_weight_gives_the_model_itself(make_finch: Make) -> None:
    a, b = models(make_finch, 2)
    spoilt = with_tensor(b, "emb.weight", torch.full((50, 32), float("inf")))
    for method in ("linear", "slerp"):
        other = spoilt if method == "linear" else b
        result = merge_models([a, other], method=method, weights=[1.0, 0.0])
        assert all(torch.equal(result.tensors[name].read(), a.tensors[name].read()) for name in a.tensors)
    same = merge_models([a, a], method="linear", weights=[0.5, 0.5])
    assert all(torch.equal(same.tensors[name].read(), a.tensors[name].read()) for name in a.tensors)


def test_one_tensor_of_each_at_a_time(make_finch: Make) -> None:
    reads: list[str] = []

    def counted(model: ModelTensors) -> ModelTensors:
        def read(name: str) -> Tensor:
            reads.append(name)
            return model.tensors[name].read()

        tensors = {
            name: StoredTensor(stored.shape, stored.dtype, lambda name=name: read(name))
            for name, stored in model.tensors.items()
        }
        return dataclasses.replace(model, tensors=tensors)

    a, b = (counted(model) for model in models(make_finch, 2))
    for method in ("linear", "slerp"):
        result = merge_models([a, b], method=method, weights=[1.0, 1.0])
        assert reads == []
        result.tensors["head.weight"].read()
        assert reads == ["head.weight"] * 2
        reads.clear()


@pytest.mark.parametrize(
    ("method", "weights", "count", "words"),
    [
        ("mean", [1.0, 1.0], 2, "'mean'.*linear, slerp, task"),
        ("linear", [1.0], 2, "expected 2 finite numbers"),
        ("linear", [1.0, float("nan")], 2, "finite"),
        ("linear", [1.0, -1.0], 2, "their sum is 0"),
        ("linear", [1.0], 1, "two or more models, got 1"),
        ("slerp", [1.0, 1.0, 1.0], 3, "two models, got 3"),
        ("slerp", [1.0, -0.5], 2, "none below 0"),
        ("task", [1.0], 1, "expected the base"),
    ],
)
def test_refused(make_finch: Make, method: str, weights: list[float], count: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        merge_models(models(make_finch, count), method=method, weights=weights)


def test_a_base_or_plain_weights_where_they_mean_nothing(make_finch: Make) -> None:
    a, b, c = models(make_finch, 3)
    with pytest.raises(CheckpointError, match="takes no base"):
        merge_models([a, b], method="linear", weights=[1.0, 1.0], base=c)
    with pytest.raises(CheckpointError, match="always normalised"):
        merge_models([a, b], method="slerp", weights=[1.0, 1.0], is_normalised=False)


def test_models_that_do_not_fit(make_finch: Make) -> None:
    a, b = models(make_finch, 2)
    pairs = [
        (make_finch("5.2"), r"other\.pth: expected version 6 as 0\.pth, found 5\.2"),
        (make_finch("6", vocab_size=60), r"other\.pth: tensor emb\.weight: expected shape \[50, 32\].*\[60, 32\]"),
        (make_finch("6", decay_rank=5), r"time_decay_w1: expected shape \[32, 6\].*\[32, 5\]"),
        (make_finch("6", n_layer=2), r"other\.pth: tensor blocks\.2\.ln1\.weight is missing; 0\.pth has it"),
        (make_finch("6", has_initial_state=True), r"0\.pth: tensor blocks\.0\.att\.time_state is missing; other\.pth"),
    ]
    for model, words in pairs:
        other = dataclasses.replace(tensors_of(model), origin="other.pth")
        with pytest.raises(CheckpointError, match=words):
            merge_models([a, other], method="linear", weights=[1.0, 1.0])
        with pytest.raises(CheckpointError, match=words):
            merge_models([a, b], method="task", weights=[1.0, 1.0], base=other)
    named = [dataclasses.replace(a, tokenizer="world"), dataclasses.replace(b, tokenizer="bytes")]
    with pytest.raises(CheckpointError, match=r"1\.pth: expected the tokenizer 'world'"):
        merge_models(named, method="linear", weights=[1.0, 1.0])
    assert merge_models([a, named[1]], method="linear", weights=[1.0, 1.0]).tokenizer == "bytes"
