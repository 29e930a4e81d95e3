"""Replacing a folder that exists: the old one stands until the new one is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from infctx.checkpoint.atomic import remove_unfinished, replace_directory
from infctx.errors import CheckpointError


def writing(text: str):
    return lambda folder: (folder / "file").write_text(text)


def failing(folder: Path) -> None:
    (folder / "file").write_text("half")
    raise OSError(28, "No space left on device")


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    replace_directory(final, writing("one"))
    with pytest.raises(CheckpointError, match="exists already"):
        replace_directory(final, writing("two"))
    assert (final / "file").read_text() == "one"
    replace_directory(final, writing("two"), overwrite=True)
    assert (final / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    replace_directory(final, writing("one"))
    with pytest.raises(OSError, match="No space left"):
        replace_directory(final, failing, overwrite=True)
    assert (final / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_process_left_is_removed_and_the_rest_stays(tmp_path: Path) -> None:
    dead_pid = 2**22 + 1  # above every pid the kernel gives out
    for name in (f".tmp-{dead_pid}-adapter", ".tmp-1-adapter", "adapter", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / f".result.json.tmp-{dead_pid}").write_text("{")
    remove_unfinished(tmp_path)
    # Process 1 lives.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".tmp-1-adapter", "adapter"]


def test_a_late_writer_of_an_earlier_attempt_finds_its_folder_gone(tmp_path: Path) -> None:
    """On another machine it can have the same process number, and the same step to write."""
    attempts: list[Path] = []
    with pytest.raises(OSError, match="No space left"):
        replace_directory(tmp_path / "step", lambda folder: (attempts.append(folder), failing(folder)))
    replace_directory(tmp_path / "step", lambda folder: (attempts.append(folder), writing("two")(folder)))
    assert attempts[0] != attempts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
