"""GOLD's attention over its cache: each document alone, all at once, by the formulas of the paper in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infctx.model import cached_attention
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.gold import CachedKeys, GoldTimeMix, TokenCat
from infctx.model.layer_norm import LayerNorm
from infctx.model.seen_tokens import SeenTokens, mark_starts
from infctx.model.time_parallel import TimeGroup

ROWS, TOKENS, CHANNELS, HEADS, SIZE, LERP_RANK, CACHE_RANK = 2, 23, 16, 2, 8, 3, 2
STARTS = ((0, 14), (0, 5, 19))


class Parts(nn.Module):
    """A layer and what it shares with others, with random weights."""

    def __init__(self, *, uses_rope: bool) -> None:
        super().__init__()
        config = FinchConfig(
            version="6",
            n_layer=1,
            n_embd=CHANNELS,
            vocab_size=30,
            head_size=SIZE,
            n_head=HEADS,
            dim_ffn=8,
            lerp_rank=LERP_RANK,
            key_value_rank=5,
            cache_rank=CACHE_RANK,
            uses_rope=uses_rope,
        )
        self.layer, self.token_cat = GoldTimeMix(config), TokenCat(config)
        self.embedding, self.input_norm = nn.Embedding(30, CHANNELS), LayerNorm(CHANNELS)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            nn.init.normal_(parameter, 1.0 if is_scale else 0.0, 0.2 if is_scale else 0.5, generator=generator)
        self.double()


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, residual stream, starts and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 30, (ROWS, TOKENS), generator=generator)
    x, gradient = torch.randn(2, ROWS, TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    starts = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    for row, places in enumerate(STARTS):
        starts[row, list(places)] = True
    return tokens, x.requires_grad_(), starts, gradient


def in_chunks(parts: Parts, tokens: Tensor, x: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
    past_tokens = torch.zeros(ROWS, 0, dtype=torch.int32)
    past = torch.zeros(ROWS, 0, CACHE_RANK, dtype=torch.float64)
    shift, outputs, begin = torch.zeros(ROWS, CHANNELS, dtype=torch.float64), [], 0
    for length in lengths:
        place = slice(begin, begin + length)
        own_tokens = mark_starts(tokens[:, place], starts[:, place], is_first=begin == 0)
        own = parts.token_cat.compress(x[:, place])
        keys = CachedKeys(
            SeenTokens(past_tokens, own_tokens),
            past,
            own,
            embedding=parts.embedding,
            embedding_norm=parts.input_norm,
            token_cat=parts.token_cat,
        )
        output, shift = parts.layer(x[:, place], shift, keys, starts[:, place])
        outputs.append(output)
        past_tokens, past = torch.cat([past_tokens, own_tokens], dim=1), torch.cat([past, own], dim=1)
        begin += length
    return torch.cat(outputs, dim=1)


def one_document(parts: Parts, tokens: Tensor, x: Tensor) -> Tensor:
    """[n] ids, [n, C] -> [n, C]."""
    layer, token_cat = parts.layer, parts.token_cat

    def rms(z: Tensor) -> Tensor:
        return z / (z.norm(dim=-1, keepdim=True) / z.shape[-1] ** 0.5 + 1e-8)

    def towards(z: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(z[:1]), z[:-1]]) - z

    def by_head(z: Tensor) -> Tensor:
        z = z.view(len(x), HEADS, SIZE)
        if layer.uses_rope:
            rates = 10_000.0 ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
            angles = torch.arange(len(x))[:, None] * rates
            turned = torch.view_as_complex(z.reshape(len(x), HEADS, SIZE // 2, 2).contiguous())
            z = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
        return z.transpose(0, 1)

    embedded = parts.input_norm(parts.embedding(tokens))
    base = rms(torch.cat([embedded, x @ token_cat.compress.weight.T], dim=-1) @ token_cat.decompress.weight.T)
    original, to_query = rms(embedded), towards(x)
    lerp_query = torch.tanh((x + to_query * layer.lerp_input) @ layer.lerp_query_down) @ layer.lerp_query_up
    query = layer.query_norm((x + to_query * (layer.lerp_query + lerp_query)) @ layer.query.weight.T)
    low = torch.tanh((original + towards(original) * layer.lerp_cache) @ layer.lerp_cache_down)
    lerp_key, lerp_value = low[:, :LERP_RANK] @ layer.lerp_cache_up[0], low[:, LERP_RANK:] @ layer.lerp_cache_up[1]
    key = base + towards(base) * (layer.lerp_key + lerp_key)
    value = original + towards(original) * (layer.lerp_value + lerp_value)
    key = layer.key_norm(key + torch.tanh(key @ layer.key_down) @ layer.key_up)
    value = layer.value_norm(value + torch.tanh(value @ layer.value_down) @ layer.value_up)
    value = value.view(len(x), HEADS, SIZE).transpose(0, 1)
    mixed = F.scaled_dot_product_attention(by_head(query), by_head(key), value, is_causal=True)
    return layer.output_norm(mixed.transpose(0, 1).reshape(len(x), -1)) @ layer.output.weight.T


def whole(parts: Parts, tokens: Tensor, x: Tensor) -> Tensor:
    rows = []
    for row, places in enumerate(STARTS):
        ends = [*places[1:], TOKENS]
        rows += [one_document(parts, tokens[row, a:b], x[row, a:b]) for a, b in zip(places, ends, strict=True)]
    return torch.cat(rows).view(ROWS, TOKENS, CHANNELS)


@pytest.mark.parametrize("lengths", [[23], [1] * 23, [7, 1, 9, 6]], ids=["whole", "single tokens", "ragged"])
@pytest.mark.parametrize("uses_rope", [False, True])
def test_chunks_are_the_documents_alone(lengths: list[int], uses_rope: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, and the gradient of every parameter and of the input."""
    monkeypatch.setattr(cached_attention, "KEYS_AT_ONCE", 6)
    monkeypatch.setattr(cached_attention, "SCORES_AT_ONCE", 200)
    parts = Parts(uses_rope=uses_rope)
    tokens, x, starts, gradient = make_inputs()
    found, expected = in_chunks(parts, tokens, x, starts, lengths), whole(parts, tokens, x)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    names = [name for name, _ in parts.named_parameters()] + ["x"]
    inputs = [*parts.parameters(), x]
    pairs = zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    )
    for name, (ours, theirs) in zip(names, pairs, strict=True):
        if name == "layer.key_norm.bias" and not uses_rope:
            # A shift of all keys alike changes no softmax.
            assert ours.abs().max() < 1e-12
            continue
        assert float((ours - theirs).norm()) <= 1e-12 * float(theirs.norm()), name


def test_a_slice_of_a_chunk_is_refused(make_finch: Callable[..., Finch]) -> None:
    """Its queries would see their own slice alone."""
    group = TimeGroup(None, rank=0, size=2)
    with pytest.raises(ValueError, match="the last 1 of the 3 layers of a GoldFinch attend"):
        make_finch("goldfinch").use_time_group(group)
    make_finch("6c2").use_time_group(group)
    make_finch("goldfinch").use_time_group(None)
