"""The metrics file: valid JSON whatever the numbers are, readable after crashes, never the end of a run."""

import json
import logging
import os
from pathlib import Path

import pytest

from infctx.errors import DataError
from infctx.training.metrics import MetricsLog, read_metrics


def steps_of(path: Path) -> list[object]:
    return [record["step"] for record in read_metrics(path)]


def fill(path: Path, num_steps: int) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, num_steps + 1):
        log.append({"step": step, "loss": 1 / step})
    return log


def test_one_object_a_line_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    assert not path.exists()
    log.append({"step": 1, "tokens": 4096, "loss": 2.5})
    assert path.read_text() == '{"step": 1, "tokens": 4096, "loss": 2.5}\n'
    log.append({"step": 2, "val_loss": 2.25})
    assert read_metrics(path) == [{"step": 1, "tokens": 4096, "loss": 2.5}, {"step": 2, "val_loss": 2.25}]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = float("nan")
    MetricsLog(path).append({"step": 1, "loss": bad, "grad_norm": float("inf"), "by_part": {"a": [-float("inf"), 1.0]}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "grad_norm": None, "by_part": {"a": [None, 1.0]}}


def test_resume_drops_later_steps_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 5)
    log = MetricsLog(path)
    log.truncate_after(3)
    assert steps_of(path) == [1, 2, 3]
    log.append({"step": 4})
    assert steps_of(path) == [1, 2, 3, 4]
    log.truncate_after(0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'{"step": 3, "note": "\xc3', b'{"step": 3}'])
def test_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert steps_of(path) == [1, 2]
    MetricsLog(path).append({"step": 4})
    assert steps_of(path) == [1, 2, 4], "a line must never be glued to a torn one"
    path.write_bytes(whole + torn)
    MetricsLog(path).truncate_after(2)
    assert path.read_bytes() == whole


def test_truncating_drops_lines_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n[1]\n{"loss": 1}\n\n{"step": 2}\n')
    MetricsLog(path).truncate_after(9)
    assert steps_of(path) == [1, 2]


def test_truncating_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).truncate_after(3)
    assert not path.exists()
    fill(path, 2)
    before = path.stat()
    MetricsLog(path).truncate_after(3)
    assert path.stat().st_ino == before.st_ino, "an intact file is not rewritten"


def test_truncation_is_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = fill(path, 3)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with caplog.at_level(logging.WARNING):
        log.truncate_after(1)
    assert steps_of(path) == [1, 2, 3]
    assert "No space left" in caplog.text
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_warns_once_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    # A device has no content of its own to check for a torn line.
    log = MetricsLog(path)
    log._may_be_torn = False
    with caplog.at_level(logging.WARNING):
        log.append({"step": 1})
        path.unlink()
        path.mkdir()
        log.append({"step": 2})
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    path.rmdir()
    log.append({"step": 3})
    assert steps_of(path) == [3], "it writes again as soon as it can"


def test_half_a_line_left_by_a_full_disk_is_cut_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = fill(path, 1)

    def tear(target: Path, *_: object, **__: object) -> None:
        with open(target, "ab") as file:
            file.write(b'{"step": 2, "lo')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jsonlines.open", tear)
        log.append({"step": 2})
    log.append({"step": 3})
    assert steps_of(path) == [1, 3]
    assert "training goes on" in caplog.text


def test_a_broken_whole_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected a JSON object, got 'hello"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        read_metrics(path)
