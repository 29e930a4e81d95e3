"""One process against several that share each chunk: ratios of interleaved runs.

    python benchmarks/time_parallel.py [--ranks 2] [--tokens 8192] [--pairs 9] [--output FILE]

Every process has one thread. In each pair rank 0 computes the gradient of one chunk of random bytes by a fresh Finch
alone, while the others wait, and then all compute it together; the order changes from pair to pair. A ratio is the
median of the pairs' ratios: of the seconds that passed, which other work on the machine spoils, and of processor
seconds, of one process over the busiest rank, which it spoils less. "waiting" is the share of a shared step that a rank
spends in starting messages and waiting for them, for slower ranks too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.model.state import ModelState
from infctx.model.time_parallel import Gathering, TimeGroup, bytes_per_chunk
from infctx.training.bptt import ChunkObjective, backward_through_windows


class Seconds(NamedTuple):
    """Of one step on one rank: passed, of the processor, and in messages."""

    passed: float
    processor: float
    waiting: float


class TimedGathering(Gathering):
    """Adds the time of its wait to the group's."""

    def wait(self) -> Tensor:
        began = time.perf_counter()
        gathered = super().wait()
        TimedGroup.seconds += time.perf_counter() - began
        return gathered


class TimedGroup(TimeGroup):
    """seconds: in messages, of all groups of this process."""

    seconds = 0.0

    def start_gather(self, mine: Tensor) -> Gathering:
        began = time.perf_counter()
        gathering = super().start_gather(mine)
        TimedGroup.seconds += time.perf_counter() - began
        return TimedGathering(*gathering)


class Step:
    """The gradient of one chunk, alone or with the other ranks."""

    def __init__(self, arguments: argparse.Namespace, rank: int) -> None:
        config = new_config(
            version="6", n_layer=arguments.layers, n_embd=arguments.channels, vocab_size=257, head_size=64
        )
        self.model = Finch(config)
        initialise_(self.model, seed=0)
        self.model.train()
        self.group = TimedGroup(None, rank=rank, size=arguments.ranks)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(1, 257, (1, arguments.tokens + 1), generator=generator)
        weights = torch.ones(1, arguments.tokens)
        self._whole = Chunk(
            tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_weight=weights, starts=None, index=0, has_loss=True
        )
        self._slice = self._whole.slice_of(rank, arguments.ranks)
        self._objective = ChunkObjective(self.model)

    def run(self, *, is_shared: bool) -> Seconds:
        """One step."""
        self.model.use_time_group(self.group if is_shared else None)
        self.model.zero_grad(set_to_none=True)
        state = ModelState.zeros(self.model.config, 1, dtype=torch.float32, device="cpu")
        chunk = self._slice if is_shared else self._whole
        waited, processor, began = TimedGroup.seconds, time.process_time(), time.perf_counter()
        backward_through_windows(
            self._objective, [chunk], state, window=1, weight_total=float(self._whole.tokens.numel())
        )
        passed, processor = time.perf_counter() - began, time.process_time() - processor
        return Seconds(passed, processor, TimedGroup.seconds - waited)


def measure(rank: int, arguments: argparse.Namespace, meeting: str) -> None:
    """All pairs, as one of the ranks; rank 0 writes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=arguments.ranks)
    step = Step(arguments, rank)
    pairs = []
    for number in range(-1, arguments.pairs):
        alone, shared = None, None
        for is_shared in (False, True) if number % 2 == 0 else (True, False):
            torch.distributed.barrier()
            if is_shared:
                shared = step.run(is_shared=True)
            elif rank == 0:
                alone = step.run(is_shared=False)
        of_ranks: list[Seconds | None] = [None] * arguments.ranks
        torch.distributed.all_gather_object(of_ranks, shared)
        # The first pair warms up.
        if number >= 0 and rank == 0:
            pairs.append((alone, [Seconds(*seconds) for seconds in of_ranks if seconds is not None]))
            print(pairs[-1], flush=True)
    if rank == 0:
        report(pairs, step, arguments)
    torch.distributed.destroy_process_group()


def report(pairs: list[tuple[Seconds, list[Seconds]]], step: Step, arguments: argparse.Namespace) -> None:
    """Print the medians, and write them where that is asked for."""
    passed = sorted(alone.passed / max(one.passed for one in shared) for alone, shared in pairs)
    processor = sorted(alone.processor / max(one.processor for one in shared) for alone, shared in pairs)
    waiting = [one.waiting / one.passed for _, shared in pairs for one in shared]
    config = step.model.config
    received = sum(
        bytes_per_chunk(config, 1, arguments.ranks, hidden_bytes=4, is_backward=is_backward)
        for is_backward in (False, True)
    )
    results = {
        "faster": round(statistics.median(passed), 3),
        "faster_lowest_highest": [round(passed[0], 3), round(passed[-1], 3)],
        "faster_by_processor_seconds": round(statistics.median(processor), 3),
        "by_processor_lowest_highest": [round(processor[0], 3), round(processor[-1], 3)],
        "waiting": round(statistics.median(waiting), 3),
        "seconds_alone": round(statistics.median(alone.passed for alone, _ in pairs), 3),
        "seconds_shared": round(statistics.median(max(one.passed for one in shared) for _, shared in pairs), 3),
        "processor_seconds_alone": round(statistics.median(alone.processor for alone, _ in pairs), 3),
        "processor_seconds_of_all_ranks": round(
            statistics.median(sum(one.processor for one in shared) for _, shared in pairs), 3
        ),
        "bytes_received_by_each": received,
    }
    print(json.dumps(results, indent=1))
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        machine = {"torch": torch.__version__, "machine": platform.machine()}
        arguments.output.write_text(json.dumps({**machine, **settings, **results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (arguments, f"file://{folder}/meeting"), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
