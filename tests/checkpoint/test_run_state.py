"""Checkpoints survive what happens to machines: kills, failing disks, flipped bits, two runs in one folder."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.checkpoint import run_state
from infctx.checkpoint.atomic import MANIFEST_NAME, replace_directory, verify_manifest, write_manifest
from infctx.checkpoint.run_state import LoadedRun, RunLock, RunState, load_run_state, save_run_state
from infctx.errors import CheckpointError


def make_state(step: int) -> RunState:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(16, 8, generator=generator)
    return RunState(
        step=step,
        tensors={
            "trainable": {"emb.weight": weight, "half": weight.bfloat16(), "view": weight.T[1:3]},
            "optimizer": {"0.exp_avg": weight * 2, "0.step": torch.tensor(float(step))},
            "rng": {"cpu": generator.get_state()},
            "rows": {},
        },
        facts={"tokens": step * 1000, "cursor": {"file": "a.jsonl", "offset": 12}, "best": 0.1 + step, "none": None},
    )


def assert_same(found: RunState, expected: RunState) -> None:
    assert found.step == expected.step
    assert found.facts == expected.facts
    assert found.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor), (group, name)


def load(folder: Path) -> LoadedRun:
    loaded = load_run_state(folder)
    assert loaded is not None
    assert_same(loaded.state, make_state(loaded.state.step))
    return loaded


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---------------------------------------------------------------- saving, loading, keeping


def test_round_trip_and_layout(tmp_path):
    path = save_run_state(tmp_path, make_state(100))
    assert path == tmp_path / "checkpoints" / "step-000100"
    groups = ["optimizer", "rng", "rows", "trainable"]
    assert sorted(p.name for p in path.iterdir()) == sorted(
        [MANIFEST_NAME, "state.json", *(f"{group}.safetensors" for group in groups)]
    )
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000100\n"
    assert json.loads((path / "state.json").read_text())["schema"] == 2
    assert load(tmp_path).skipped == []


def test_nothing_saved_yet(tmp_path):
    assert load_run_state(tmp_path / "nowhere") is None
    assert load_run_state(tmp_path) is None
    (tmp_path / "checkpoints" / ".tmp-1-step-000001").mkdir(parents=True)
    assert load_run_state(tmp_path) is None


def test_same_state_same_bytes(tmp_path):
    left, right = (save_run_state(tmp_path / name, make_state(5)) for name in ("left", "right"))
    assert [p.read_bytes() for p in sorted(left.iterdir())] == [p.read_bytes() for p in sorted(right.iterdir())]


@pytest.mark.parametrize(("keep", "expected"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_keeps_the_newest(tmp_path, keep, expected):
    for step in range(1, 5):
        save_run_state(tmp_path, make_state(step), keep=keep)
    assert names_in(tmp_path) == sorted(["latest", *(f"step-{step:06d}" for step in expected)])
    assert load(tmp_path).state.step == 4


def test_steps_beyond_six_digits_stay_in_order(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        save_run_state(tmp_path, make_state(step))
    assert names_in(tmp_path) == ["latest", "step-1000000", "step-1000001"]
    assert load(tmp_path).state.step == 1_000_001


def test_saving_a_step_twice_writes_nothing(tmp_path):
    path = save_run_state(tmp_path, make_state(1))
    before = {p: p.stat().st_mtime_ns for p in [path, *path.iterdir(), path.parent / "latest"]}
    assert save_run_state(tmp_path, make_state(1)) == path
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_saving_over_a_damaged_step_replaces_it(tmp_path):
    save_run_state(tmp_path, make_state(1))
    path = save_run_state(tmp_path, make_state(2))
    (path / "rng.safetensors").write_bytes(b"")
    assert load(tmp_path).state.step == 1
    save_run_state(tmp_path, make_state(2))
    loaded = load(tmp_path)
    assert (loaded.state.step, loaded.skipped) == (2, [])
    assert names_in(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_latest_is_repaired_and_never_trusted(tmp_path):
    save_run_state(tmp_path, make_state(1))
    save_run_state(tmp_path, make_state(2))
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text("step-000009\n")
    loaded = load(tmp_path)
    assert loaded.state.step == 2
    assert "names 'step-000009', which is not there" in loaded.skipped[0]
    for content in (b"", b"\xff\xfe", b"../../etc"):
        latest.write_bytes(content)
        assert load(tmp_path).state.step == 2
    latest.unlink()
    assert load(tmp_path).skipped == []
    save_run_state(tmp_path, make_state(2))
    assert latest.read_text() == "step-000002\n"


def test_a_run_whose_checkpoints_vanished_does_not_start_over_silently(tmp_path):
    path = save_run_state(tmp_path, make_state(1))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint can be loaded"):
        load_run_state(tmp_path)


def test_all_damaged_names_each_with_its_reason(tmp_path):
    for step in (1, 2):
        path = save_run_state(tmp_path, make_state(step))
    (path / MANIFEST_NAME).unlink()
    (tmp_path / "checkpoints" / "step-000001" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        load_run_state(tmp_path)
    assert "step-000002: damaged or unfinished: it has no MANIFEST.json" in str(caught.value)
    assert "step-000001: damaged: state.json has 2 bytes; expected" in str(caught.value)


def set_schema(path: Path, file: str, schema: int) -> None:
    content = json.loads((path / file).read_text())
    content["schema"] = schema
    (path / file).write_text(json.dumps(content))
    if file == "state.json":
        (path / MANIFEST_NAME).unlink()
        write_manifest(path)


@pytest.mark.parametrize(("file", "known"), [("state.json", 2), (MANIFEST_NAME, 1)])
def test_a_newer_schema_stops_and_is_never_replaced(tmp_path, file, known):
    save_run_state(tmp_path, make_state(1))
    path = save_run_state(tmp_path, make_state(2))
    set_schema(path, file, known + 1)
    with pytest.raises(CheckpointError, match=rf"has schema {known + 1}; this infctx reads up to {known}"):
        load_run_state(tmp_path)
    before = snapshot(path)
    with contextlib.suppress(CheckpointError):
        save_run_state(tmp_path, make_state(2))
    assert snapshot(path) == before


def test_a_checkpoint_of_an_older_infctx_is_named_as_such(tmp_path):
    """It is not taken for damaged, and nothing older or newer quietly takes its place."""
    for step in (1, 2):
        path = save_run_state(tmp_path, make_state(step))
    set_schema(path, "state.json", 1)
    with pytest.raises(CheckpointError, match=r"written by an older infctx.* with the infctx that wrote it") as caught:
        load_run_state(tmp_path)
    assert "damaged" not in str(caught.value)
    path = save_run_state(tmp_path, make_state(3))
    (path / "rng.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"older infctx(.|\n)*step-000003: damaged: rng.safetensors"):
        load_run_state(tmp_path)


def test_leftovers_of_dead_processes_are_removed_and_others_stay(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (checkpoints / f".tmp-{pid}-step-000003" / "inside").mkdir(parents=True)
        (checkpoints / f".latest.tmp-{pid}").touch()
    (checkpoints / ".tmp-notes").touch()
    save_run_state(tmp_path, make_state(1))
    alive = os.getppid()
    assert names_in(tmp_path) == sorted(
        [f".latest.tmp-{alive}", f".tmp-{alive}-step-000003", ".tmp-notes", "latest", "step-000001"]
    )


# ---------------------------------------------------------------- damage


def test_every_damaged_byte_is_seen_and_named(tmp_path):
    """Flips, cuts and zeroed blocks in every file of a checkpoint: the previous one loads, and the file is named."""
    save_run_state(tmp_path, make_state(1))
    path = save_run_state(tmp_path, make_state(2))
    random_source = random.Random(5)
    num_trials = 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        positions = random_source.sample(range(len(content)), min(60, len(content)))
        damages = [content[:p] + bytes([content[p] ^ 1 << p % 8]) + content[p + 1 :] for p in positions]
        damages += [content[:p] for p in positions[:20]]
        damages += [content[:p] + bytes(len(content[p : p + 16])) + content[p + 16 :] for p in positions[:20]]
        for damaged in damages:
            if damaged == content:
                continue
            file.write_bytes(damaged)
            loaded = load_run_state(tmp_path)
            assert loaded is not None
            assert loaded.state.step == 1
            assert str(path) in loaded.skipped[0]
            if file.name != MANIFEST_NAME:
                assert file.name in loaded.skipped[0]
            num_trials += 1
        file.write_bytes(content)
    assert num_trials > 400
    assert load(tmp_path).state.step == 2


def test_missing_extra_and_linked_files(tmp_path):
    save_run_state(tmp_path, make_state(1))
    path = save_run_state(tmp_path, make_state(2))
    moved = tmp_path / "moved"
    (path / "rng.safetensors").rename(moved)
    assert "rng.safetensors is missing" in load(tmp_path).skipped[0]
    (path / "rng.safetensors").symlink_to(moved)
    assert "rng.safetensors is a link" in load(tmp_path).skipped[0]
    (path / "rng.safetensors").unlink()
    moved.rename(path / "rng.safetensors")
    (path / "extra.safetensors").touch()
    assert "extra.safetensors is not in MANIFEST.json" in load(tmp_path).skipped[0]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "nonsense",
        "[" * 100_000,
        '{"schema": true}',
        '{"schema": 1}',
        '{"schema": 0, "files": {}}',
        '{"schema": 1, "files": {"a": {"bytes": 1}}}',
        '{"schema": 1, "files": {"../x": {"bytes": 1, "sha256": "00"}}}',
    ],
)
def test_malformed_manifests(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        verify_manifest(tmp_path)


def test_manifest_covers_subfolders(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"12345")
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["files"]["adapter/weights"]["bytes"] == 5
    (tmp_path / "adapter" / "weights").write_bytes(b"12346")
    with pytest.raises(CheckpointError, match=r"adapter/weights has SHA-256 \w+; expected \w+"):
        verify_manifest(tmp_path)


def test_replace_directory_refuses_and_cleans_up(tmp_path):
    replace_directory(tmp_path / "final", lambda folder: (folder / "a").write_text("x"))
    with pytest.raises(CheckpointError, match="exists already"):
        replace_directory(tmp_path / "final", lambda folder: None)

    def break_off(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_directory(tmp_path / "other", break_off)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# ---------------------------------------------------------------- failing calls and kills


def count_calls(folder: Path, at_call: Callable[..., contextlib.AbstractContextManager[list[int]]]) -> int:
    """How many watched calls the third save of a run makes; it writes, verifies, names and removes."""
    for step in (1, 2):
        save_run_state(folder, make_state(step))
    with at_call(0, lambda: None) as count:
        save_run_state(folder, make_state(3))
    return count[0]


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_any_call_may_fail(in_memory, at_call):
    num_calls = count_calls(in_memory / "count", at_call)
    assert num_calls > 40
    num_failed_saves = 0
    for number in range(1, num_calls + 1):
        folder = in_memory / str(number)
        for step in (1, 2):
            save_run_state(folder, make_state(step))
        with at_call(number, fail):
            try:
                save_run_state(folder, make_state(3))
            except (OSError, CheckpointError):
                num_failed_saves += 1
        loaded = load(folder)
        assert loaded.state.step in (2, 3)
        assert loaded.skipped == []
        latest = (folder / "checkpoints" / "latest").read_text()
        assert latest in ("step-000002\n", "step-000003\n")
        assert (folder / "checkpoints" / latest.strip()).is_dir()
        save_run_state(folder, make_state(3))
        assert names_in(folder) == ["latest", "step-000002", "step-000003"]
        assert load(folder).state.step == 3
    assert num_failed_saves > num_calls * 0.8


def test_a_disk_that_stays_broken(in_memory, at_call):
    """From some call on everything fails, the clean-up as well; when the disk is back, so is the run."""
    num_calls = count_calls(in_memory / "count", at_call)
    for number in range(1, num_calls + 1, 2):
        folder = in_memory / str(number)
        for step in (1, 2):
            save_run_state(folder, make_state(step))
        with at_call(number, fail, and_after=True), contextlib.suppress(OSError, CheckpointError):
            save_run_state(folder, make_state(3))
        assert load(folder).skipped == []
        save_run_state(folder, make_state(3))
        assert names_in(folder) == ["latest", "step-000002", "step-000003"]
        assert load(folder).state.step == 3


def test_everything_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """What a power cut could lose: each file and folder of the checkpoint is on the disk before its name is."""
    flushed: set[int] = set()
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def rename(source, target):
        if Path(target).name.startswith("step-"):
            inodes = {path.stat().st_ino for path in [Path(source), *Path(source).rglob("*")]}
            assert inodes <= flushed
            flushed.clear()
            real_rename(source, target)
        else:
            real_rename(source, target)

    def replace(source, target):
        assert Path(source).stat().st_ino in flushed
        if Path(target).name == "latest":
            assert Path(target).parent.stat().st_ino in flushed
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    save_run_state(tmp_path, make_state(1))
    assert (tmp_path / "checkpoints").stat().st_ino in flushed
    flushed.clear()

    def build(folder: Path) -> None:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text("not flushed by its writer")

    replace_directory(tmp_path / "step-other", build)
    assert tmp_path.stat().st_ino in flushed


def test_a_checkpoint_that_does_not_read_back_replaces_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        save_run_state(tmp_path, make_state(step))

    def lose_a_bit(final: Path, build: Callable[[Path], None]) -> None:
        replace_directory(final, build)
        content = bytearray((final / "rng.safetensors").read_bytes())
        content[-1] ^= 1
        (final / "rng.safetensors").write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "replace_directory", lose_a_bit)
        with pytest.raises(CheckpointError, match=r"step-000003: damaged: rng\.safetensors has SHA-256"):
            save_run_state(tmp_path, make_state(3), keep=1)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000002\n"
    assert {"step-000001", "step-000002"} <= set(names_in(tmp_path))
    assert load(tmp_path).state.step == 2


def assert_survived(folder: Path) -> int:
    """After a kill: `latest` is whole and names a checkpoint, no checkpoint is in pieces, and the newest loads."""
    latest = folder / "checkpoints" / "latest"
    loaded = load(folder)
    assert loaded.skipped == []
    name = latest.read_text()
    assert name == f"step-{int(name[5:]):06d}\n"
    assert (folder / "checkpoints" / name.strip()).is_dir()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        verify_manifest(checkpoint)
    # Behind by one for each kill in a row that came between the new checkpoint and its name.
    assert int(name[5:]) <= loaded.state.step
    return loaded.state.step


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_at_every_call(in_memory, at_call, in_child):
    num_calls = count_calls(in_memory / "count", at_call)
    for number in range(1, num_calls + 1):
        folder = in_memory / str(number)
        for step in (1, 2):
            save_run_state(folder, make_state(step))

        def save_and_die(folder=folder, number=number) -> None:
            with at_call(number, kill_self):
                save_run_state(folder, make_state(3))

        _, status = os.waitpid(in_child(save_and_die), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert assert_survived(folder) in (2, 3)
        save_run_state(folder, make_state(3))
        assert names_in(folder) == ["latest", "step-000002", "step-000003"]


def test_killed_at_random_instants(in_memory, in_child):
    random_source = random.Random(11)
    step = 1
    start = time.perf_counter()
    save_run_state(in_memory, make_state(step))
    longest_seconds = 0.01 + 6 * (time.perf_counter() - start)

    def save_for_ever() -> None:
        for later in range(step + 1, step + 10_000):
            save_run_state(in_memory, make_state(later))

    for _ in range(25):
        pid = in_child(save_for_ever)
        time.sleep(random_source.uniform(0.0, longest_seconds))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        survived = assert_survived(in_memory)
        assert survived >= step
        step = survived
    assert step > 5
    save_run_state(in_memory, make_state(step + 1))
    assert [name for name in names_in(in_memory) if name.startswith(".")] == []


# ---------------------------------------------------------------- the lock


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_second_holder_is_told_who_holds_it_and_changes_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with RunLock(tmp_path):
        before = snapshot(tmp_path)
        with pytest.raises(CheckpointError, match=f"pid {os.getpid()} host {socket.gethostname()}"), RunLock(tmp_path):
            pass
        assert snapshot(tmp_path) == before
    with RunLock(tmp_path) as lock:
        assert isinstance(lock, RunLock)


def test_a_longer_name_left_in_the_lock_is_gone(tmp_path):
    (tmp_path / ".lock").write_text("pid 4999999 host a-host-with-a-very-long-name.left.behind.example\n")
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} host {socket.gethostname()}\n"
    assert (tmp_path / ".lock").read_text() == ""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, in_child):
    def hold() -> None:
        with RunLock(tmp_path / "run"):
            (tmp_path / "ready").touch()
            time.sleep(60)

    pid = in_child(hold)
    while not (tmp_path / "ready").exists():
        time.sleep(0.005)
    with pytest.raises(CheckpointError, match=f"pid {pid} "), RunLock(tmp_path / "run"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert f"pid {pid} " in (tmp_path / "run" / ".lock").read_text()
    with RunLock(tmp_path / "run"):
        assert f"pid {os.getpid()} " in (tmp_path / "run" / ".lock").read_text()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path, in_child):
    with RunLock(tmp_path):
        worker = in_child(lambda: time.sleep(60))
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_the_worker_of_a_killed_run_does_not_keep_the_lock(tmp_path, in_child):
    worker_file = tmp_path / "worker"

    def work() -> None:
        worker_file.with_suffix(".part").write_text(str(os.getpid()))
        worker_file.with_suffix(".part").rename(worker_file)
        time.sleep(60)

    def hold() -> None:
        with RunLock(tmp_path / "run"):
            in_child(work)
            time.sleep(60)

    holder = in_child(hold)
    while not worker_file.exists():
        time.sleep(0.005)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    worker = int(worker_file.read_text())
    try:
        with RunLock(tmp_path / "run"):
            os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_races_have_one_winner(tmp_path, in_child):
    for race in range(20):
        folder = tmp_path / str(race)
        start, won = tmp_path / f"start{race}", tmp_path / f"won{race}"

        def run(folder=folder, start=start, won=won) -> None:
            while not start.exists():
                pass
            try:
                with RunLock(folder):
                    with won.open("a") as file:
                        file.write(f"{os.getpid()}\n")
                    while len(won.with_suffix(".lost").read_text().split("\n")) < 2:
                        time.sleep(0.002)
            except CheckpointError as error:
                with won.with_suffix(".lost").open("a") as file:
                    file.write(str(error) + "\n")

        won.with_suffix(".lost").touch()
        pids = [in_child(run) for _ in range(2)]
        start.touch()
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
        winners = won.read_text().split()
        assert len(winners) == 1
        assert f"pid {winners[0]} host" in won.with_suffix(".lost").read_text()


def test_public_names():
    assert set(run_state.__all__) == {"LoadedRun", "RunLock", "RunState", "load_run_state", "save_run_state"}
