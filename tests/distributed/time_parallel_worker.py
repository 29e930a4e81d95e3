"""The ranks of test_time_parallel.py.

    python time_parallel_worker.py FOLDER

runs all cases by 2 and then by 4 processes; what each found goes to FOLDER/RANKS-RANK.pt. The processes are forked, so
that the imports are paid for once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# Beside this file, which is run and not imported.
from time_parallel_cases import CASES, OPERATOR_CASES, make_chunks, make_model, run_case, run_operator
from torch import Tensor

import infctx.model.time_parallel as time_parallel
from infctx.model.time_parallel import TimeGroup


def count_bytes(counted: list[int]) -> None:
    """Add what is received in each collective to counted[0], and let nobody use another."""
    gathers = ("all_gather_single", "all_gather_into_tensor")
    (name, *_) = [name for name in gathers if hasattr(torch.distributed, name)]
    real = getattr(torch.distributed, name)

    def gather(gathered: Tensor, mine: Tensor, **options: Any) -> Any:
        counted[0] += gathered.nbytes - mine.nbytes
        return real(gathered, mine, **options)

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a collective that is not counted")

    setattr(torch.distributed, name, gather)
    for name in ("all_gather", "all_reduce", "reduce_scatter_tensor", "broadcast", "send", "recv", "isend", "irecv"):
        setattr(torch.distributed, name, refused)


def break_it(how: str) -> Callable[[], None]:
    """Put an error into the model's communication; returns what takes it out again."""
    exchange, join, carry = time_parallel._Exchange.backward, time_parallel._Join.backward, time_parallel.carry

    def undo() -> None:
        time_parallel._Exchange.backward, time_parallel._Join.backward = exchange, join
        time_parallel.carry = carry

    def taken_by_all(ctx: Any, before: Tensor, after: Tensor) -> tuple[Tensor | None, ...]:
        last, shift, _ = exchange(ctx, before, after)
        is_last = ctx.group.rank == ctx.group.size - 1
        return last if is_last else last + after, shift, None

    def cut_gradient(ctx: Any, output: Tensor, after: Tensor) -> tuple[Tensor | None, ...]:
        output, own_after, state, *rest = join(ctx, output, after)
        is_last = ctx.group.rank == ctx.group.size - 1
        return output, own_after if is_last else torch.zeros_like(own_after), state, *rest

    if how == "taken_by_all":
        time_parallel._Exchange.backward = staticmethod(taken_by_all)
    elif how == "cut_gradient":
        time_parallel._Join.backward = staticmethod(cut_gradient)
    else:
        assert how == "forgets"
        time_parallel.carry = lambda state, decay, written: written
    return undo


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    """Every case, as one of the ranks."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{ranks}", rank=rank, world_size=ranks
    )
    counted = [0]
    count_bytes(counted)
    found: dict[str, Any] = {}
    for case in [case for case in CASES if ranks in case.ranks]:
        model = make_model(case)
        group = TimeGroup(None, rank=rank, size=ranks)
        model.use_time_group(group)
        counted[0] = 0
        undo = break_it(case.broken) if case.broken else None
        found[case.name] = run_case(case, model, [chunk.slice_of(rank, ranks) for chunk in make_chunks(case)])
        found[case.name] |= {"bytes_received": group.bytes_received, "bytes_counted": counted[0]}
        if undo is not None:
            undo()
    for name, starts in OPERATOR_CASES.items():
        found[name] = run_operator(TimeGroup(None, rank=rank, size=ranks), starts)
    torch.save(found, folder / f"{ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


def start_rank(rank: int, ranks: int, folder: Path) -> int:
    """Fork; the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run_rank(rank, ranks, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> int:
    """0 if every rank came to its end."""
    torch.set_num_threads(1)
    # What all of them need later.
    import peft  # noqa: F401

    for ranks in (2, 4):
        running = {start_rank(rank, ranks, folder) for rank in range(ranks)}
        while running:
            pid, status = os.wait()
            running.discard(pid)
            if status != 0:
                # The others would wait for it.
                for other in running:
                    os.kill(other, signal.SIGKILL)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
