"""Tokens per second of generating, beside the forward pass at one token and the official runtime; a long document read.

    python benchmarks/generate.py [--threads 1] [--pairs 9] [--document-tokens 1000000] [--output FILE]

Random weights in float32. Each side takes steps of one token from the same state, strictly in turn in this process; a
ratio is the median of the pairs' ratios. With one thread the time is the processor's, so that what else runs counts
little; with more it is the clock's. Before anything is timed, the logits of all sides are compared after some tokens.
The official runtime is the `rwkv` wheel ("cpu fp32", no compiled extensions), which has one row only. The document is
random bytes for the smallest model: read in one go into a state file, then asked; its seconds are the clock's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when the wheel is imported: plain torch.
os.environ.update({"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"})

import numpy as np
import torch
from torch import Tensor

import infctx
from infctx.bench.machine import commit, machine_facts, versions
from infctx.bench.pairs import median_interval, time_on_cpu, time_pairs
from infctx.generation.long_reading import LongText, read_long_text
from infctx.generation.prompt_state import Reader, read_prompt_state
from infctx.generation.reading import read_tokens
from infctx.generation.row import copied
from infctx.generation.sampling import Sampler, SamplingOptions
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.model.single_token import SingleTokenStep

# Channels, layers, ids.
SIZES = {"1M bytes": (128, 4, 257), "25M": (384, 6, 16384), "0.19B World": (768, 12, 65536)}
TOKENS = 8
LARGEST_DIFFERENCE = 2e-3
Step = Callable[[], object]
Side = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--document-tokens", type=int, default=1_000_000)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    timer = processor_time if arguments.threads == 1 else time_on_cpu
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        model = random_model(*SIZES[size])
        for num_rows in (1, 8):
            sides = sides_of(model, num_rows)
            compare(size, model, num_rows, sides)
            ours = steps(sides["step"], model, num_rows)
            for name in [name for name in sides if name != "step"]:
                times = time_pairs(
                    ours,
                    steps(sides[name], model, num_rows),
                    timer,
                    num_pairs=arguments.pairs,
                    sample_seconds=0.1,
                )
                rows.append(row_of(size, num_rows, name, times))
                print(json.dumps(rows[-1]), flush=True)
    draws = draw_times()
    document = read_document(arguments.document_tokens) if arguments.document_tokens else None
    print(json.dumps({"draws": draws, "document": document}), flush=True)
    if arguments.output is not None:
        found = {
            "machine": machine_facts(torch.device("cpu")),
            "versions": {**versions(), "rwkv": importlib.metadata.version("rwkv")},
            "commit": commit(),
            "threads": arguments.threads,
            "clock": "processor" if arguments.threads == 1 else "wall",
            "rows": rows,
            "microseconds_a_draw": draws,
            "document": document,
        }
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def processor_time(call: Step, num_calls: int) -> float:
    """Seconds of a call, on average, of this process."""
    started = time.process_time()
    for _ in range(num_calls):
        call()
    return (time.process_time() - started) / num_calls


def random_model(channels: int, layers: int, ids: int) -> Finch:
    """Weights under which every path carries signal."""
    config = new_config(version="6", n_layer=layers, n_embd=channels, vocab_size=ids, head_size=64)
    model = Finch(config)
    initialise_(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 100
            parameter.add_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model.eval()


def sides_of(model: Finch, num_rows: int) -> dict[str, Side]:
    """Each takes tokens [B] and gives logits [B, V], and keeps its state."""
    fresh = copied([model.fresh_state(num_rows)])
    step = SingleTokenStep(model)
    held = [model.fresh_state(num_rows)]

    @torch.inference_mode()
    def forward(tokens: Tensor) -> Tensor:
        logits, held[0] = model(tokens[:, None], held[0])
        return logits[:, 0]

    sides: dict[str, Side] = {"step": lambda tokens: step.advance_(tokens, fresh)[0], "forward": forward}
    if num_rows == 1:
        sides["rwkv"] = official(model)
    return sides


def official(model: Finch) -> Side:
    """The wheel's model of the same weights."""
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        infctx.save_model(model, Path(folder) / "model.pth", format="pth", dtype=torch.float32)
        # It lists every tensor.
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = RWKV(model=str(Path(folder) / "model"), strategy="cpu fp32")
    state: list[Any] = [None]

    def step(tokens: Tensor) -> Tensor:
        logits, state[0] = theirs.forward(tokens.tolist(), state[0])
        return logits[None]

    return step


def compare(size: str, model: Finch, num_rows: int, sides: dict[str, Side]) -> None:
    tokens = torch.randint(1, model.config.vocab_size, (12, num_rows))
    logits = {name: [side(row) for row in tokens][-1] for name, side in sides.items()}
    for name, found in logits.items():
        difference = float((found - logits["forward"]).abs().max())
        print(f"{size}, {num_rows} rows: {name} differs from the forward pass by {difference:.1e}", flush=True)
        if not difference <= LARGEST_DIFFERENCE:
            raise SystemExit("too much: nothing is timed")


def steps(side: Side, model: Finch, num_rows: int) -> Step:
    tokens = torch.randint(1, model.config.vocab_size, (TOKENS, num_rows))
    return lambda: [side(row) for row in tokens]


def row_of(size: str, num_rows: int, name: str, times: Any) -> dict[str, Any]:
    ratios, interval = torch.tensor(times.ratios), median_interval(times.ratios)
    ours, other = (float(torch.tensor(part).median()) for part in (times.ours, times.other))
    return {
        "size": size,
        "rows": num_rows,
        "other": name,
        "tokens_per_second": round(TOKENS * num_rows / ours, 1),
        "other_tokens_per_second": round(TOKENS * num_rows / other, 1),
        "ratio": round(float(ratios.median()), 3),
        "interval": None if interval is None else [round(bound, 3) for bound in interval],
        "same_side_twice": round(float(torch.tensor(times.ratios_of_ours).median()), 3),
    }


def draw_times() -> dict[str, float]:
    """Microseconds of a draw from a World vocabulary, of the processor; flat: the nucleus has thousands of tokens."""
    flat = torch.randn(65536, generator=torch.Generator().manual_seed(0)) * 3
    logits, found = flat * 2, {}
    for name, options in {
        "most probable": {"temperature": 0.0},
        "top-p 0.7": {"top_p": 0.7},
        "top-p 0.7, flat": {"top_p": 0.7},
        "top-k 50, top-p 0.7": {"top_k": 50, "top_p": 0.7},
        "all": {},
        "top-p 0.7 and penalties": {"top_p": 0.7, "presence_penalty": 0.3, "frequency_penalty": 0.3},
    }.items():
        sampler = Sampler(SamplingOptions(**options), seed=0, usable_ids=65530)
        drawn_from = flat if name.endswith("flat") else logits
        found[name] = round(processor_time(lambda s=sampler, x=drawn_from: s.draw(x), 100) * 1e6, 1)
    return found


def read_document(num_tokens: int) -> dict[str, Any]:
    """Read a document into a file, then answer behind it."""
    model = random_model(*SIZES["1M bytes"])
    tokens = np.random.default_rng(0).integers(1, 257, num_tokens).astype(np.int32)
    reader = Reader(fingerprint="0" * 16, tokenizer="bytes", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.state"
        started = time.perf_counter()
        read_long_text(model, reader, LongText(tokens=tokens, file=path), goes_on=lambda num_read: True)
        read_seconds = time.perf_counter() - started
        started = time.perf_counter()
        found = read_prompt_state(path, reader=reader, config=model.config, device=torch.device("cpu"))
        read_tokens(model, tokens[:20], found.reading)
        ask_seconds = time.perf_counter() - started
        num_bytes = path.stat().st_size
    return {
        "tokens": num_tokens,
        "seconds": round(read_seconds, 1),
        "tokens_per_second": round(num_tokens / read_seconds),
        "state_bytes": num_bytes,
        "seconds_to_the_first_token_of_an_answer": round(ask_seconds, 4),
    }


if __name__ == "__main__":
    main()
