"""How fast `infctx eval` reads, beside the forward pass alone, and what reading a shared beginning once saves.

    python benchmarks/eval_speed.py --output benchmarks/results/eval_cpu.json

Ratios are medians of interleaved runs in one process, one thread, in seconds of the processor: a machine that is shared
does not change them much. "forward" is the model with its logits, chunk after
chunk, and nothing else: no loss, no sums by position. The model is datasets/byte_finch, and with --world a fresh Finch
of the same layers with the World vocabulary of 65,536 ids, where the head is most of the work.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import infctx
from infctx.data.document import Document
from infctx.evaluation.by_position import measure_by_position
from infctx.evaluation.scoring import score_continuations
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config

ROOT = Path(__file__).resolve().parent.parent
CHUNK_TOKENS = 1024


def make_document(num_tokens: int, vocab_size: int) -> Document:
    """Random tokens, each with a weight."""
    weights = np.ones(num_tokens, dtype=np.float32)
    weights[0] = 0.0
    tokens = np.random.default_rng(0).integers(1, vocab_size, size=num_tokens)
    return Document(tokens=tokens.astype(np.int32), weights=weights, origin="random")


@torch.no_grad()
def forward_alone(model: Finch, document: Document) -> None:
    """The model over the document, with its logits."""
    tokens, state = torch.from_numpy(document.tokens.astype(np.int64))[None], None
    for chunk in tokens.split(CHUNK_TOKENS, dim=1):
        _, state = model(chunk, state)


def interleaved(sides: dict[str, Callable[[], object]], *, pairs: int) -> dict[str, list[float]]:
    """Processor seconds of each side, in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(pairs + 1):
        for name, side in sides.items():
            began = time.process_time()
            side()
            if number:
                seconds[name].append(time.process_time() - began)
    return seconds


def measure_reading(model: Finch, *, num_tokens: int, pairs: int) -> dict[str, Any]:
    """Tokens a second of the forward pass alone, and of eval."""
    document = make_document(num_tokens, model.config.vocab_size)
    seconds = interleaved(
        {
            "forward": lambda: forward_alone(model, document),
            "eval": lambda: measure_by_position(model, [document], chunk_tokens=CHUNK_TOKENS),
        },
        pairs=pairs,
    )
    ratios = [one / other for one, other in zip(seconds["eval"], seconds["forward"], strict=True)]
    return {
        "vocab_size": model.config.vocab_size,
        "tokens": num_tokens,
        "tokens_per_processor_second": {
            name: round(num_tokens / statistics.median(one)) for name, one in seconds.items()
        },
        "eval_seconds_over_forward": round(statistics.median(ratios), 3),
        "ratios": [round(one, 3) for one in ratios],
    }


def measure_questions(model: Finch, *, pairs: int) -> dict[str, Any]:
    """16 questions of 4 answers behind 400 tokens of examples: all at once, and each answer by itself."""
    generator = np.random.default_rng(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(generator.integers(1, model.config.vocab_size, size=count).tolist())

    examples = ids(400)
    requests = [(context, ids(4)) for context in [examples + ids(40) for _ in range(16)] for _ in range(4)]
    seconds = interleaved(
        {
            "together": lambda: score_continuations(model, requests, rows=16),
            "one_by_one": lambda: [score_continuations(model, [request], rows=1) for request in requests],
        },
        pairs=pairs,
    )
    ratios = [one / other for one, other in zip(seconds["one_by_one"], seconds["together"], strict=True)]
    return {
        "questions": 16,
        "answers_each": 4,
        "tokens_of_shared_examples": 400,
        "processor_seconds": {name: round(statistics.median(one), 3) for name, one in seconds.items()},
        "times_as_fast": round(statistics.median(ratios), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--world", action="store_true", help="a model with the World vocabulary, too")
    parser.add_argument("--output", type=Path, help="figures, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = infctx.load_model(ROOT / "datasets" / "byte_finch" / "model.safetensors")
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": 1,
        "machine": platform.machine(),
        "chunk_tokens": CHUNK_TOKENS,
        "reading": [measure_reading(model, num_tokens=arguments.tokens, pairs=arguments.pairs)],
        "questions": measure_questions(model, pairs=arguments.pairs),
    }
    if arguments.world:
        wide = Finch(
            new_config(version="6", n_layer=model.config.n_layer, n_embd=model.config.n_embd, vocab_size=65536)
        )
        initialise_(wide, seed=0)
        found["reading"].append(measure_reading(wide.eval(), num_tokens=arguments.tokens // 8, pairs=arguments.pairs))
    print(json.dumps(found, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
