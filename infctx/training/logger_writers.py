"""What the loggers write: a CSV table, TensorBoard's event files, and runs of Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from infctx.checkpoint.atomic import write_file_atomically
from infctx.training.loggers import Writer

CSV_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
WANDB_RUN_FILE = "run_id.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbOptions:
    """Where a run goes at Weights & Biases. entity None: the user's own; name None: made up there; offline: to the disk
    only, for `wandb sync`."""

    project: str = "infctx"
    entity: str | None = None
    name: str | None = None
    offline: bool = False


def writer_openers(
    names: list[str], folder: Path, *, wandb: WandbOptions, facts: Mapping[str, object]
) -> dict[str, Callable[[int], Writer]]:
    """What opens each logger, given the last step that stays.

    Args:
        folder: of the run.
        facts: the recipe, for those that show one.
    """
    openers: dict[str, Callable[[int], Writer]] = {
        "csv": partial(CsvWriter, folder / CSV_FILE),
        "tensorboard": partial(TensorboardWriter, folder / TENSORBOARD_FOLDER),
        "wandb": partial(WandbWriter, folder / WANDB_FOLDER, wandb, facts),
    }
    return {name: openers[name] for name in names}


def flat(record: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Numbers and texts of a record, those of nested ones by names with slashes; lists and nothings are left out."""
    found: dict[str, object] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            found[f"{prefix}{key}"] = value
    return found


def numbers_of(record: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a record but for its step, by names as in `flat`."""
    named = flat(record).items()
    return {name: value for name, value in named if isinstance(value, int | float) and name != "step"}


class CsvWriter:
    """A table with a line for each step. A name that turns up later becomes a new column at the right."""

    told = None

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self._columns: list[str] = []
        rows = self._rows_up_to(last_step)
        if path.exists():
            self._rewrite(rows)

    def write(self, record: Mapping[str, object]) -> None:
        """Add a line, on the disk when this returns."""
        row = flat(record)
        # A step whose numbers were all null has named them all the same.
        names = [name for name in (*record, *row) if not isinstance(record.get(name), Mapping | list)]
        if any(name not in self._columns for name in names):
            rows = self._rows_up_to(None)
            self._columns = list(dict.fromkeys([*self._columns, *names]))
            self._rewrite(rows)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def close(self) -> None:
        """Nothing is left."""

    def _rows_up_to(self, step: int | None) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            self._columns = list(reader.fieldnames or [])
            # A line that was cut off by a full disk has no last column.
            whole = [row for row in reader if None not in row.values() and row.get("step", "").isdecimal()]
        return [row for row in whole if step is None or int(row["step"]) <= step]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_file_atomically(
            self._path, lambda unfinished: unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
        )


class TensorboardWriter:
    """Event files; those of steps that are written again are purged when they are read."""

    told = None

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1, flush_secs=10)

    def write(self, record: Mapping[str, object]) -> None:
        """Hand it to TensorBoard's own queue, which is on the disk within 10 seconds."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers_of(record).items()]
        # All of a step as one event: each costs the training's process some of a millisecond.
        self._writer.file_writer.add_summary(Summary(value=values), record["step"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WandbWriter:
    """A process that holds the run at Weights & Biases: the package connects, waits and keeps threads and exit hooks.

    Steps that are written again have the same numbers as before, on the same x-axis.
    """

    def __init__(self, folder: Path, options: WandbOptions, facts: Mapping[str, object], last_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / WANDB_RUN_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8").strip()
        told = {"folder": str(folder.parent), "id": run_id, "config": dict(facts), **asdict(options)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "infctx.training.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            # Ctrl-C is for the training, which then says what is left.
            start_new_session=True,
        )
        self._send(told)
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or '{"problem": "its process ended without a word"}')
        if "problem" in answer:
            self._end()
            raise RuntimeError(answer["problem"])
        self.told: str | None = f"wandb: {answer['where']}"

    def write(self, record: Mapping[str, object]) -> None:
        """Hand it to the process."""
        self._send({"step": record["step"], **numbers_of(record)})

    def close(self) -> None:
        """Let it come to its end; where the network is slow it goes on by itself."""
        if (code := self._end()) != 0:
            raise RuntimeError(f"its process ended with {code}")

    def _end(self) -> int:
        """Close its input and wait for it; its exit code."""
        # What it has not read of its input is lost with it.
        with contextlib.suppress(BrokenPipeError), self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
        return self._process.wait()

    def _send(self, line: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"its process ended with {self._end()}") from None
