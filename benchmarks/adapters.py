"""Every kind of adapter: how far merged is from attached, and what a training step and the saved folder take.

    python benchmarks/adapters.py [--layers 4] [--channels 256] [--rank 16] [--tokens 512] [--output FILE]

Each kind is measured in a process of its own: a random Finch whose every path carries signal, the adapter on every
matrix of the blocks, all that is trained disturbed by 0.05 · N(0, 1); a step is one exact gradient in chunks of 128
tokens and AdamW's update. Logits have a standard deviation of about 1. merged_bf16: the merged weights rounded to bf16,
computed in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import infctx
from infctx.bench.machine import commit, machine_facts, versions
from infctx.checkpoint.model_file import build_model, tensors_of
from infctx.export.options import in_dtype
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.recipe.adapter_section import AdapterSection
from infctx.run_adapter import attach_adapter
from infctx.training.optim import make_adamw, parameter_groups

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    **{kind: {"kind": kind} for kind in ("lora", "rslora", "dora", "pissa", "olora", "miss")},
    "miss bat": {"kind": "miss", "miss_init": "bat"},
    "state": {"kind": "state"},
    "lora + states": {"kind": "lora", "initial_state": True},
}
VOCAB = 4096
# Of every trained number, times N(0, 1): the additions become about a third of the matrices.
DISTURBANCE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.of is not None:
        print(json.dumps(measure(options)))
        return
    rows = []
    for kind in KINDS:
        ended = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--of", kind], stdout=subprocess.PIPE, check=True
        )
        rows.append(json.loads(ended.stdout))
        print(rows[-1], file=sys.stderr)
    setting = {key: value for key, value in vars(options).items() if key not in ("output", "of")}
    facts = {"machine": machine_facts(torch.device("cpu")), "versions": versions(), "commit": commit()}
    if options.output is not None:
        options.output.write_text(json.dumps({"setting": setting, **facts, "rows": rows}, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model = random_model(options.layers, options.channels)
    tokens = torch.randint(1, VOCAB, (1, options.tokens), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain, _ = model(tokens)
    chosen = dict(KINDS[options.of])
    if chosen["kind"] not in ("full", "state"):
        chosen["rank"] = options.rank
    adapter = attach_adapter(AdapterSection(**chosen).resolved(), model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        begun, _ = model(tokens)
    # What a first step imports and compiles is no part of a step.
    step_(model, tokens[:, :16])
    # From here on the kernel notes the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    step_(model, tokens)
    grown = resident_bytes("VmHWM") - before
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(DISTURBANCE * torch.randn(parameter.shape, generator=generator))
        attached, _ = model(tokens)
    folder_bytes = saved_bytes(adapter)
    adapter.merge_()
    rounded = build_model(in_dtype(tensors_of(model), torch.bfloat16, format="pth"))
    with torch.no_grad():
        merged, in_bf16 = model(tokens)[0], rounded(tokens)[0]
    return {
        "kind": options.of,
        "logit_std": round(float(plain.std()), 2),
        "begun": float((begun - plain).abs().max()),
        "merged": float((merged - attached).abs().max()),
        "merged_bf16": float((in_bf16 - attached).abs().max()),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "step_mb": round(grown / 2**20, 1),
        "folder_bytes": folder_bytes,
    }


def step_(model: Finch, tokens: torch.Tensor) -> None:
    model.train()
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0, decay_lr_multiplier=1.0)
    optimizer = make_adamw(groups, lr=1e-6, betas=(0.9, 0.99), eps=1e-8)
    infctx.backward_through_chunks(model, tokens, chunk_tokens=128)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def resident_bytes(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def saved_bytes(adapter: Any) -> int:
    if not adapter.has_files:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def random_model(layers: int, channels: int) -> Finch:
    config = new_config(version="6", n_layer=layers, n_embd=channels, vocab_size=VOCAB)
    model = Finch(config)
    initialise_(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.embedding.weight.normal_(generator=generator)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_matrix = name.endswith("weight") and parameter.dim() == 2
            parameter.add_(noise * (parameter.shape[1] ** -0.5 if is_matrix else 0.2 if parameter.dim() == 1 else 0.05))
        model.head.weight.normal_(generator=generator).mul_(channels**-0.5)
    return model.eval()


if __name__ == "__main__":
    main()
