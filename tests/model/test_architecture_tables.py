"""Finch-C2, GPTAlpha and GoldFinch: names and shapes of their tensors, fresh values, and the size of the cache.

Written out by hand from the paper's code and text; the numbers of parameters are sums on paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import official_tensors
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config

LAYERS, CHANNELS, HEADS, SIZE, VOCABULARY, HIDDEN = 6, 128, 2, 64, 300, 448
MIX, MATRIX, VECTOR = (1, 1, 128), (128, 128), (128,)

FINCH = {
    **dict.fromkeys((f"time_maa_{name}" for name in "xwkvrg"), MIX),
    "time_maa_w1": (128, 160),
    "time_maa_w2": (5, 32, 128),
    "time_decay": MIX,
    "time_decay_w1": (128, 64),
    "time_decay_w2": (64, 128),
    "time_faaaa": (2, 64),
    **dict.fromkeys((f"{name}.weight" for name in ("receptance", "key", "value", "gate", "output")), MATRIX),
    "ln_x.weight": VECTOR,
    "ln_x.bias": VECTOR,
}
FINCH_C2 = {
    **dict.fromkeys((f"time_maa_{name}" for name in ("x", "r", "k", "v", "w", "v2")), MIX),
    "time_maa_w1": (128, 160),
    "time_maa_w2": (5, 32, 128),
    "time_decay": MIX,
    "time_decay_w1": (128, 64),
    "time_decay_w2": (64, 128),
    "time_value2_w1": (128, 64),
    "time_value2_w2": (64, 128),
    "time_faaaa": (2, 64),
    **dict.fromkeys((f"{name}.weight" for name in ("receptance", "key", "value", "output")), MATRIX),
    "ln_x.weight": VECTOR,
    "ln_x.bias": VECTOR,
}
GPTALPHA = {
    **dict.fromkeys((f"time_maa_{name}" for name in "xrkv"), MIX),
    "time_maa_w1": (128, 96),
    "time_maa_w2": (3, 32, 128),
    **dict.fromkeys((f"{name}.weight" for name in ("query", "key", "value", "output")), MATRIX),
    **dict.fromkeys((f"ln_{name}.{part}" for name in "rkvx" for part in ("weight", "bias")), VECTOR),
}
GOLD = {
    **dict.fromkeys((f"time_maa_{name}" for name in ("x", "q", "k", "v", "v_cache")), MIX),
    "time_maa_q_w1": (128, 32),
    "time_maa_q_w2": (32, 128),
    "time_maa_kv_w1": (128, 64),
    "time_maa_kv_w2": (2, 32, 128),
    "time_key_w1": (128, 64),
    "time_key_w2": (64, 128),
    "time_value_w1": (128, 64),
    "time_value_w2": (64, 128),
    "query.weight": MATRIX,
    "output.weight": MATRIX,
    **dict.fromkeys((f"ln_{name}.{part}" for name in "qkvx" for part in ("weight", "bias")), VECTOR),
}
CHANNEL_MIX = {
    "time_maa_k": MIX,
    "time_maa_r": MIX,
    "key.weight": (448, 128),
    "receptance.weight": MATRIX,
    "value.weight": (128, 448),
}
AROUND = {
    "emb.weight": (300, 128),
    "blocks.0.ln0.weight": VECTOR,
    "blocks.0.ln0.bias": VECTOR,
    "ln_out.weight": VECTOR,
    "ln_out.bias": VECTOR,
    "head.weight": (300, 128),
}
CACHE = {"w_kv_cache_a.weight": (8, 128), "w_kv_cache_b.weight": (128, 136)}
# version and front -> the time mix of each layer, what else there is, and the number of parameters.
KINDS: dict[tuple[str, str | None], tuple[list[dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]], int]] = {
    ("6c2", None): ([FINCH_C2] * 6, {}, 1_711_616),
    ("gptalpha", None): ([GPTALPHA] * 6, {}, 1_418_240),
    ("goldfinch", None): ([FINCH_C2] * 4 + [GOLD] * 2, CACHE, 1_632_512),
    ("goldfinch", "6"): ([FINCH] * 4 + [GOLD] * 2, CACHE, 1_632_512),
}


def make_fresh(version: str, front: str | None, *, vocab_size: int = VOCABULARY) -> Finch:
    config = new_config(version=version, front=front, n_layer=LAYERS, n_embd=CHANNELS, vocab_size=vocab_size)
    model = Finch(config)
    initialise_(model, seed=0)
    return model


@pytest.mark.parametrize(("version", "front"), KINDS)
def test_names_and_shapes(version: str, front: str | None) -> None:
    time_mixes, more, count = KINDS[version, front]
    expected = AROUND | more
    for i, time_mix in enumerate(time_mixes):
        expected |= {f"blocks.{i}.att.{name}": shape for name, shape in time_mix.items()}
        expected |= {f"blocks.{i}.ffn.{name}": shape for name, shape in CHANNEL_MIX.items()}
        expected |= {f"blocks.{i}.ln{n}.{part}": VECTOR for n in (1, 2) for part in ("weight", "bias")}
    model = make_fresh(version, front)
    assert {name: tuple(tensor.shape) for name, tensor in official_tensors(model).items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("ratio", "recurrent"), [(3, (4, 8, 16, 21)), (6, (5, 10, 20, 26)), (2, (3, 6, 12, 16))])
def test_layers_of_each_kind(ratio: int, recurrent: tuple[int, ...]) -> None:
    for n_layer, expected in zip((6, 12, 24, 32), recurrent, strict=True):
        config = new_config(version="goldfinch", n_layer=n_layer, n_embd=768, vocab_size=300, ratio=ratio)
        assert config.n_recurrent == expected
        assert [config.kind(layer) for layer in range(n_layer)] == ["6c2"] * expected + ["gold"] * (n_layer - expected)


Check = Callable[[Tensor, int], None]


def curve(values: Callable[[float, float, Tensor], Tensor]) -> Check:
    """up: 0 in the first layer, 1 in the last. down: 1 in the first, almost 0 in the last. x: place of a channel."""

    def check(found: Tensor, layer: int) -> None:
        x = torch.arange(CHANNELS, dtype=torch.float64) / CHANNELS
        expected = values(layer / (LAYERS - 1), 1 - layer / LAYERS, x)
        torch.testing.assert_close(found.flatten().double(), expected, rtol=1e-6, atol=1e-6)

    return check


def constant(value: float) -> Check:
    return lambda found, layer: torch.testing.assert_close(found, torch.full_like(found, value), rtol=0, atol=0)


def uniform(bound: float) -> Check:
    def check(found: Tensor, layer: int) -> None:
        assert float(found.abs().max()) <= bound
        # Of so many numbers, the spread of a uniform one within a tenth.
        assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(float(found.mean())) < 0.1 * bound

    return check


def orthogonal(gain: float) -> Check:
    """Rows, or columns where they are fewer, of length `gain` and at right angles."""

    def check(found: Tensor, layer: int) -> None:
        shorter = found.double() if found.shape[0] <= found.shape[1] else found.double().T
        expected = gain**2 * torch.eye(len(shorter), dtype=torch.float64)
        torch.testing.assert_close(shorter @ shorter.T, expected, rtol=0, atol=2e-6 * max(1.0, gain**2))

    return check


def place(x: Tensor) -> Tensor:
    """0 at the first channel, 1 at the last."""
    return x * CHANNELS / (CHANNELS - 1)


def zigzag(x: Tensor) -> Tensor:
    return 0.1 * ((torch.arange(len(x)) + 1) % 3 - 1)


# What a name ends in -> what is checked; the first that fits.
RULES: list[tuple[str, Check]] = [
    (r"^emb\.weight", uniform(1e-4)),
    (r"att\.ln_x\.weight", curve(lambda up, down, x: torch.full_like(x, (1 - down + 1 / LAYERS) ** 0.7))),
    (r"\.ln_\w\.weight|\.ln[012]\.weight|^ln_out\.weight", constant(1.0)),
    (r"\.ln_\w\.bias|\.ln[012]\.bias|^ln_out\.bias", constant(0.0)),
    (r"att\..*_w1", constant(0.0)),
    (r"att\..*_w2", uniform(0.01)),
    (r"att\.time_maa_(x|k|w|v_cache)", curve(lambda up, down, x: 1 - x**down)),
    (r"att\.time_maa_(r|q|g)", curve(lambda up, down, x: 1 - x ** (0.5 * down))),
    (r"att\.time_maa_(v|v2)", curve(lambda up, down, x: 1 - (x**down + 0.3 * up))),
    (r"att\.time_decay", curve(lambda up, down, x: -6 + 5 * place(x) ** (0.7 + 1.3 * up))),
    (r"att\.time_faaaa", curve(lambda up, down, x: up * (1 - place(x)) + zigzag(x))),
    (r"att\.(query|receptance|value)\.weight", orthogonal(1.0)),
    (r"att\.(key|gate)\.weight", orthogonal(0.1)),
    (r"att\.output\.weight", constant(0.0)),
    (r"ffn\.time_maa_(k|r)", curve(lambda up, down, x: 1 - x**down)),
    (r"ffn\.key\.weight", orthogonal(1.0)),
    (r"ffn\.(value|receptance)\.weight", constant(0.0)),
    (r"^w_kv_cache_[ab]\.weight", orthogonal(1.0)),
]


@pytest.mark.parametrize(("version", "front"), KINDS)
def test_fresh_values(version: str, front: str | None) -> None:
    """Every tensor, by one rule."""
    head = {"head.weight"}
    for name, tensor in official_tensors(make_fresh(version, front)).items():
        if name in head:
            continue
        check = next(check for pattern, check in RULES if re.search(pattern + "$", name))
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        try:
            check(tensor, layer)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_the_heads_gain_is_that_of_the_vocabulary() -> None:
    for vocab_size, gain in ((300, 0.5 * (300 / 128) ** 0.5), (100, 0.5)):
        model = make_fresh("goldfinch", None, vocab_size=vocab_size)
        orthogonal(gain)(model.head.weight.detach(), 0)


def cache_bytes(version: str, n_embd: int, dtype: torch.dtype) -> tuple[float, int]:
    """Bytes that the state has for each token, and those of one number of it."""
    config = new_config(version=version, n_layer=3, n_embd=n_embd, vocab_size=40, head_size=32, dim_ffn=64)
    model = Finch(config)
    initialise_(model, seed=0)
    model = model.to(dtype)
    with torch.no_grad():
        _, state = model(torch.randint(40, (2, 9)))
        _, state = model(torch.randint(40, (2, 4)), state)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.cache)
    return total / (2 * 13), state.cached.element_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_cached_of_a_token(dtype: torch.dtype) -> None:
    """Its id and a sixteenth of its channels in a GoldFinch; of a Finch-C2 nothing."""
    for n_embd in (64, 256):
        found, item_bytes = cache_bytes("goldfinch", n_embd, dtype)
        assert found == 4 + n_embd // 16 * item_bytes
        # As the model computes it: nothing is rounded, and nothing takes more than it holds.
        assert item_bytes == dtype.itemsize
    found, item_bytes = cache_bytes("gptalpha", 64, dtype)
    assert found == 4 + 3 * 2 * 64 * item_bytes
    with torch.no_grad():
        assert not make_fresh("6c2", None)(torch.tensor([[1, 2]]))[1].has_cache


@pytest.mark.parametrize(("n_layer", "n_embd", "times"), [(24, 2048, 756.2), (80, 8192, 2550.0)])
def test_how_much_smaller_the_cache_is_than_keys_and_values(n_layer: int, n_embd: int, times: float) -> None:
    """The paper's figures: in bf16, against a key and a value of every layer."""
    config = new_config(version="goldfinch", n_layer=n_layer, n_embd=n_embd, vocab_size=65536)
    assert config.cache_width == n_embd // 16
    plain = 2 * n_layer * n_embd * 2
    assert plain / (2 * config.cache_width + 4) == pytest.approx(times, abs=0.05)
