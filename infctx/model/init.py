"""Initial values of a model trained from scratch.

Source: the published initialisation of the RWKV-6 (x060), RWKV-5.2 (x052) and GoldFinch trainers.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from infctx.errors import RecipeError
from infctx.model.channel_mix import ChannelMix
from infctx.model.config import FinchConfig, Version
from infctx.model.finch import Finch
from infctx.model.gold import TokenCat
from infctx.model.time_mix import GatedTimeMix

# Of the published models with a second value, of every width: of the mixes, of the decay, and of that value.
C2_RANKS, VALUE_RANK = (32, 64), 64
# What is cached of a token is that part of its channels.
CACHE_DIVISOR = 16


def new_config(
    *,
    version: str,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    head_size: int = 64,
    dim_ffn: int | None = None,
    lerp_rank: int | None = None,
    decay_rank: int | None = None,
    ratio: int | None = None,
    front: str | None = None,
    uses_rope: bool | None = None,
) -> FinchConfig:
    """Sizes of a model to be trained from scratch; None = as in the released models of this width.

    Args:
        ratio: of a GoldFinch, layers to layers that attend; None = 3.
        front: of a GoldFinch, what the other layers are: "6c2" (None) or "6".
        uses_rope: rotary positions in attention; None = in a GPTAlpha.
    Raises:
        RecipeError: an unknown version, or sizes that do not go together.
    """
    if version not in get_args(Version):
        raise RecipeError(f"version {version!r}: expected one of {', '.join(get_args(Version))}.")
    if version != "goldfinch" and (ratio is not None or front is not None):
        raise RecipeError(f"ratio and front: expected with version goldfinch only, found version {version}.")
    if uses_rope is not None and version not in ("goldfinch", "gptalpha"):
        raise RecipeError(f"rope: expected with version goldfinch or gptalpha only, found version {version}.")
    if front not in (None, "6", "6c2"):
        raise RecipeError(f"front {front!r}: expected 6c2 or 6.")
    if n_embd % head_size:
        raise RecipeError(f"channels {n_embd}: expected a multiple of the head size {head_size}.")
    lerp, decay = default_ranks(n_embd)
    if version == "6c2" or (version == "goldfinch" and front != "6") or version == "gptalpha":
        lerp, decay = C2_RANKS  # also where channels are many
    has_decay_pair = version in ("6", "6c2", "goldfinch")
    return FinchConfig(
        version=version,
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=head_size,
        n_head=n_embd // head_size,
        dim_ffn=dim_ffn or max(1, int(3.5 * n_embd) // 32 * 32),
        lerp_rank=(lerp_rank or lerp) if version != "5.2" else 0,
        decay_rank=(decay_rank or decay) if has_decay_pair else 0,
        value_rank=VALUE_RANK if version == "6c2" or (version == "goldfinch" and front != "6") else 0,
        front="6" if front == "6" else "6c2",
        uses_rope=version == "gptalpha" if uses_rope is None else uses_rope,
        **attention_sizes(version, n_layer=n_layer, n_embd=n_embd, ratio=ratio),
    )


def attention_sizes(version: str, *, n_layer: int, n_embd: int, ratio: int | None = None) -> dict[str, int]:
    """The sizes of a config that only models with attention have.

    Args:
        ratio: layers to layers that attend; None = 3.
    Raises:
        RecipeError: too few layers for the ratio, or channels that the cache cannot divide.
    """
    if version == "gptalpha":
        return {"n_attention": n_layer}
    if version != "goldfinch":
        return {}
    ratio = 3 if ratio is None else ratio
    n_recurrent = n_layer * (ratio - 1) // ratio if ratio >= 2 else 0
    if not 0 < n_recurrent < n_layer:
        raise RecipeError(
            f"ratio {ratio}: expected 2 or more, and layers of both kinds: floor(layers · (ratio - 1) / ratio) with a "
            f"recurrence, the others with attention; {n_layer} layers give {n_recurrent} and {n_layer - n_recurrent}."
        )
    if n_embd % CACHE_DIVISOR:
        raise RecipeError(
            f"channels {n_embd}: expected a multiple of {CACHE_DIVISOR} in a goldfinch, which caches channels / "
            f"{CACHE_DIVISOR} numbers of a token."
        )
    return {
        "n_attention": n_layer - n_recurrent,
        "cache_rank": n_embd // CACHE_DIVISOR,
        "key_value_rank": max(n_embd // CACHE_DIVISOR, 64),
    }


def default_ranks(n_embd: int) -> tuple[int, int]:
    """Widths of a Finch's low-rank pairs, of the mixes and of the decay, in the released models of this width."""
    return (64, 128) if n_embd == 4096 else (32, 64)


@torch.no_grad()
def initialise_(model: Finch, *, seed: int) -> None:
    """Fill every parameter of the model, which lives on the CPU, from a seed of its own."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    model.embedding.weight.uniform_(-1e-4, 1e-4, generator=generator)
    head_gain = 0.5 * max(1.0, config.vocab_size / config.n_embd) ** 0.5
    nn.init.orthogonal_(model.head.weight, gain=head_gain, generator=generator)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for i, block in enumerate(model.blocks):
        initialise_block_(block, config, i, generator)
    if model.token_cat is not None:
        initialise_token_cat_(model.token_cat, generator)


@torch.no_grad()
def initialise_block_(block: nn.Module, config: FinchConfig, layer: int, generator: torch.Generator) -> None:
    """Fill one block, but for its norms, which are 1 and 0 already."""
    initialise_time_mix_(block.time_mix, config, layer, generator)
    initialise_channel_mix_(block.channel_mix, config, layer, generator)


@torch.no_grad()
def initialise_token_cat_(token_cat: TokenCat, generator: torch.Generator) -> None:
    """Fill the two matrices around a GoldFinch's cache."""
    for matrix in (token_cat.compress, token_cat.decompress):
        nn.init.orthogonal_(matrix.weight, gain=1.0, generator=generator)


@torch.no_grad()
def initialise_time_mix_(time_mix: nn.Module, config: FinchConfig, layer: int, generator: torch.Generator) -> None:
    """Fill the time mix of a block, but for the norms that are 1 and 0 already."""
    norm = time_mix.group_norm if isinstance(time_mix, GatedTimeMix) else time_mix.output_norm
    norm.weight.fill_(((1 + layer) / config.n_layer) ** 0.7)
    for name, curve in _time_mix_curves(config, layer).items():
        if (parameter := getattr(time_mix, name, None)) is not None:
            parameter.copy_(curve.view_as(parameter))
    # A zero matrix in front makes the low-rank term exactly 0, and still gets a gradient at the first step.
    for name in ("lerp", "decay", "value2", "lerp_query", "lerp_cache", "key", "value"):
        if (down := getattr(time_mix, f"{name}_down", None)) is not None:
            down.zero_()
            getattr(time_mix, f"{name}_up").uniform_(-0.01, 0.01, generator=generator)
    if getattr(time_mix, "initial_state", None) is not None:
        time_mix.initial_state.zero_()
    for name, gain in (("receptance", 1.0), ("query", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1)):
        if (matrix := getattr(time_mix, name, None)) is not None:
            nn.init.orthogonal_(matrix.weight, gain=gain, generator=generator)
    time_mix.output.weight.zero_()


@torch.no_grad()
def initialise_channel_mix_(
    channel_mix: ChannelMix, config: FinchConfig, layer: int, generator: torch.Generator
) -> None:
    """Fill the channel mix of a block."""
    down = 1 - layer / config.n_layer
    x = torch.arange(config.n_embd) / config.n_embd
    # Steeper in Finch alone; the others have the curve that was published before.
    steepness = down**3 if config.version == "6" else down
    curves = {"lerp": 1 - x**steepness, "mix": x**down}
    convention = "mix" if config.version == "5.2" else "lerp"
    for name in ("key", "receptance"):
        getattr(channel_mix, f"{convention}_{name}").copy_(curves[convention])
    nn.init.orthogonal_(channel_mix.key.weight, gain=1.0, generator=generator)
    channel_mix.receptance.weight.zero_()
    channel_mix.value.weight.zero_()


def _time_mix_curves(config: FinchConfig, layer: int) -> dict[str, Tensor]:
    """Values over channels; `lerp_*` weighs the previous token (Finch), `mix_*` the token itself (Eagle)."""
    up = layer / max(1, config.n_layer - 1)  # 0 in the first layer, 1 in the last
    down = 1 - layer / config.n_layer  # 1 in the first layer, almost 0 in the last
    x = torch.arange(config.n_embd) / config.n_embd
    n = torch.arange(config.dim_att)
    place = n / max(1, config.dim_att - 1)
    weight_of_the_token = {
        "input": x**down,
        "decay": x**down,
        "key": x**down,
        "value": x**down + 0.3 * up,
        "receptance": x ** (0.5 * down),
        "gate": x ** (0.5 * down),
        "value2": x**down + 0.3 * up,
        "query": x ** (0.5 * down),
        "cache": x**down,
    }
    return {
        **{f"lerp_{name}": 1 - curve for name, curve in weight_of_the_token.items()},
        **{f"mix_{name}": curve for name, curve in weight_of_the_token.items()},
        "decay_base": -6 + 5 * place ** (0.7 + 1.3 * up),
        "bonus": up * (1 - place) + 0.1 * ((n + 1) % 3 - 1),
    }
