"""Initial values of a model trained from scratch.

Source: the published initialisation of the RWKV-6 (x060) and RWKV-5.2 (x052) trainers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infctx.errors import RecipeError
from infctx.model.catalog import BLOCK_PARTS
from infctx.model.channel_mix import ChannelMix
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.time_mix import TimeMix


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
) -> FinchConfig:
    """Sizes of a model to be trained from scratch; None = as in the released models of this width.

    Raises:
        RecipeError: an unknown version, or channels that are not a multiple of the head size.
    """
    if version not in BLOCK_PARTS:
        raise RecipeError(f"version {version!r}: expected one of {', '.join(BLOCK_PARTS)}.")
    if n_embd % head_size:
        raise RecipeError(f"channels {n_embd}: expected a multiple of the head size {head_size}.")
    lerp, decay = default_ranks(n_embd)
    is_finch = version == "6"
    return FinchConfig(
        version=version,
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=head_size,
        n_head=n_embd // head_size,
        dim_ffn=dim_ffn or max(1, int(3.5 * n_embd) // 32 * 32),
        lerp_rank=(lerp_rank or lerp) if is_finch else 0,
        decay_rank=(decay_rank or decay) if is_finch else 0,
    )


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
        _initialise_time_mix_(block.time_mix, config, i, generator)
        _initialise_channel_mix_(block.channel_mix, config, i, generator)


def _initialise_time_mix_(time_mix: TimeMix, config: FinchConfig, layer: int, generator: torch.Generator) -> None:
    time_mix.group_norm.weight.fill_(((1 + layer) / config.n_layer) ** 0.7)
    for name, curve in _time_mix_curves(config, layer).items():
        if (parameter := getattr(time_mix, name, None)) is not None:
            parameter.copy_(curve.view_as(parameter))
    if config.version == "6":
        # A zero matrix in front makes the low-rank term exactly 0, and still gets a gradient at the first step.
        for down, up in ((time_mix.lerp_down, time_mix.lerp_up), (time_mix.decay_down, time_mix.decay_up)):
            down.zero_()
            up.uniform_(-0.01, 0.01, generator=generator)
    if time_mix.initial_state is not None:
        time_mix.initial_state.zero_()
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1)):
        nn.init.orthogonal_(getattr(time_mix, name).weight, gain=gain, generator=generator)
    time_mix.output.weight.zero_()


def _initialise_channel_mix_(
    channel_mix: ChannelMix, config: FinchConfig, layer: int, generator: torch.Generator
) -> None:
    down = 1 - layer / config.n_layer
    x = torch.arange(config.n_embd) / config.n_embd
    curves = {"lerp": 1 - x ** (down**3), "mix": x**down}
    convention = "lerp" if config.version == "6" else "mix"
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
    }
    return {
        **{f"lerp_{name}": 1 - curve for name, curve in weight_of_the_token.items()},
        **{f"mix_{name}": curve for name, curve in weight_of_the_token.items()},
        "decay_base": -6 + 5 * place ** (0.7 + 1.3 * up),
        "bonus": up * (1 - place) + 0.1 * ((n + 1) % 3 - 1),
    }
