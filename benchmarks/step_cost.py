"""What the exact gradient costs beside the truncated one, and chunks beside one piece: ratios of interleaved runs.

    python benchmarks/step_cost.py [--tokens 16384] [--chunk 1024] [--pairs 7] [--output FILE]

Each pair runs both sides in turn in this process, on the same tokens; a ratio is the median of the pairs' ratios. Every
step is the gradient of one document of random bytes by a fresh Finch, and AdamW's update. "floor" is the ratio of the
matrix products that each side needs: a forward pass is 1, a backward pass 2 (LoRA: 1), recomputing 1 more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import infctx
from infctx.adapters.peft_adapters import attach_lora
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.training.chunked import Window


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to compute a step. chunk_tokens None = the document in one piece."""

    chunk_tokens: int | None
    window: Window
    is_recomputed: bool = False


def comparisons(chunk: int) -> dict[str, tuple[str, Side, Side, float]]:
    """Name -> adapter, the side above, the side below, and the floor of the ratio of their times."""
    truncated, exact = Side(chunk_tokens=chunk, window=1), Side(chunk_tokens=chunk, window="document")
    truncated_again = Side(chunk_tokens=chunk, window=1, is_recomputed=True)
    exact_again = Side(chunk_tokens=chunk, window="document", is_recomputed=True)
    whole = Side(chunk_tokens=None, window="document")
    whole_again = Side(chunk_tokens=None, window="document", is_recomputed=True)
    return {
        "exact / truncated, full": ("full", exact, truncated, 4 / 3),
        "exact / truncated, LoRA": ("lora", exact, truncated, 3 / 2),
        "exact / truncated, full, layers recomputed": ("full", exact_again, truncated_again, 5 / 4),
        "exact / truncated, LoRA, layers recomputed": ("lora", exact_again, truncated_again, 4 / 3),
        "truncated / one piece": ("full", truncated, whole, 1.0),
        "truncated / one piece, layers recomputed": ("full", truncated_again, whole_again, 1.0),
        "exact / one piece with layers recomputed": ("full", exact, whole_again, 1.0),
        "exact / exact: the noise": ("full", exact, exact, 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of torch; one is steadier on a busy machine")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    tokens = torch.randint(1, 257, (1, arguments.tokens))
    rows = []
    for name, (adapter, above, below, floor) in comparisons(arguments.chunk).items():
        model = make_model(adapter, layers=arguments.layers, channels=arguments.channels)
        pairs = time_pairs(make_step(model, tokens), above, below, num_pairs=arguments.pairs)
        ratios = sorted(a / b for a, b in pairs)
        row = {
            "comparison": name,
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
            "floor": round(floor, 3),
            "seconds": [round(statistics.median(side), 2) for side in zip(*pairs, strict=True)],
        }
        rows.append(row)
        print(row, flush=True)
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        arguments.output.write_text(json.dumps({**machine, **settings, "rows": rows}, indent=1) + "\n")


def make_model(adapter: str, *, layers: int, channels: int) -> Finch:
    config = new_config(version="6", n_layer=layers, n_embd=channels, vocab_size=257, head_size=32)
    model = Finch(config)
    initialise_(model, seed=0)
    if adapter == "lora":
        targets = ["receptance", "key", "value", "gate", "output"]
        attach_lora(model, rank=16, alpha=32.0, dropout=0.0, targets=targets, train_also=[])
    return model.train()


def make_step(model: Finch, tokens: torch.Tensor) -> Callable[[Side], None]:
    """A function that takes one optimizer step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(side: Side) -> None:
        model.recompute_layers(side.is_recomputed)
        optimizer.zero_grad(set_to_none=True)
        chunk = side.chunk_tokens or tokens.shape[1]
        infctx.backward_through_chunks(model, tokens, chunk_tokens=chunk, window=side.window)
        optimizer.step()

    return step


def time_pairs(step: Callable[[Side], None], above: Side, below: Side, *, num_pairs: int) -> list[tuple[float, float]]:
    """Seconds of each side, turn and turn about; the order changes from pair to pair."""
    for side in (above, below):
        step(side)
    pairs = []
    for number in range(num_pairs):
        seconds = {}
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            began = time.perf_counter()
            step((above, below)[place])
            seconds[place] = time.perf_counter() - began
        pairs.append((seconds[0], seconds[1]))
    return pairs


if __name__ == "__main__":
    main()
