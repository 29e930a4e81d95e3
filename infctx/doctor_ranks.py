"""What the ranks of a run can do together: are collectives right, how long do they take, who does not answer."""

from __future__ import annotations

import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.errors import InfctxError, MachineError
from infctx.launch import launch
from infctx.rank_place import RankPlace, place_of
from infctx.training.rank_watch import RankWatch, host_store, join_store

# What is sent over a link at least, for each byte of the whole tensor, by P ranks.
_SENT = {
    "all-reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all-gather": lambda ranks: (ranks - 1) / ranks,
    "reduce-scatter": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
}
# torch 2.13 gave them new names, and warns of the old ones.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_SMALL_REPEATS, _LARGE_REPEATS = 30, 3
# Large enough to be limited by the link, small enough for seconds on a slow one.
_LARGE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
# Whole numbers of float64, which add up exactly in any order.
_NUM_VALUES, _NUM_CHECKED = 509, 1021


def start_ranks(processes: int | None, *, as_json: bool) -> int:
    """Start ranks on this machine that check each other, by default one for each GPU, or 2; their exit code."""
    num_gpus = torch.cuda.device_count()
    chosen = processes or num_gpus or 2
    if num_gpus and chosen > num_gpus:
        raise InfctxError(f"--processes {chosen}: this machine has {num_gpus} GPUs, and each process needs one.")
    arguments = ["doctor", "--distributed", *(["--json"] if as_json else [])]
    return launch([sys.executable, "-m", "infctx", *arguments], processes=chosen)


def check_ranks(environ: Mapping[str, str], *, seconds: float = 60.0) -> dict[str, Any] | None:
    """Check the collectives among the ranks that have been started; the findings in rank 0, None elsewhere.

    Args:
        seconds: in which every rank must answer. One that does not, later than at the start, ends all processes with
            exit code 4 and a message that names it.

    Raises:
        RecipeError: the environment does not say which rank this is.
        MachineError: not all ranks have come.
    """
    place = place_of(environ)
    device = _device_of(place)
    store = _meet(place, seconds)
    watch = _start_watch(store, place, seconds)
    try:
        found = _check_all(store, place, device, watch, seconds)
    except BaseException as error:
        watch.fail(error)
        raise
    watch.close()
    if place.rank > 0:
        # Rank 0, which keeps the store, may be gone by now.
        return None
    wrong = {rank: names for rank in range(place.ranks) if (names := store.get(f"wrong/{rank}").decode())}
    return {**found, "is_right": not wrong, "wrong": wrong}


def ranks_table(found: Mapping[str, Any]) -> str:
    """The findings for people."""
    lines = [f"{len(found['ranks'])} ranks, {found['backend']}, on {', '.join(sorted(set(found['ranks'])))}"]
    lines.append(f"  {'':<16} {'values':<8} {'4 bytes':>10} {'MB':>6} {'time':>10} {'GB/s':>7}")
    for name, one in found["operations"].items():
        large = ""
        if "bytes" in one:
            large = f" {one['bytes'] / 1e6:>6.0f} {one['seconds'] * 1e3:>7.1f} ms {one['bytes_per_second'] / 1e9:>7.2f}"
        is_wrong = any(name in names.split(", ") for names in found["wrong"].values())
        lines.append(
            f"  {name:<16} {'WRONG' if is_wrong else 'right':<8} {one['latency_seconds'] * 1e6:>7.0f} µs{large}"
        )
    lines.append("  4 bytes, time: medians. GB/s: what each rank sends at least, by that time.")
    return "\n".join(lines)


def _device_of(place: RankPlace) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise InfctxError(
            f"Rank {place.rank} is number {place.local_rank} on {socket.gethostname()}, counted from 0, which has "
            f"{torch.cuda.device_count()} GPUs: start one process for each."
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _meet(place: RankPlace, seconds: float) -> dist.Store:
    """A store that all ranks have reached."""
    where = f"{place.address}, port {place.port}"
    try:
        keeper = dist.TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0 and not place.is_store_there,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except dist.DistError as error:
        doing = "listen" if place.rank == 0 else "reach rank 0"
        raise MachineError(
            f"Rank {place.rank} on {socket.gethostname()} cannot {doing} at {where}: {str(error).splitlines()[0]}"
        ) from error
    store = dist.PrefixStore("infctx-doctor", keeper)
    store.set(f"here/{place.rank}", socket.gethostname())
    names = [f"here/{rank}" for rank in range(place.ranks)]
    try:
        store.wait(names, timedelta(seconds=seconds))
    except dist.DistError as error:
        try:
            missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        except dist.DistError:
            raise MachineError(f"Rank 0 at {where} has given up waiting for all ranks to come.") from error
        raise MachineError(
            f"Of {place.ranks} ranks, {', '.join(missing)} did not come to {where} within {seconds:g} s. Are they "
            "started, with the same MASTER_ADDR and MASTER_PORT, and is that port open between the machines?"
        ) from error
    return store


def _start_watch(store: dist.Store, place: RankPlace, seconds: float) -> RankWatch:
    if place.rank == 0:
        kept = host_store(place.address, place.ranks)
        store.set("watch", str(kept.port))
    else:
        kept = join_store(place.address, int(store.get("watch")))
    return RankWatch(kept, rank=place.rank, ranks=place.ranks, hang_seconds=seconds)


def _check_all(
    store: dist.Store, place: RankPlace, device: torch.device, watch: RankWatch, seconds: float
) -> dict[str, Any]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    watch.at(f"the start of {backend}")
    dist.init_process_group(
        backend,
        store=store,
        rank=place.rank,
        world_size=place.ranks,
        # The watch speaks first: its message names ranks, the backend's does not.
        timeout=timedelta(seconds=2 * seconds),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        operations: dict[str, dict[str, Any]] = {}
        wrong = []
        for name in _SENT:
            watch.at(f"the values of {name}")
            if not _is_right(name, place, device):
                wrong.append(name)
            operations[name] = _timed(name, place, device, watch)
        watch.at("the barrier")
        if not _barrier_holds(store, place):
            wrong.append("barrier")
        operations["barrier"] = {"latency_seconds": _median(dist.barrier, _SMALL_REPEATS, device)}
        store.set(f"wrong/{place.rank}", ", ".join(wrong))
        watch.at("the end")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    hosts = [store.get(f"here/{rank}").decode() for rank in range(place.ranks)]
    return {"backend": backend, "ranks": hosts, "operations": operations}


def _collective(name: str, whole: Tensor, part: Tensor) -> Tensor:
    """Run one: `part` is this rank's share of `whole`. Returns the one of the two that holds the result."""
    if name == "all-reduce":
        dist.all_reduce(whole)
    elif name == "all-gather":
        _GATHER(whole, part)
    elif name == "reduce-scatter":
        _SCATTER(part, whole)
        return part
    else:
        dist.broadcast(whole, src=dist.get_world_size() - 1)
    return whole


def _is_right(name: str, place: RankPlace, device: torch.device) -> bool:
    """Every rank puts in the same numbers times its own, counted from 1."""
    numbers = (torch.arange(place.ranks * _NUM_CHECKED, device=device) % _NUM_VALUES).double()
    shares = numbers.view(place.ranks, _NUM_CHECKED)
    mine = place.rank + 1
    of_all = place.ranks * (place.ranks + 1) / 2
    result = _collective(name, mine * numbers, mine * shares[place.rank])
    expected = {
        "all-reduce": of_all * numbers,
        "all-gather": (shares * torch.arange(1, place.ranks + 1, device=device)[:, None]).flatten(),
        "reduce-scatter": of_all * shares[place.rank],
        "broadcast": place.ranks * numbers,
    }
    return torch.equal(result, expected[name])


def _barrier_holds(store: dist.Store, place: RankPlace) -> bool:
    """Nobody passes before all have come."""
    time.sleep(0.02 * (place.rank % 4))
    store.add("came", 1)
    dist.barrier()
    return store.add("came", 0) == place.ranks


def _timed(name: str, place: RankPlace, device: torch.device, watch: RankWatch) -> dict[str, Any]:
    seconds = {}
    share = _LARGE_BYTES[device.type] // 4 // place.ranks
    for size, repeats in ((1, _SMALL_REPEATS), (share, _LARGE_REPEATS)):
        watch.at(f"{name} of {4 * size * place.ranks:,} bytes")
        whole, part = torch.zeros(size * place.ranks, device=device), torch.zeros(size, device=device)
        seconds[size] = _median(lambda: _collective(name, whole, part), repeats, device)  # noqa: B023
    num_bytes = 4 * share * place.ranks
    return {
        "latency_seconds": seconds[1],
        "bytes": num_bytes,
        "seconds": seconds[share],
        "bytes_per_second": _SENT[name](place.ranks) * num_bytes / seconds[share],
    }


def _median(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of a call, of which the first does not count."""
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])
