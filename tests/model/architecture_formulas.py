"""Finch-C2, GPTAlpha and GoldFinch as the GoldFinch paper writes them: one document, a token at a time, in float64.

What the tests of these architectures compare with. It knows a checkpoint's tensors by their official names and nothing
else of this project: no chunks, no carried state, no cache, no kernel. Lists run over the tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
# What a low-rank pair of mixes is for, in the order of its groups.
FINCH_GROUPS = ("w", "k", "v", "r", "g")
C2_GROUPS = ("r", "k", "v", "w", "v2")
ALPHA_GROUPS = ("r", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Untold:
    """What the tensors of a model do not tell."""

    head_size: int
    use_v2: bool = True
    use_one_minus_w: bool = True
    rope: bool = False


class Reading(NamedTuple):
    """What comes of a document of n tokens.

    logits [n, V]; of the last token, per layer: wkv [layers with one, H, key, value], att_shift and ffn_shift [L, C];
    of every token what is cached of it, [n, K] (GoldFinch: C/16 numbers; GPTAlpha: key and value of each layer; else
    none).
    """

    logits: Tensor
    wkv: Tensor
    att_shift: Tensor
    ffn_shift: Tensor
    cached: Tensor


def read_document(tensors: Tensors, tokens: Tensor, untold: Untold) -> Reading:
    """Read a document from its first token on; tokens int64 [n]."""
    num_layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    blocks = [_below(tensors, f"blocks.{i}.") for i in range(num_layers)]
    embedded = [_layer_norm(tensors["emb.weight"][t], _below(blocks[0], "ln0.")) for t in tokens]
    x, wkv, att_shift, ffn_shift, cached = embedded, [], [], [], []
    base: list[Tensor] = []
    for block in blocks:
        att = _below(block, "att.")
        kind = kind_of(att)
        if kind == "gold" and not base:
            # Once, between the two parts of the model; the residual stream as it is, without a norm.
            compressed = [tensors["w_kv_cache_a.weight"] @ residual for residual in x]
            base = [_token_cat(tensors, e, c) for e, c in zip(embedded, compressed, strict=True)]
            cached.append(torch.stack(compressed))
        h = [_layer_norm(residual, _below(block, "ln1.")) for residual in x]
        if kind == "gold":
            mixed = gold(att, h, untold, embedded=embedded, base=base)
        elif kind == "gptalpha":
            mixed, keys, values = gptalpha(att, h, untold)
            cached += [torch.stack(keys), torch.stack(values)]
        else:
            mixed, last = (finch_c2 if kind == "6c2" else finch)(att, h, untold)
            wkv.append(last)
        att_shift.append(h[-1])
        x = [residual + change for residual, change in zip(x, mixed, strict=True)]
        h = [_layer_norm(residual, _below(block, "ln2.")) for residual in x]
        ffn_shift.append(h[-1])
        x = [residual + change for residual, change in zip(x, channel_mix(_below(block, "ffn."), h), strict=True)]
    logits = [tensors["head.weight"] @ _layer_norm(residual, _below(tensors, "ln_out.")) for residual in x]
    heads = (x[0].shape[0] // untold.head_size, untold.head_size, untold.head_size)
    return Reading(
        logits=torch.stack(logits),
        wkv=torch.stack(wkv) if wkv else x[0].new_zeros(0, *heads),
        att_shift=torch.stack(att_shift),
        ffn_shift=torch.stack(ffn_shift),
        cached=torch.cat(cached, dim=1) if cached else x[0].new_zeros(len(x), 0),
    )


def kind_of(att: Tensors) -> str:
    """What a layer is, by the tensors of its time mix."""
    if "time_maa_q" in att:
        return "gold"
    if "query.weight" in att:
        return "gptalpha"
    return "6c2" if "time_maa_v2" in att else "6"


def channel_mix(p: Tensors, h: list[Tensor]) -> list[Tensor]:
    """The feed-forward half of a block, the same in all of them; h: n of [C]."""
    out = []
    for now, before in zip(h, _shifted(h), strict=True):
        for_key = now + (before - now) * p["time_maa_k"].flatten()
        for_receptance = now + (before - now) * p["time_maa_r"].flatten()
        hidden = torch.relu(p["key.weight"] @ for_key) ** 2
        out.append(torch.sigmoid(p["receptance.weight"] @ for_receptance) * (p["value.weight"] @ hidden))
    return out


def finch_c2(p: Tensors, h: list[Tensor], untold: Untold) -> tuple[list[Tensor], Tensor]:
    """Time mix of Finch-C2: without a gate; a second value in the place of the bonus; keys weakened by the decay.

    Returns n of [C], and the recurrent state [H, key, value] after the last token.
    """
    mixed = _mixed(p, h, C2_GROUPS)
    size = untold.head_size
    receptance, keys, values, decays, second = [], [], [], [], []
    for token in mixed:
        decay = _decay(p, token["w"])
        key = p["key.weight"] @ token["k"]
        receptance.append(p["receptance.weight"] @ token["r"])
        keys.append(key * (1 - decay) if untold.use_one_minus_w else key)
        values.append(p["value.weight"] @ token["v"])
        decays.append(decay)
        low_rank = torch.tanh(token["v2"] @ p["time_value2_w1"]) @ p["time_value2_w2"]
        second.append(p["value.weight"] @ token["v2"] + low_rank)
    bonus = torch.zeros_like(p["time_faaaa"]) if untold.use_v2 else p["time_faaaa"]
    read, last = _recurrence([receptance, keys, values, decays], bonus.reshape(-1, size), _first_state(p, size))
    if untold.use_v2:
        read = [y + v2 for y, v2 in zip(read, second, strict=True)]
    return [p["output.weight"] @ _layer_norm(y, _below(p, "ln_x.")) for y in read], last


def finch(p: Tensors, h: list[Tensor], untold: Untold) -> tuple[list[Tensor], Tensor]:
    """Time mix of Finch, which may be the front of a GoldFinch; returns as `finch_c2`."""
    mixed = _mixed(p, h, FINCH_GROUPS)
    size = untold.head_size
    inputs = [[p[f"{name}.weight"] @ token[name[0]] for token in mixed] for name in ("receptance", "key", "value")]
    decays = [_decay(p, token["w"]) for token in mixed]
    read, last = _recurrence([*inputs, decays], p["time_faaaa"].reshape(-1, size), _first_state(p, size))
    out = []
    for token, y in zip(mixed, read, strict=True):
        by_head = y.view(-1, size)
        centred = by_head - by_head.mean(dim=1, keepdim=True)
        normed = (centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 64e-5)).flatten()
        gate = p["gate.weight"] @ token["g"]
        gated = (normed * p["ln_x.weight"] + p["ln_x.bias"]) * gate * torch.sigmoid(gate)
        out.append(p["output.weight"] @ gated)
    return out, last


def gptalpha(p: Tensors, h: list[Tensor], untold: Untold) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Time mix of GPTAlpha: softmax attention behind a token shift; returns output, keys, values: n of [C] each."""
    mixed = _mixed(p, h, ALPHA_GROUPS)
    # The receptance's mix and norm are the query's.
    queries = [_layer_norm(p["query.weight"] @ token["r"], _below(p, "ln_r.")) for token in mixed]
    keys = [_layer_norm(p["key.weight"] @ token["k"], _below(p, "ln_k.")) for token in mixed]
    values = [_layer_norm(p["value.weight"] @ token["v"], _below(p, "ln_v.")) for token in mixed]
    seen = _attention(queries, keys, values, untold)
    return [p["output.weight"] @ _layer_norm(y, _below(p, "ln_x.")) for y in seen], keys, values


def gold(p: Tensors, h: list[Tensor], untold: Untold, *, embedded: list[Tensor], base: list[Tensor]) -> list[Tensor]:
    """Time mix of GOLD: attention whose keys and values are made of what all its layers share.

    Args: h, n of [C]: the layer's input. embedded, n of [C]: the normed embeddings. base, n of [C]: see `_token_cat`.
    """
    queries = []
    for now, before in zip(h, _shifted(h), strict=True):
        change = before - now
        low_rank = torch.tanh((now + change * p["time_maa_x"].flatten()) @ p["time_maa_q_w1"]) @ p["time_maa_q_w2"]
        query = p["query.weight"] @ (now + change * (p["time_maa_q"].flatten() + low_rank))
        queries.append(_layer_norm(query, _below(p, "ln_q.")))
    original = [_rms(e) for e in embedded]
    rank = p["time_maa_kv_w2"].shape[1]
    keys, values = [], []
    for now, before, key, key_before in zip(original, _shifted(original), base, _shifted(base), strict=True):
        change = before - now
        low = torch.tanh((now + change * p["time_maa_v_cache"].flatten()) @ p["time_maa_kv_w1"])
        mix_key = p["time_maa_k"].flatten() + low[:rank] @ p["time_maa_kv_w2"][0]
        mix_value = p["time_maa_v"].flatten() + low[rank:] @ p["time_maa_kv_w2"][1]
        k, v = key + (key_before - key) * mix_key, now + change * mix_value
        k = k + torch.tanh(k @ p["time_key_w1"]) @ p["time_key_w2"]
        v = v + torch.tanh(v @ p["time_value_w1"]) @ p["time_value_w2"]
        keys.append(_layer_norm(k, _below(p, "ln_k.")))
        values.append(_layer_norm(v, _below(p, "ln_v.")))
    seen = _attention(queries, keys, values, untold)
    return [p["output.weight"] @ _layer_norm(y, _below(p, "ln_x.")) for y in seen]


def _token_cat(tensors: Tensors, embedded: Tensor, compressed: Tensor) -> Tensor:
    """What all keys of a token are made of: its embedding first, then what was cached of it."""
    return _rms(tensors["w_kv_cache_b.weight"] @ torch.cat([embedded, compressed]))


def _mixed(p: Tensors, h: list[Tensor], groups: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Each token moved towards the one before it, for each group by another amount, which depends on the token."""
    rank = p["time_maa_w2"].shape[1]
    mixed = []
    for now, before in zip(h, _shifted(h), strict=True):
        change = before - now
        low = torch.tanh((now + change * p["time_maa_x"].flatten()) @ p["time_maa_w1"])
        token = {}
        for j, name in enumerate(groups):
            amount = p[f"time_maa_{name}"].flatten() + low[j * rank : (j + 1) * rank] @ p["time_maa_w2"][j]
            token[name] = now + change * amount
        mixed.append(token)
    return mixed


def _decay(p: Tensors, x: Tensor) -> Tensor:
    """In (0, 1), for each key channel."""
    raw = p["time_decay"].flatten() + torch.tanh(x @ p["time_decay_w1"]) @ p["time_decay_w2"]
    return torch.exp(-torch.exp(raw))


def _first_state(p: Tensors, size: int) -> Tensor:
    """Of a document: zeros, or the tuned one, which files hold with the value axis first."""
    if "time_state" in p:
        return p["time_state"].transpose(1, 2)
    width = p["receptance.weight"].shape[0]
    return p["receptance.weight"].new_zeros(width // size, size, size)


def _recurrence(inputs: list[list[Tensor]], bonus: Tensor, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Finch's: receptance, key, value, decay, n of [C] each; bonus [H, N]; state [H, key, value]."""
    out = []
    for token in zip(*inputs, strict=True):
        receptance, key, value, decay = (part.view(bonus.shape) for part in token)
        pair = key[:, :, None] * value[:, None, :]
        out.append((receptance[:, :, None] * (state + bonus[:, :, None] * pair)).sum(dim=1).flatten())
        state = decay[:, :, None] * state + pair
    return out, state


def _attention(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], untold: Untold) -> list[Tensor]:
    """Softmax attention of every token to itself and those before it, by heads; n of [C] each."""

    def by_head(x: Tensor) -> Tensor:
        return x.view(-1, untold.head_size)

    turn: Callable[[Tensor, int], Tensor] = _turned if untold.rope else lambda x, place: x
    turned_keys = [turn(by_head(key), place) for place, key in enumerate(keys)]
    out = []
    for place, query in enumerate(queries):
        turned = turn(by_head(query), place)
        scores = torch.stack([(turned * key).sum(dim=1) for key in turned_keys[: place + 1]]) / untold.head_size**0.5
        weights = torch.softmax(scores, dim=0)
        seen = torch.stack([by_head(value) for value in values[: place + 1]])
        out.append((weights[:, :, None] * seen).sum(dim=0).flatten())
    return out


def _turned(x: Tensor, place: int) -> Tensor:
    """Rotary positions of base 10000: lanes 2p and 2p + 1 of a head are turned by place · 10000^(-2p/N); [H, N]."""
    size = x.shape[1]
    angle = place * 10_000.0 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], 2).flatten(1)


def _layer_norm(x: Tensor, p: Tensors) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * p["weight"] + p["bias"]


def _rms(x: Tensor) -> Tensor:
    return x / (torch.sqrt((x**2).sum()) / x.shape[0] ** 0.5 + 1e-8)


def _shifted(x: list[Tensor]) -> list[Tensor]:
    """The token before each; zeros before the first."""
    return [torch.zeros_like(x[0]), *x[:-1]]


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
