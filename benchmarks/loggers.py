"""What loggers cost a training: the same steps with one and without, in turn, also with loggers that are dead.

    python benchmarks/loggers.py [--pairs 40] [--steps 4] [--output FILE]

The loggers of a case are opened once. A block is some steps of a small model (the exact gradient of one document and
AdamW's update); in every second one each step is followed by what the loop hands to loggers. A ratio is the median over
pairs of blocks, one of each kind; beside it the 95 % interval of the median, from resampled pairs. Processor time is
that of this process with all its threads: it holds what a logger's thread does meanwhile, and depends less on what else
the machine runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4)
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
    with contextlib.ExitStack() as closing:
        opened = {name: closing.enter_context(open_loggers(openers)) for name, openers in cases.items()}
        # What they import and open is done once a run.
        time.sleep(SECONDS_TO_OPEN)
        for pair in range(arguments.pairs):
            for name, loggers in opened.items():
                sides = [None, loggers] if pair % 2 else [loggers, None]
                taken = {side is None: block(step, side, num_steps=arguments.steps) for side in sides}
                with_loggers, without = taken[False], taken[True]
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
        times = f"time {entry['wall']:.3f} ({entry['wall_interval']})"
        print(f"{entry['case']:22} {times}  processor {entry['processor']:.3f} ({entry['processor_interval']})")
    print(f"processor ms of this process for a record: {result['record_milliseconds']}")
    print(f"one append: {result['append_microseconds']} µs; a step {result['step_seconds']} s")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def row(name: str, ratios: list[tuple[float, float]]) -> dict[str, object]:
    """The medians of a case."""
    walls, processors = zip(*ratios, strict=True)
    return {
        "case": name,
        "wall": round(statistics.median(walls), 4),
        "wall_interval": interval(walls),
        "processor": round(statistics.median(processors), 4),
        "processor_interval": interval(processors),
        "pairs": len(ratios),
    }


def interval(ratios: Sequence[float]) -> str:
    """Where the median of so many ratios lies in 95 of 100 resamplings."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{medians[50]:.3f}–{medians[-51]:.3f}"


@contextlib.contextmanager
def open_loggers(openers: Mapping[str, Callable[[int], Writer]]) -> Iterator[Loggers]:
    """Loggers as a run has them."""
    loggers = Loggers(openers, lambda text: None)
    loggers.start(-1)
    yield loggers
    if "hanging" not in openers:
        loggers.finish()


def block(step: Callable[[], None], loggers: Loggers | None, *, num_steps: int) -> tuple[float, float]:
    """Mean seconds of a step, and mean processor seconds, with what loggers are told between the steps."""
    began, before = time.perf_counter(), time.process_time()
    for number in range(num_steps):
        step()
        if loggers is not None:
            loggers.append({"step": number, **RECORD})
    return (time.perf_counter() - began) / num_steps, (time.process_time() - before) / num_steps


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
