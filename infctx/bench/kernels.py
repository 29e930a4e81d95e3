"""`infctx bench kernels`: settings, peers, the suite, and what is kept of it while it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from infctx.bench.gates import GateKeeper
from infctx.bench.machine import commit, machine_facts, versions
from infctx.bench.pairs import time_on_cpu, time_on_cuda
from infctx.bench.peers import Peer, find_peers
from infctx.bench.report import gate_facts, print_gates, print_rows, row_facts, row_text
from infctx.bench.wkv6_sides import DTYPES, Side, compiled_side
from infctx.bench.wkv6_suite import Row, Settings, check_backends, open_gates, plan, time_rows
from infctx.checkpoint.atomic import write_file_atomically
from infctx.errors import InfctxError

# What is measured where nothing else is asked for.
FULL: dict[str, Any] = {"tokens": (1024, 4096), "dtypes": ("fp32", "bf16"), "heads": 12, "pairs": 15}
QUICK: dict[str, Any] = {"tokens": (256,), "dtypes": ("fp32",), "heads": 2, "pairs": 3}


def make_settings(*, device: str | None, is_quick: bool, **given: Any) -> Settings:
    """Check the user's settings, and fill in those that are None or empty.

    Raises: InfctxError: a device that is not here, a dtype that is not measured, a backend that cannot be used.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InfctxError(f"--device {device}: expected cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InfctxError("--device cuda: torch finds no CUDA device here. Use --device cpu, or a machine with one.")
    for dtype in given["dtypes"] or ():
        if dtype not in DTYPES:
            raise InfctxError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    limit = given["seconds_per_case"]
    if limit is not None and not math.isfinite(limit):
        raise InfctxError(f"--seconds-per-case {limit}: expected a number of seconds; leave it out for no limit.")
    filled = {**given, **{key: given[key] or value for key, value in (QUICK if is_quick else FULL).items()}}
    # What is given twice is measured once.
    lists = {key: tuple(dict.fromkeys(filled[key] or ())) for key in ("tokens", "dtypes", "backends")}
    settings = Settings(device=device, **{**filled, **lists})
    check_backends(settings)
    return settings


def bench_kernels(
    settings: Settings, *, peers: list[str], with_compiled: bool | None, output: Path | None, console: Console
) -> dict[str, Any]:
    """Measure, print what comes out, and return it for JSON. An interrupt ends the measuring, not the report.

    Args:
        peers: NAME=PATH or NAME.
        with_compiled: compare with torch.compile of our torch backend too; None = if no peer is at hand.
        output: a folder for kernels_DEVICE.json, which is kernels_DEVICE.partial.json until all is measured.
    Raises:
        InfctxError: a peer that does not exist, or is not where it should be.
    """
    found = find_peers(peers)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    for name, peer in found.items():
        if peer.absence is not None:
            console.print(f"Without the peer {name}: {peer.absence}.", markup=False, soft_wrap=True)
    others = [side for peer in found.values() for side in peer.sides]
    if with_compiled or (with_compiled is None and not others):
        others.insert(0, compiled_side())
    with _threads(settings.threads):
        record = _Record(settings, found, output)
        try:
            _measure(settings, others, record, console)
            record.is_complete = True
        except KeyboardInterrupt:
            console.print("Interrupted: this is what was measured until then.")
    print_rows(console, record.rows)
    record.keep()
    return record.facts()


class _Record:
    """All that came out so far; `keep` puts it on the disk, where that was asked for."""

    def __init__(self, settings: Settings, peers: dict[str, Peer], output: Path | None) -> None:
        self.keeper = GateKeeper()
        self.rows: list[Row] = []
        self.is_complete = False
        self._name = f"kernels_{settings.device}"
        self._output = output
        self._beginning: dict[str, Any] = {
            "machine": machine_facts(torch.device(settings.device)),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": asdict(settings),
            "peers": {
                name: {"version": peer.version, "absence": peer.absence, "sides": [side.name for side in peer.sides]}
                for name, peer in peers.items()
            },
        }

    def facts(self) -> dict[str, Any]:
        return {
            **self._beginning,
            "is_complete": self.is_complete,
            "gates": [gate_facts(gate) for gate in self.keeper.gates],
            "rows": [row_facts(row) for row in self.rows],
        }

    def keep(self) -> None:
        if self._output is None:
            return
        text = json.dumps(self.facts(), indent=1, allow_nan=False) + "\n"
        partial = self._output / f"{self._name}.partial.json"
        # An earlier result stands until this one is whole.
        path = self._output / f"{self._name}.json" if self.is_complete else partial
        write_file_atomically(path, lambda unfinished: _write_text(unfinished, text))
        if self.is_complete:
            partial.unlink(missing_ok=True)


def _measure(settings: Settings, others: list[Side], record: _Record, console: Console) -> None:
    comparisons = plan(settings, others)
    open_gates(comparisons, record.keeper)
    print_gates(console, record.keeper.gates)
    timer = time_on_cuda if settings.device == "cuda" else time_on_cpu
    rows = time_rows(
        comparisons, record.keeper, timer, pairs=settings.pairs, seconds_per_case=settings.seconds_per_case
    )
    for number, row in enumerate(rows, start=1):
        record.rows.append(row)
        record.keep()
        position = f"{number}/{len(comparisons)}"
        console.print(f"{position} {row_text(row)}", markup=False, highlight=False, soft_wrap=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """Torch with so many threads until the measuring is over."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
