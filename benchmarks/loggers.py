"""What loggers cost a training: the same steps with one and without, in turn, also with loggers that are dead.

    python benchmarks/loggers.py [--blocks 7] [--steps 12] [--output FILE]

A block is some steps of a small model (the exact gradient of one document and AdamW's update), each followed by what
the loop hands to loggers. A ratio is the median over pairs of blocks, with and without loggers, of their median steps.
Processor time is that of this process with all its threads: it holds what a logger's thread does meanwhile, and depends
less on what else the machine runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

import infctx
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.training.logger_writers import WandbOptions, writer_openers
from infctx.training.loggers import Loggers, Writer

RECORD = {"tokens": 4096, "loss": 2.3, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_second": 1e4, "chunks": 4}
RECORD |= {"chunk_tokens": 1024, "window": "document", "carried_rows": 0, "recompute_difference": 0.0}
RECORD |= {"peak_device_bytes": 0, "peak_host_bytes": 500_000_000, "seconds": 0.2}


SECONDS_TO_OPEN = 6.0


class Hanging:
    """A network that never answers."""

    told = None

    def write(self, record: Mapping[str, object]) -> None:
        """Never return."""
        threading.Event().wait()

    def close(self) -> None:
        """Nothing."""


class Failing(Hanging):
    """A disk that is full."""

    def write(self, record: Mapping[str, object]) -> None:
        """Fail."""
        raise OSError(28, "No space left on device")


def cannot_be_made(last_step: int) -> Writer:
    """A package that cannot be imported."""
    raise ImportError("no such library")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    step = make_step(arguments.tokens)
    step()
    folder = Path(tempfile.mkdtemp())
    facts = {"run": {"steps": 4}}
    named = writer_openers(["csv", "tensorboard", "wandb"], folder, wandb=WandbOptions(offline=True), facts=facts)
    cases: dict[str, dict[str, Callable[[int], Writer]]] = {
        **{name: {name: opener} for name, opener in named.items()},
        "all three": dict(named),
        "hangs in every call": {"hanging": lambda last_step: Hanging()},
        "disk full": {"failing": lambda last_step: Failing()},
        "cannot be imported": {"broken": cannot_be_made},
        "none again": {},
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(arguments.blocks):
        for name, openers in cases.items():
            without = block(step, {}, num_steps=arguments.steps)
            with_loggers = block(step, openers, num_steps=arguments.steps)
            found[name].append((with_loggers[0] / without[0], with_loggers[1] / without[1]))
    rows = [row(name, ratios) for name, ratios in found.items()]
    result = {
        "rows": rows,
        "record_milliseconds": {name: record_milliseconds(opener(-1)) for name, opener in named.items()},
        "append_microseconds": append_microseconds(),
        "step_seconds": round(without[0], 4),
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()},
    }
    for entry in rows:
        times = f"time {entry['wall']:.3f} ({entry['wall_range']})"
        print(f"{entry['case']:22} {times}  processor {entry['processor']:.3f} ({entry['processor_range']})")
    print(f"processor ms of this process for a record: {result['record_milliseconds']}")
    print(f"one append: {result['append_microseconds']} µs; a step {result['step_seconds']} s")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def row(name: str, ratios: list[tuple[float, float]]) -> dict[str, object]:
    """The medians of a case."""
    walls, processors = (sorted(values) for values in zip(*ratios, strict=True))
    return {
        "case": name,
        "wall": round(statistics.median(walls), 4),
        "wall_range": f"{walls[0]:.3f}–{walls[-1]:.3f}",
        "processor": round(statistics.median(processors), 4),
        "processor_range": f"{processors[0]:.3f}–{processors[-1]:.3f}",
        "blocks": len(ratios),
    }


def block(
    step: Callable[[], None], openers: Mapping[str, Callable[[int], Writer]], *, num_steps: int
) -> tuple[float, float]:
    """Median seconds of a step, and mean processor seconds, with these loggers open."""
    loggers = Loggers(openers, lambda text: None)
    loggers.start(-1)
    # What they import and open is done once a run.
    time.sleep(SECONDS_TO_OPEN if openers else 0.0)
    seconds = []
    before = time.process_time()
    for number in range(num_steps):
        began = time.perf_counter()
        step()
        loggers.append({"step": number, **RECORD})
        seconds.append(time.perf_counter() - began)
    processor = (time.process_time() - before) / num_steps
    if "hanging" not in openers:
        loggers.finish()
    return statistics.median(seconds), processor


def record_milliseconds(writer: Writer) -> float:
    """Processor time of this process, all its threads, for one record of a logger that is open."""
    writer.write({"step": 0, **RECORD})
    before = time.process_time()
    for number in range(1, 301):
        writer.write({"step": number, **RECORD})
    taken = 1e3 * (time.process_time() - before) / 300
    writer.close()
    return round(taken, 3)


def append_microseconds() -> float:
    """What handing over a record takes, of a logger that keeps up."""
    loggers = Loggers({"failing": lambda last_step: Hanging()}, lambda text: None)
    loggers.start(-1)
    taken = []
    for number in range(900):
        began = time.perf_counter()
        loggers.append({"step": number, **RECORD})
        taken.append(time.perf_counter() - began)
    return round(1e6 * statistics.median(taken), 1)


def make_step(num_tokens: int) -> Callable[[], None]:
    """A training step of a small model over one document."""
    config = new_config(version="6", n_layer=4, n_embd=128, vocab_size=257)
    model = Finch(config)
    initialise_(model, seed=0)
    tokens = torch.randint(1, 257, (1, num_tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return partial(one_step, model, tokens, optimizer)


def one_step(model: Finch, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The exact gradient, and an update."""
    optimizer.zero_grad()
    infctx.backward_through_chunks(model, tokens, chunk_tokens=512)
    optimizer.step()


if __name__ == "__main__":
    main()
