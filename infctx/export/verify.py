"""Proof of an export: read it back and compare its logits with the source's, one layer in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infctx.errors import CheckpointError
from infctx.model import finch_keys
from infctx.model.block import Block
from infctx.model.finch import Finch
from infctx.model.gold import CachedKeys, GoldTimeMix, TokenCat
from infctx.model.layer_norm import LayerNorm
from infctx.model.seen_tokens import SeenTokens, mark_starts
from infctx.model.state import ModelState
from infctx.model.tensors import ModelTensors

PROBE_TOKENS = 64
# Rows of the head that are float32 at once.
_HEAD_ROWS = 8192


def max_logit_difference(expected: Finch | ModelTensors, found: Finch | ModelTensors) -> float:
    """Largest absolute difference between the logits of two models over a fixed probe sequence, in float32.

    Raises:
        CheckpointError: either has logits that are not finite, so that nothing can be compared.
    """
    return float((probe_logits(found) - probe_logits(expected)).abs().max())


@torch.no_grad()
def probe_logits(
    model: Finch | ModelTensors, *, dtype: torch.dtype = torch.float32, num_ids: int | None = None
) -> Tensor:
    """Logits of the probe sequence, [T, V], computed in `dtype` on the CPU whatever the weights are stored in.

    A model of 14B parameters takes the memory of one layer and of its embedding, in a GoldFinch also of what all GOLD
    layers share: each layer is read, used and dropped.
    Args: num_ids: the probe is of ids below this, for models that share no others; None = of all.
    Raises:
        CheckpointError: they are not finite.
    """
    parts = _parts_of_model(model, dtype) if isinstance(model, Finch) else _parts_of_tensors(model, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, num_ids or model.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    x = _through_blocks(parts, parts.embed(tokens), tokens, model, dtype)
    logits = parts.head(x)[0]
    if not bool(torch.isfinite(logits).all()):
        origin = "the model" if isinstance(model, Finch) else model.origin
        raise CheckpointError(
            f"the logits of {origin} are not finite; nothing was written. The weights are damaged, the training "
            "diverged, or they are too large for this dtype."
        )
    return logits


class _Parts(NamedTuple):
    """embed: tokens -> normalised embeddings. blocks: one after the other. head: residual stream -> logits.

    shared: what GOLD's layers share, the embedding, the norm behind it, and the matrices around the cache."""

    embed: Callable[[Tensor], Tensor]
    blocks: Callable[[], Iterator[nn.Module]]
    head: Callable[[Tensor], Tensor]
    shared: Callable[[], tuple[nn.Embedding, LayerNorm, TokenCat]]


def _through_blocks(
    parts: _Parts, x: Tensor, tokens: Tensor, model: Finch | ModelTensors, dtype: torch.dtype
) -> Tensor:
    """The residual stream behind the last layer, of one document from its beginning."""
    zeros = ModelState.zeros(model.config, 1, dtype=dtype, device="cpu")
    marked = mark_starts(tokens, None, is_first=True)
    seen, keys = SeenTokens(marked[:, :0], marked), None
    for layer, block in enumerate(parts.blocks()):
        att_shift, ffn_shift = zeros.att_shift[layer], zeros.ffn_shift[layer]
        if block.time_mix.initial_shift is not None:
            att_shift = block.time_mix.initial_shift[None].to(dtype)
            ffn_shift = block.channel_mix.initial_shift[None].to(dtype)
        if isinstance(block, Block):
            wkv = zeros.wkv[layer]
            if block.time_mix.initial_state is not None:
                wkv = block.time_mix.initial_state[None].to(dtype)
            x, *_ = block(x, wkv, att_shift, ffn_shift, None)
        elif isinstance(block.time_mix, GoldTimeMix):
            if keys is None:
                embedding, norm, token_cat = parts.shared()
                own = token_cat.compress(x)
                keys = CachedKeys(seen, own[:, :0], own, embedding=embedding, embedding_norm=norm, token_cat=token_cat)
            x, *_ = block(x, keys, None, att_shift, ffn_shift, None)
        else:
            past = x.new_zeros(1, 0, 2 * model.config.dim_att)
            x, *_ = block(x, seen, past, att_shift, ffn_shift, None)
    return x


def _parts_of_model(model: Finch, dtype: torch.dtype) -> _Parts:
    """Copies of a model's modules, so that adapters in them take part; the model is left as it is."""

    def embed(tokens: Tensor) -> Tensor:
        return _copied(model.input_norm, dtype)(model.embedding(tokens).to(dtype))

    def blocks() -> Iterator[nn.Module]:
        for block in model.blocks:
            yield _copied(block, dtype)

    def shared() -> tuple[nn.Embedding, LayerNorm, TokenCat]:
        return model.embedding, _copied(model.input_norm, dtype), _copied(model.token_cat, dtype)

    def head(x: Tensor) -> Tensor:
        hidden = _copied(model.output_norm, dtype)(x)
        if type(model.head) is not nn.Linear and not hasattr(model.head, "base_layer"):
            return _times_rows(hidden, model.head.weight, dtype)
        return _copied(model.head, dtype)(hidden)

    return _Parts(embed, blocks, head, shared)


def _parts_of_tensors(source: ModelTensors, dtype: torch.dtype) -> _Parts:
    def norm(name: str) -> LayerNorm:
        module = LayerNorm(source.config.n_embd, eps=source.config.layer_norm_eps).to(dtype)
        module.weight.copy_(source.tensors[f"{name}.weight"].read())
        module.bias.copy_(source.tensors[f"{name}.bias"].read())
        return module

    def embed(tokens: Tensor) -> Tensor:
        return norm("blocks.0.ln0")(source.tensors["emb.weight"].read()[tokens].to(dtype))

    def blocks() -> Iterator[nn.Module]:
        starts = finch_keys.start_parameters(source.tensors)
        rows = list(finch_keys.key_rows(source.config, **starts))
        with torch.device("meta"):
            model = Finch(source.config, **starts)
        for layer, block in enumerate(model.blocks):
            prefix = f"blocks.{layer}."
            for row in rows:
                if row.ours.startswith(prefix):
                    name = row.ours.removeprefix(prefix)
                    stored = source.tensors[row.official].read()
                    value = finch_keys.from_official(row, stored, block.get_parameter(name).shape, file=source.origin)
                    owner, _, last = name.rpartition(".")
                    setattr(block.get_submodule(owner), last, nn.Parameter(value.to(dtype).contiguous()))
            yield block
            # Not before the next one has been asked for, and then gone.
            model.blocks[layer] = nn.Identity()
            del block

    def head(x: Tensor) -> Tensor:
        return _times_rows(norm("ln_out")(x), source.tensors["head.weight"].read(), dtype)

    def shared() -> tuple[nn.Embedding, LayerNorm, TokenCat]:
        with torch.device("meta"):
            token_cat, embedding = TokenCat(source.config), nn.Embedding(1, 1)
        for matrix, row in zip((token_cat.compress, token_cat.decompress), finch_keys.TOKEN_CAT_ROWS, strict=True):
            matrix.weight = nn.Parameter(source.tensors[row.official].read().to(dtype))
        embedding.weight = nn.Parameter(source.tensors["emb.weight"].read(), requires_grad=False)
        return embedding, norm("blocks.0.ln0"), token_cat

    return _Parts(embed, blocks, head, shared)


def _times_rows(hidden: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden @ matrix.T, some rows of the matrix at a time in `dtype`."""
    return torch.cat([hidden @ rows.to(dtype).t() for rows in matrix.split(_HEAD_ROWS)], dim=-1)


def _copied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(dtype)


class MergeDifference(NamedTuple):
    """weight: largest relative one of a tensor, norm over norm. logit: largest of the logits of the probe."""

    weight: float
    logit: float


@torch.no_grad()
def merge_difference(model: ModelTensors, other: ModelTensors) -> MergeDifference:
    """How far two models of the same sizes are apart, in weights beside those of `other`, and in logits."""
    largest = 0.0
    for name, stored in model.tensors.items():
        theirs = other.tensors[name]
        if theirs is not stored:
            values = theirs.read().float()
            size = float(values.norm())
            largest = max(largest, float((stored.read().float() - values).norm()) / size if size else 0.0)
    return MergeDifference(weight=largest, logit=max_logit_difference(other, model))
