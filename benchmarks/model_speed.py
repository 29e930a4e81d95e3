"""Training speed of a small Finch on this CPU, against the torch path of RWKV-infctx-trainer v6.

    python benchmarks/model_speed.py --peer ../RWKV-infctx-trainer [--threads 1] [--pairs 9] [--output FILE]

Both sides take training steps (forward, loss, backward, AdamW) on the same batch from the same weights, strictly in
turn in this process; a ratio is the median of the pairs' ratios. Before anything is timed, losses and gradients are
compared. The peer runs as its own modules do, scripted by torch.jit, with its default chunks (128 tokens, float64
inside) and with the fastest it allows (16, float32). In bf16 its weights are bf16 too; ours stay float32, as in a run
of this project. Without --peer, the portable torch backends of this project stand in for it, and the result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from infctx.bench.machine import commit, machine_facts, versions
from infctx.bench.pairs import median_interval, time_on_cpu, time_pairs
from infctx.checkpoint.model_file import official_tensors
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.training.loss import weighted_loss_sum

ROWS, TOKENS, IDS = 4, 512, 4096
SIZES = {"C256 L4": (256, 4), "C512 L6": (512, 6)}
PEER_SETTINGS = {"infctx-trainer-default": (128, 64), "infctx-trainer": (16, 32)}
# The peer sums in another order, clamps decays below 0.005 and, in bf16, rounds its weights and its state.
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 0.1}

Losses = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of RWKV-infctx-trainer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="print where our time goes, and stop")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for size, (channels, layers) in SIZES.items():
        for dtype in ("fp32", "bf16"):
            torch.manual_seed(0)
            batch = torch.randint(IDS, (2, ROWS, TOKENS)).unbind(0)
            model = our_model(channels, layers)
            ours = our_losses(model, dtype)
            if arguments.profile:
                print(f"{size} {dtype}\n{profile_of(training_step(model, ours, batch))}")
                continue
            for name, module, embedding, losses in other_sides(model, dtype, arguments.peer):
                difference = compare((model.embedding, ours), (embedding, losses), batch)
                if not difference <= LARGEST_DIFFERENCE[dtype]:
                    raise SystemExit(f"{name}, {size}, {dtype}: losses and gradients differ by {difference:.2g}")
                times = time_pairs(
                    training_step(model, ours, batch),
                    training_step(module, losses, batch),
                    time_on_cpu,
                    num_pairs=arguments.pairs,
                )
                ratio, noise = torch.tensor(times.ratios).median(), torch.tensor(times.ratios_of_ours).median()
                row = {
                    "size": size,
                    "dtype": dtype,
                    "other": name,
                    "tokens_per_second": ROWS * TOKENS / float(torch.tensor(times.ours).median()),
                    "other_tokens_per_second": ROWS * TOKENS / float(torch.tensor(times.other).median()),
                    "ratio": float(ratio),
                    "ratio_interval": median_interval(times.ratios),
                    "a_a_ratio": float(noise),
                    "largest_difference": difference,
                }
                rows.append(row)
                print(
                    f"{size} {dtype} against {name}: {row['tokens_per_second']:.0f} and "
                    f"{row['other_tokens_per_second']:.0f} tokens/s, ratio {ratio:.2f} {row['ratio_interval']}, "
                    f"A/A {noise:.2f}, differs by {difference:.1e}",
                    flush=True,
                )
    result = {
        "machine": machine_facts(torch.device("cpu")),
        "versions": versions(),
        "commit": commit(),
        "batch": {"rows": ROWS, "tokens": TOKENS, "ids": IDS},
        "rows": rows,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def our_model(channels: int, layers: int) -> Finch:
    """A Finch whose every parameter has a gradient: some start at zero and would hide what is behind them."""
    model = Finch(new_config(version="6", n_layer=layers, n_embd=channels, vocab_size=IDS))
    initialise_(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def our_losses(model: Finch, dtype: str) -> Losses:
    """Mean loss as a run of this project computes it: in bf16 under autocast, with float32 weights."""
    model.compute_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            hidden, _ = model.forward_hidden(tokens)
            weights = torch.ones(tokens.shape)
            return weighted_loss_sum(hidden, model.head, targets, weights, vocab_size=IDS) / tokens.numel()

    return loss


def other_sides(model: Finch, dtype: str, peer: Path | None) -> Iterator[tuple[str, nn.Module, nn.Embedding, Losses]]:
    """Name, module, its embedding, and loss of what we are compared with, from the same weights."""
    if peer is None:
        portable = Finch(model.config)
        portable.load_state_dict(model.state_dict())
        portable.use_backend("torch")
        yield "our torch backends (the peer is not at hand)", portable, portable.embedding, our_losses(portable, dtype)
        return
    time_mix, channel_mix = load_peer(peer)
    for name, (chunk_tokens, precision) in PEER_SETTINGS.items():
        module = PeerModel(model, time_mix, channel_mix, chunk_tokens, precision)
        if dtype == "bf16":
            module.bfloat16()
        yield name, module, module.emb, module.loss


def load_peer(checkout: Path) -> tuple[type[nn.Module], type[nn.Module]]:
    """The peer's two modules as they are; what they import and the torch path never uses is an empty stand-in."""
    source = checkout / "RWKV-v6" / "src"
    if not (source / "module" / "TimeMix.py").exists():
        raise SystemExit(f"--peer {checkout}: no RWKV-v6/src/module/TimeMix.py in it")
    unused = ("deepspeed", "deepspeed.ops", "deepspeed.ops.adam", "deepspeed.runtime", "deepspeed.runtime.lr_schedules")
    stand_ins = {name: mock.MagicMock() for name in (*unused, "wandb", "lightning")}
    stand_ins |= {f"lightning.pytorch{part}": mock.MagicMock() for part in ("", ".utilities", ".strategies")}
    stand_ins |= {
        f"deepspeed.{part}": mock.MagicMock() for part in ("ops", "ops.adam", "runtime", "runtime.lr_schedules")
    }
    package = types.ModuleType("peer_module")
    package.__path__ = [str(source / "module")]
    with mock.patch.dict(sys.modules, {**stand_ins, "peer_module": package}), contextlib.redirect_stdout(sys.stderr):
        time_mix = importlib.import_module("peer_module.TimeMix").RWKV_TimeMix6_0
        channel_mix = importlib.import_module("peer_module.ChannelMix").RWKV_ChannelMix6_0
    return time_mix, channel_mix


class PeerModel(nn.Module):
    """The peer's blocks between an embedding and a head, as its model has them, with our weights."""

    def __init__(
        self, model: Finch, time_mix: type[nn.Module], channel_mix: type[nn.Module], chunk_tokens: int, precision: int
    ) -> None:
        super().__init__()
        config = model.config
        self.config = config
        sizes = (config.n_layer, config.n_embd)
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList()
        for layer in range(config.n_layer):
            att = time_mix(layer, *sizes, config.n_head, config.head_size, config.dim_att, chunk_tokens, precision)
            parts = {"ln1": nn.LayerNorm(config.n_embd), "att": att}
            parts |= {"ln2": nn.LayerNorm(config.n_embd), "ffn": channel_mix(layer, *sizes, config.dim_ffn)}
            parts |= {"ln0": nn.LayerNorm(config.n_embd)} if layer == 0 else {}
            self.blocks.append(nn.ModuleDict(parts))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        own = self.state_dict()
        self.load_state_dict({name: x.reshape(own[name].shape) for name, x in official_tensors(model).items()})

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch from fresh states."""
        config, rows = self.config, tokens.shape[0]
        x = self.emb(tokens)
        shift = x.new_zeros(rows, config.n_embd)
        state = torch.zeros(rows, config.n_head, config.head_size, config.head_size)
        x = self.blocks[0]["ln0"](x)
        for block in self.blocks:
            mixed, _ = block["att"](block["ln1"](x), (shift, state))
            x = x + mixed
            mixed, _ = block["ffn"](block["ln2"](x), shift)
            x = x + mixed
        logits = self.head(self.ln_out(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def training_step(module: nn.Module, losses: Losses, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    """A step of AdamW, so small that the hundredth is like the first."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-7)

    def step() -> None:
        losses(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(ours: tuple[nn.Embedding, Losses], other: tuple[nn.Embedding, Losses], batch: tuple[Tensor, ...]) -> float:
    """The larger of two relative differences: of the losses, and of the gradients with respect to the embedding."""
    values = []
    for embedding, losses in (ours, other):
        loss = losses(*batch)
        (gradient,) = torch.autograd.grad(loss, [embedding.weight])
        values.append((loss.detach().double(), gradient.double()))
    (our_loss, our_gradient), (other_loss, other_gradient) = values
    of_loss = (our_loss - other_loss).abs() / our_loss.abs()
    return float(max(of_loss, (our_gradient - other_gradient).norm() / our_gradient.norm()))


def profile_of(step: Callable[[], None]) -> str:
    """Operators of three steps by the time they take themselves."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            step()
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=48)


if __name__ == "__main__":
    main()
