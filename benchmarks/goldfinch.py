"""A GoldFinch measured: equality, gradients, bytes per token, memory against length, reading and writing.

    python benchmarks/goldfinch.py [--output benchmarks/results/goldfinch_cpu.json]

Beside it stand a Finch and a GPTAlpha of the same layers and channels; the latter keeps what a transformer does, a
key and a value of every layer and token. Random weights. Each length of the memory table is a process of its own, and
the peak is that of its resident memory; times are medians of rounds in which every model takes its turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from long_document import peak_megabytes
from torch import Tensor, nn

import infctx
from infctx.bench.machine import commit, machine_facts, versions
from infctx.generation.reading import read_tokens
from infctx.generation.row import copied
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.model.single_token import SingleTokenStep
from infctx.model.state import ModelState

VOCABULARY = 257
SMALL = {"n_layer": 6, "n_embd": 64, "head_size": 16}
MIDDLE = {"n_layer": 6, "n_embd": 256, "head_size": 64}
VERSIONS = ("6", "goldfinch", "gptalpha")
CHUNK_TOKENS = 512
LENGTHS = (2_048, 8_192, 32_768)
READ = (1_024, 4_096, 16_384)
RAGGED = (1, 4, 7, 1, 19, 3, 1, 64)
ROUNDS = 3


def random_model(version: str, sizes: dict[str, int], dtype: torch.dtype, **more: Any) -> Finch:
    """A model in which every path carries signal."""
    model = Finch(new_config(version=version, vocab_size=VOCABULARY, **sizes, **more))
    initialise_(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.embedding.weight.normal_(generator=generator)
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 25
            parameter.add_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model.to(dtype).eval()


def random_tokens(count: int, rows: int = 1) -> Tensor:
    """Token ids [rows, count]."""
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def equality(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Largest differences of the logits, over their deviation: in ragged chunks and token by token, against at once."""
    found = {}
    for name, more in {
        "6c2": {},
        "gptalpha": {},
        "goldfinch": {},
        "goldfinch, rope": {"uses_rope": True},
        "goldfinch, front 6": {"front": "6"},
    }.items():
        model, tokens = random_model(name.split(",")[0], SMALL, dtype, **more), random_tokens(100, rows=2)
        whole, _ = model(tokens)
        row = {}
        for way, lengths in {"ragged": RAGGED, "single": (1,) * 100}.items():
            state, pieces, begin = None, [], 0
            for length in lengths:
                logits, state = model(tokens[:, begin : begin + length], state)
                pieces.append(logits)
                begin += length
            row[way] = float((torch.cat(pieces, dim=1) - whole).abs().max() / whole.std())
        step, state, pieces = SingleTokenStep(model), _copy(model.fresh_state(2)), []
        for at in range(100):
            logits, state = step.advance_(tokens[:, at], state)
            pieces.append(logits)
        row["step"] = float((torch.stack(pieces, dim=1) - whole).abs().max() / whole.std())
        found[name] = row
    return found


def gradients() -> dict[str, dict[str, float]]:
    """Largest relative error of a parameter's gradient, in float64, against autograd over the whole sequence."""
    tokens, found = random_tokens(200, rows=2), {}
    for version in ("6c2", "goldfinch", "gptalpha"):
        # With rotary positions no gradient is zero by symmetry alone.
        more = {} if version == "6c2" else {"uses_rope": True}
        model = random_model(version, SMALL, torch.float64, **more)
        logits, _ = model(tokens)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        row = {}
        for chunk_tokens in (1, 7, 64):
            model.zero_grad()
            infctx.backward_through_chunks(model, tokens, chunk_tokens=chunk_tokens)
            row[str(chunk_tokens)] = max(
                float((parameter.grad - exact[name]).norm() / exact[name].norm())
                for name, parameter in model.named_parameters()
                if exact[name].any()
            )
        found[version] = row
    return found


@torch.inference_mode()
def bytes_per_token(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Of each model, what its state grows by with a token, measured and by the formula of the paper."""
    found = {}
    for version in VERSIONS:
        model = random_model(version, MIDDLE, dtype)
        states = [model(random_tokens(count))[1] for count in (100, 600)]
        grown = [sum(part.numel() * part.element_size() for part in state) for state in states]
        config, size = model.config, torch.empty(0, dtype=dtype).element_size()
        by_formula = {
            "6": 0,
            "goldfinch": config.n_embd // 16 * size + 4,
            "gptalpha": 2 * config.n_layer * config.dim_att * size + 4,
        }
        found[version] = {
            "measured": (grown[1] - grown[0]) / 500,
            "formula": by_formula[version],
            "fixed": sum(part.numel() * part.element_size() for part in states[0].recurrent),
        }
    return found


def reading_and_writing() -> list[dict[str, Any]]:
    """Tokens per second of each model while it reads a text, and of writing behind it."""
    models = {version: random_model(version, MIDDLE, torch.float32) for version in VERSIONS}
    steps = {version: SingleTokenStep(model) for version, model in models.items()}
    rows = []
    for length in READ:
        ids = random_tokens(length)[0].numpy().astype(np.int32)
        read: dict[str, list[float]] = {version: [] for version in VERSIONS}
        written: dict[str, list[float]] = {version: [] for version in VERSIONS}
        for _ in range(ROUNDS):
            for version, model in models.items():
                began = time.process_time()
                reading = read_tokens(model, ids)
                read[version].append(length / (time.process_time() - began))
                state, token = copied([reading.state]), torch.tensor([1])
                # The first makes the keys of all tokens before.
                _, state = steps[version].advance_(token, state)
                began = time.process_time()
                for _ in range(16):
                    _, state = steps[version].advance_(token, state)
                written[version].append(16 / (time.process_time() - began))
        for version in VERSIONS:
            rows.append(
                {
                    "model": version,
                    "tokens": length,
                    "read_per_s": round(median(read[version])),
                    "written_per_s": round(median(written[version])),
                }
            )
            print(rows[-1], flush=True)
    return rows


def one_gradient(version: str, num_tokens: int) -> dict[str, Any]:
    """The exact gradient of a document, in this process."""
    model = random_model(version, MIDDLE, torch.float32).train()
    tokens = random_tokens(num_tokens)
    # Import and first use of everything, before what is to be measured.
    infctx.backward_through_chunks(model, tokens[:, : 3 * CHUNK_TOKENS], chunk_tokens=CHUNK_TOKENS)
    before, began = peak_megabytes(), time.process_time()
    infctx.backward_through_chunks(model, tokens, chunk_tokens=CHUNK_TOKENS)
    seconds = time.process_time() - began
    config = model.config
    return {
        "model": version,
        "tokens": num_tokens,
        "peak_mb": round(peak_megabytes()),
        "before_mb": round(before),
        # Cache and gradient, both in float32, and the tokens.
        "cache_mb": round(num_tokens * (8 * config.cache_width + 4) / 1e6, 1) if config.n_attention else 0,
        "seconds": round(seconds, 1),
    }


def memory_against_length() -> list[dict[str, Any]]:
    """`one_gradient` of every length, each in a process of its own."""
    rows = []
    for version in VERSIONS[:2]:
        for num_tokens in LENGTHS:
            one = ["--one", version, str(num_tokens)]
            done = subprocess.run([sys.executable, __file__, *one], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one is not None:
        print(json.dumps(one_gradient(arguments.one[0], int(arguments.one[1]))))
        return
    found = {
        "versions": versions(),
        "machine": machine_facts(torch.device("cpu")),
        "commit": commit(),
        "sizes": {"small": SMALL, "middle": MIDDLE},
        "equality": {"float64": equality(torch.float64), "float32": equality(torch.float32)},
        "gradients": gradients(),
        "bytes_per_token": {"bfloat16": bytes_per_token(torch.bfloat16), "float32": bytes_per_token(torch.float32)},
    }
    print(json.dumps(found, indent=1), flush=True)
    found["memory"] = memory_against_length()
    found["speed"] = reading_and_writing()
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def _copy(state: ModelState) -> ModelState:
    return ModelState(*(part.clone() for part in state))


if __name__ == "__main__":
    main()
