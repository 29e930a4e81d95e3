"""Loggers: what they write is read back with their own readers, and nothing they do stops or slows a training."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from infctx.errors import RecipeError
from infctx.training import loggers as loggers_module
from infctx.training.logger_writers import CsvWriter, TensorboardWriter, WandbOptions, WandbWriter, flat, numbers_of
from infctx.training.loggers import Loggers, QueuedLogger, check_loggers


class Recorder:
    """A writer that can be told to hang or to fail."""

    told: str | None = "recorder: in memory"

    def __init__(self, fails_at: int | None = None, hangs: threading.Event | None = None) -> None:
        self.records: list[Mapping[str, object]] = []
        self.is_closed = False
        self._fails_at, self._hangs = fails_at, hangs

    def write(self, record: Mapping[str, object]) -> None:
        if self._hangs is not None:
            self._hangs.wait(20)
        if record["step"] == self._fails_at:
            raise OSError(28, "No space left on device")
        self.records.append(record)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def run_of(num_steps: int, openers: Mapping[str, Callable[[int], object]], last_step: int = -1) -> list[str]:
    """A training of so many steps; gives what people were told."""
    said: list[str] = []
    main = threading.get_ident()

    def say(text: str) -> None:
        assert threading.get_ident() == main, "told by another thread than the one that trains"
        said.append(text)

    loggers = Loggers(openers, say)
    loggers.start(last_step)
    for step in range(num_steps):
        loggers.append({"step": step, "loss": 1.0})
    loggers.finish()
    return said


def test_every_record_arrives_in_order_and_the_end_is_told() -> None:
    recorder = Recorder()
    said = run_of(500, {"recorder": lambda last_step: recorder})
    assert [record["step"] for record in recorder.records] == list(range(500))
    assert recorder.is_closed
    assert said == ["recorder: in memory"]


def test_a_logger_that_fails_is_told_of_once_and_the_others_go_on() -> None:
    good = Recorder()

    def cannot_be_made(last_step: int) -> Recorder:
        raise ImportError("libfoo.so is broken\nmore lines")

    said = run_of(50, {"bad": lambda _: Recorder(fails_at=3), "worse": cannot_be_made, "good": lambda _: good})
    assert len(good.records) == 50
    warnings_told = sorted(line for line in said if "warning" in line)
    assert len(warnings_told) == 2
    assert warnings_told[0].startswith("warning: bad failed (OSError: [Errno 28] No space left")
    assert warnings_told[1].startswith("warning: worse failed (ImportError: libfoo.so is broken). The training goes on")


def test_a_logger_that_hangs_takes_neither_time_nor_memory(
    hang: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers_module, "SECONDS_TO_FINISH", 0.2)
    logger = QueuedLogger("slow", lambda: Recorder(hangs=hang), most_waiting=100)
    began = time.perf_counter()
    for step in range(5000):
        logger.append({"step": step})
    assert time.perf_counter() - began < 1.0
    assert 4890 <= logger.num_dropped <= 4900
    logger.ask_to_finish()
    logger.wait(0.1)
    told = [line for line in logger.notices() if "warning" in line]
    assert len(told) == 1
    assert "takes nothing any more: steps are missing there from step 10" in told[0]


def test_the_end_of_a_run_waits_for_a_bounded_time(hang: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers_module, "SECONDS_TO_FINISH", 0.3)
    began = time.perf_counter()
    said = run_of(3, {"a": lambda _: Recorder(hangs=hang), "b": lambda _: Recorder(hangs=hang)})
    assert 0.25 < time.perf_counter() - began < 2.0
    assert sum("has not written everything within 0.3 seconds" in line for line in said) == 2


def test_names_and_numbers_of_a_record() -> None:
    record = {
        "step": 3,
        "loss": float("nan"),
        "lr": 0.5,
        "window": "document",
        "sets": {"a b": {"loss": 2.0, "tokens": 7}},
        "documents": ["x"],
        "val_loss": None,
    }
    assert flat(record) == {"step": 3, "lr": 0.5, "window": "document", "sets/a b/loss": 2.0, "sets/a b/tokens": 7}
    assert numbers_of(record) == {"lr": 0.5, "sets/a b/loss": 2.0, "sets/a b/tokens": 7}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_grows_columns_and_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    writer = CsvWriter(path, -1)
    writer.write({"step": 0, "loss": None, "val_loss": 4.5})
    writer.write({"step": 1, "loss": 3.25, "window": "document"})
    writer.write({"step": 2, "loss": 3.0, "sets": {"a,b": {"loss": 2.5}}})
    writer.write({"step": 3, "loss": 2.0})
    assert list(rows_of(path)[0]) == ["step", "loss", "val_loss", "window", "sets/a,b/loss"]
    assert [row["loss"] for row in rows_of(path)] == ["", "3.25", "3.0", "2.0"]
    assert rows_of(path)[2]["sets/a,b/loss"] == "2.5"
    with path.open("a") as file:
        file.write("4,1.")
    writer = CsvWriter(path, 2)
    writer.write({"step": 3, "loss": 2.0})
    assert [(row["step"], row["loss"]) for row in rows_of(path)] == [
        ("0", ""),
        ("1", "3.25"),
        ("2", "3.0"),
        ("3", "2.0"),
    ]
    # A run that begins again keeps nothing.
    CsvWriter(path, -1)
    assert rows_of(path) == []


def test_tensorboard_reads_what_was_written_and_what_was_written_again(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # Of packages that TensorBoard's reader imports.
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for last_step, steps in ((-1, range(6)), (2, range(3, 8))):
        writer = TensorboardWriter(tmp_path / "tensorboard", last_step)
        for step in steps:
            writer.write({"step": step, "loss": 10.0 * (last_step + 2) + step, "sets": {"code": {"loss": 1.0}}})
        writer.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) == {"loss", "sets/code/loss"}
    found = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert found == [(0, 10.0), (1, 11.0), (2, 12.0), *((step, 40.0 + step) for step in range(3, 8))]


@pytest.fixture
def wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own, and nobody to connect to."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, which W&B's files are behind a header of 7 bytes."""
    place, record = 7, b""
    while place < len(content):
        left_in_block = 2**15 - place % 2**15
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part of one.
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline_writes_every_step_and_keeps_its_run(tmp_path: Path, wandb_environment: None) -> None:
    from wandb.proto import wandb_internal_pb2

    for last_step, steps in ((-1, range(3)), (1, range(2, 4))):
        options = WandbOptions(project="a project", name="a name", offline=True)
        writer = WandbWriter(tmp_path / "run" / "wandb", options, {"run": {"steps": 4}}, last_step)
        assert writer.told is not None
        assert "wandb sync" in writer.told
        for step in steps:
            writer.write({"step": step, "loss": 5.0 - step, "sets": {"code": {"loss": 1.0}}})
        writer.close()
    run_id = (tmp_path / "run" / "wandb" / "run_id.txt").read_text().strip()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    found, names = [], set()
    for file in files:
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            names |= {(record.run.project, record.run.display_name)} - {("", "")}
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found += [(int(items["step"]), float(items["loss"]))] if "loss" in items else []
    assert names == {("a project", "a name")}
    assert found == [(0, 5.0), (1, 4.0), (2, 3.0), (2, 3.0), (3, 2.0)]


def test_wandb_without_an_account_is_told_with_what_to_do(tmp_path: Path, wandb_environment: None) -> None:
    with pytest.raises(RuntimeError, match=r"not logged in: run wandb login, or set run.wandb.offline: true"):
        WandbWriter(tmp_path / "wandb", WandbOptions(), {}, -1)


def test_a_missing_package_is_a_mistake_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loggers(["csv", "tensorboard", "wandb"])
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    check_loggers(["csv", "tensorboard"])
    with pytest.raises(RecipeError, match=r'run.loggers: wandb needs .* \(pip install "infctx\[wandb\]"\)'):
        check_loggers(["csv", "wandb"])


def test_no_logger_package_is_imported_where_the_training_runs() -> None:
    assert "wandb" not in sys.modules or "infctx.training.wandb_process" not in sys.modules
