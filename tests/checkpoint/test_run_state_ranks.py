"""Checkpoints that several processes write together: kills, full disks and lost parts cost the newest at most."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.checkpoint import run_state
from infctx.checkpoint.atomic import MANIFEST_NAME, verify_manifest, write_manifest
from infctx.checkpoint.run_state import LoadedRun, RunState, load_run_state, save_run_state
from infctx.checkpoint.writers import owners, together
from infctx.errors import CheckpointError, MachineError

GATHERS_OF_A_SAVE = 4
MOST_SECONDS = 20.0


class Rank:
    """One of several processes, each of which has a socket to each other; a value is what JSON can hold."""

    def __init__(
        self, rank: int, links: dict[int, socket.socket], on_gather: Callable[[str], None] = lambda when: None
    ):
        self.rank, self.size = rank, len(links) + 1
        self._links, self.on_gather = links, on_gather
        for link in links.values():
            link.settimeout(10.0)

    def gather(self, value: object) -> list[object]:
        self.on_gather("before")
        message = json.dumps(value).encode()
        values = {self.rank: json.loads(message)}
        try:
            for link in self._links.values():
                link.sendall(struct.pack("<q", len(message)) + message)
            self.on_gather("sent")
            for rank, link in self._links.items():
                (length,) = struct.unpack("<q", _receive(link, 8))
                values[rank] = json.loads(_receive(link, length))
        except OSError as error:
            for link in self._links.values():
                link.close()
            raise CheckpointError("a rank is gone") from error
        self.on_gather("after")
        return [values[rank] for rank in range(self.size)]


def _receive(link: socket.socket, length: int) -> bytes:
    content = b""
    while len(content) < length:
        block = link.recv(length - len(content))
        if not block:
            raise ConnectionResetError("nobody is there")
        content += block
    return content


@pytest.fixture
def run_ranks(in_child, tmp_path) -> Callable[..., list[str]]:
    """Run a function in processes; returns how each ended: "ok", "killed", or the error's type and message."""

    def run(size: int, act: Callable[[Rank], object]) -> list[str]:
        pairs = {(a, b): socket.socketpair() for b in range(size) for a in range(b)}
        pids = []
        for rank in range(size):

            def work(rank: int = rank) -> None:
                links = {}
                for (low, high), (of_low, of_high) in pairs.items():
                    for end, owner, other in ((of_low, low, high), (of_high, high, low)):
                        links.update({other: end} if owner == rank else {})
                        if owner != rank:
                            end.close()
                try:
                    act(Rank(rank, dict(sorted(links.items()))))
                    outcome = "ok"
                except BaseException as error:
                    outcome = f"{type(error).__name__}: {error}"
                (tmp_path / f"outcome-{rank}").write_text(outcome)

            pids.append(in_child(work))
        for link in [end for pair in pairs.values() for end in pair]:
            link.close()
        outcomes, deadline = [], time.monotonic() + MOST_SECONDS
        for rank, pid in enumerate(pids):
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > deadline:
                    for other in pids[rank:]:
                        os.kill(other, signal.SIGKILL)
                        os.waitpid(other, 0)
                    pytest.fail(f"rank {rank} was left waiting; ended before: {outcomes}")
                time.sleep(0.001)
            outcome = tmp_path / f"outcome-{rank}"
            outcomes.append("killed" if os.WIFSIGNALED(ended[1]) else outcome.read_text())
            outcome.unlink(missing_ok=True)
        return outcomes

    return run


def whole_state(step: int) -> RunState:
    generator = torch.Generator().manual_seed(step)
    weights = {f"blocks.{i}.weight": torch.randn(i + 1, 5, generator=generator) for i in range(7)}
    return RunState(
        step=step,
        tensors={
            "trainable": weights,
            "optimizer": {f"{i}.exp_avg": weight * 2 for i, weight in enumerate(weights.values())},
            "random": {"cpu": generator.get_state()},
            "rows": {},
        },
        facts={"tokens": step * 1000, "cursor": {"offset": 12}},
    )


def part_of(state: RunState, rank: int, size: int) -> RunState:
    """What one rank owns; facts that must not be used, of every rank but the first."""
    tensors = {}
    for group, all_of_it in state.tensors.items():
        rank_of = owners([tensor.nbytes for tensor in all_of_it.values()], size)
        pairs = zip(all_of_it.items(), rank_of, strict=True)
        tensors[group] = {name: tensor for (name, tensor), owner in pairs if owner == rank}
    return RunState(step=state.step, tensors=tensors, facts=state.facts if rank == 0 else {"tokens": -rank})


def save(folder: Path, step: int) -> Callable[[Rank], Path]:
    return lambda writers: save_run_state(
        folder, part_of(whole_state(step), writers.rank, writers.size), writers=writers
    )


def assert_loads(folder: Path, *, writers: Rank | None = None) -> LoadedRun:
    loaded = load_run_state(folder) if writers is None else load_run_state(folder, writers=writers)
    assert loaded is not None
    expected = whole_state(loaded.state.step)
    assert loaded.state.facts == expected.facts
    assert loaded.state.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert loaded.state.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded.state.tensors[group][name], tensor), (group, name)
    return loaded


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- saving and loading


def test_what_four_ranks_write_one_or_two_read(tmp_path, run_ranks):
    assert run_ranks(4, save(tmp_path, 1)) == ["ok"] * 4
    path = tmp_path / "checkpoints" / "step-000001"
    parts = [f"{group}-{i:05}-of-00004.safetensors" for group in ("optimizer", "trainable") for i in range(1, 5)]
    alone = ["random.safetensors", "rows.safetensors"]
    assert sorted(p.name for p in path.iterdir()) == sorted([MANIFEST_NAME, "state.json", *parts, *alone])
    verify_manifest(path)
    assert assert_loads(tmp_path).skipped == []
    assert run_ranks(2, lambda writers: assert_loads(tmp_path, writers=writers)) == ["ok"] * 2
    # The other way round; then fewer ranks go on in the same folder, and older ones go.
    save_run_state(tmp_path, whole_state(2))
    assert run_ranks(4, lambda writers: assert_loads(tmp_path, writers=writers)) == ["ok"] * 4
    assert run_ranks(2, save(tmp_path, 3)) == ["ok"] * 2
    assert assert_loads(tmp_path).state.step == 3
    assert names_in(tmp_path) == ["latest", "step-000002", "step-000003"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"


def test_a_checkpoint_that_is_there_is_left_alone_by_all(tmp_path, run_ranks):
    run_ranks(3, save(tmp_path, 1))
    path = tmp_path / "checkpoints" / "step-000001"
    before = {p: p.stat().st_mtime_ns for p in [path, *path.iterdir()]}
    assert run_ranks(2, save(tmp_path, 1)) == ["ok"] * 2
    assert {p: p.stat().st_mtime_ns for p in [path, *path.iterdir()]} == before
    next(path.glob("trainable-*")).write_bytes(b"")
    assert run_ranks(2, save(tmp_path, 1)) == ["ok"] * 2
    assert assert_loads(tmp_path).skipped == []


def test_one_process_writes_what_it_always_wrote(tmp_path):
    path = save_run_state(tmp_path, whole_state(1))
    groups = [f"{group}.safetensors" for group in ("optimizer", "random", "rows", "trainable")]
    assert sorted(p.name for p in path.iterdir()) == sorted([MANIFEST_NAME, "state.json", *groups])


# ---------------------------------------------------------------- kills and failing calls


def prepared(folder: Path) -> Path:
    for step in (1, 2):
        save_run_state(folder, whole_state(step))
    return folder


def spread(first: int, last: int, number: int) -> list[int]:
    """About `number` of the numbers from the first to the last, both among them."""
    return sorted({first + round((last - first) * i / (number - 1)) for i in range(number)})


@pytest.fixture
def num_calls(in_memory, run_ranks, at_call) -> list[int]:
    """How many watched calls each of three ranks makes in a save."""
    folder = prepared(in_memory / "count")

    def counted(writers: Rank) -> None:
        with at_call(0, lambda: None) as count:
            save(folder, 3)(writers)
        (in_memory / f"count-{writers.rank}").write_text(str(count[0]))

    assert run_ranks(3, counted) == ["ok"] * 3
    return [int((in_memory / f"count-{rank}").read_text()) for rank in range(3)]


def assert_recovers(folder: Path, run_ranks) -> int:
    """The newest checkpoint loads, none is in pieces, and the next save leaves nothing of the failed one behind."""
    loaded = assert_loads(folder)
    assert loaded.skipped == []
    assert loaded.state.step in (2, 3)
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    assert (folder / "checkpoints" / latest).is_dir()
    save(folder, 3)(Rank(0, {}))
    assert assert_loads(folder).state.step == 3
    assert names_in(folder) == ["latest", "step-000002", "step-000003"]
    return loaded.state.step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_call(in_memory, run_ranks, at_call, num_calls, victim):
    numbers = spread(1, num_calls[victim], 16)
    assert len(numbers) >= 12
    steps = set()
    for number in numbers:
        folder = prepared(in_memory / str(number))

        def die(writers: Rank, folder=folder, number=number) -> None:
            with at_call(number, kill_self) if writers.rank == victim else contextlib.nullcontext():
                save(folder, 3)(writers)

        outcomes = run_ranks(3, die)
        assert outcomes.pop(victim) == "killed"
        assert outcomes == ["CheckpointError: a rank is gone"] * 2
        steps.add(assert_recovers(folder, run_ranks))
    assert steps == ({2, 3} if victim == 0 else {2})


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_killed_around_any_gather(in_memory, run_ranks, victim):
    for number in range(GATHERS_OF_A_SAVE):
        for when in ("before", "sent", "after") if victim == 0 else ("sent",):
            folder = prepared(in_memory / f"{number}-{when}")

            def die(writers: Rank, folder=folder, number=number, when=when) -> None:
                seen = []

                def watch(now: str) -> None:
                    seen.append(now)
                    if writers.rank == victim and now == when and seen.count("before") == number + 1:
                        kill_self()

                writers.on_gather = watch
                save(folder, 3)(writers)
                assert seen.count("before") == GATHERS_OF_A_SAVE

            outcomes = run_ranks(3, die)
            assert outcomes.pop(victim) == "killed"
            # Once it has said that it is done, the others need not notice.
            may_be_done = number == GATHERS_OF_A_SAVE - 1 and when != "before"
            assert set(outcomes) <= {"CheckpointError: a rank is gone", *(["ok"] if may_be_done else [])}
            step = assert_recovers(folder, run_ranks)
            assert step == (3 if number == GATHERS_OF_A_SAVE - 1 else 2) or victim == 2


def test_killed_at_random_instants(in_memory, run_ranks):
    random_source = random.Random(7)
    step = 1
    save_run_state(in_memory, whole_state(step))
    for trial in range(6):

        def save_for_ever(writers: Rank, first: int = step + 1, victim: int = trial % 3) -> None:
            if writers.rank == victim:
                signal.signal(signal.SIGALRM, lambda *_: kill_self())
                signal.setitimer(signal.ITIMER_REAL, random_source.uniform(0.05, 0.2))
            for later in range(first, first + 10_000):
                save(in_memory, later)(writers)

        random_source.random()
        outcomes = run_ranks(3, save_for_ever)
        assert outcomes.pop(trial % 3) == "killed"
        assert outcomes == ["CheckpointError: a rank is gone"] * 2
        loaded = assert_loads(in_memory)
        assert loaded.skipped == []
        assert loaded.state.step >= step
        step = loaded.state.step
    assert step > 2


@pytest.mark.parametrize("victim", [0, 2])
def test_a_disk_that_is_full_for_one_rank_at_any_call(in_memory, run_ranks, at_call, num_calls, victim):
    def fail() -> None:
        raise OSError(28, "No space left on device")

    num_failed = 0
    numbers = spread(1, num_calls[victim], 9)
    for number in numbers:
        folder = prepared(in_memory / str(number))

        def run_out(writers: Rank, folder=folder, number=number) -> None:
            with at_call(number, fail) if writers.rank == victim else contextlib.nullcontext():
                save(folder, 3)(writers)

        outcomes = run_ranks(3, run_out)
        assert len(set(outcomes)) == 1
        if outcomes[0] != "ok":
            num_failed += 1
            host = socket.gethostname()
            assert outcomes[0].startswith(f"MachineError: rank {victim} on host {host}: The disk failed: No space left")
        assert_recovers(folder, run_ranks)
    assert num_failed > 0.7 * len(numbers)


def test_every_kind_of_failure_is_told_to_all(tmp_path, run_ranks):
    prepared(tmp_path)
    where = f"rank 1 on host {socket.gethostname()}"
    errors = {
        ValueError("wrong"): f"RuntimeError: {where}: ValueError: wrong",
        MachineError("no more"): f"MachineError: {where}: no more",
        torch.OutOfMemoryError("CUDA is full"): f"MachineError: {where}: Out of memory: CUDA is full",
        CheckpointError("x: bad"): f"CheckpointError: {where}: x: bad",
        PermissionError(13, "Permission denied", "/x"): f"CheckpointError: {where}: [Errno 13] Permission denied: '/x'",
        KeyboardInterrupt("now"): f"RuntimeError: {where}: KeyboardInterrupt: now",
    }
    for error, expected in errors.items():

        def fail(writers: Rank, error=error) -> None:
            if writers.rank == 1:
                run_state.write_groups = lambda *_: (_ for _ in ()).throw(error)
            save(tmp_path, 3)(writers)

        own = "KeyboardInterrupt: now" if isinstance(error, KeyboardInterrupt) else expected
        assert run_ranks(3, fail) == [expected, own, expected]
        assert names_in(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_two_failures_are_one_error(run_ranks):
    def fail(writers: Rank) -> None:
        with together(writers) as share:
            assert share(writers.rank) == [0, 1, 2]
            if writers.rank > 0:
                raise CheckpointError(f"of {writers.rank}")
            share("rank 0 is waiting here")

    assert set(run_ranks(3, fail)) == {f"CheckpointError: rank 1 on host {socket.gethostname()}: of 1"}


def test_what_two_ranks_own_is_refused_before_anything_is_written(tmp_path, run_ranks):
    prepared(tmp_path)
    outcomes = run_ranks(2, lambda writers: save_run_state(tmp_path, whole_state(3), writers=writers))
    assert len(set(outcomes)) == 1
    assert re.search(r"optimizer: 0\.exp_avg is owned by rank 0 and by rank 1", outcomes[0])
    assert names_in(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_ranks_that_are_not_at_the_same_step_write_nothing(tmp_path, run_ranks):
    prepared(tmp_path)
    # Step 2 is there already.
    for step in (2, 3):
        outcomes = run_ranks(2, lambda writers, step=step: save(tmp_path, step + writers.rank)(writers))
        assert len(set(outcomes)) == 1
        assert f"ranks are at different [step, passes]: [[{step}, 0], [{step + 1}, 0]]" in outcomes[0]
    assert names_in(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_a_file_that_the_disk_changed_is_seen_by_the_rank_that_wrote_it(tmp_path, run_ranks):
    prepared(tmp_path)

    def lose_a_bit(writers: Rank) -> None:
        write = run_state.write_groups

        def write_and_lose(folder: Path, tensors, files):
            written = write(folder, tensors, files)
            path = folder / files["trainable"]
            path.write_bytes(path.read_bytes()[:-1] + b"\x55")
            return written

        if writers.rank == 1:
            run_state.write_groups = write_and_lose
        save(tmp_path, 3)(writers)

    outcomes = run_ranks(3, lose_a_bit)
    assert len(set(outcomes)) == 1
    assert re.search(r"rank 1 on host .*damaged: trainable-00002-of-00003\.safetensors has SHA-256", outcomes[0])
    assert assert_loads(tmp_path).state.step == 2


def test_a_part_that_rank_0_does_not_see_is_no_part_of_a_checkpoint(tmp_path, run_ranks):
    prepared(tmp_path)

    def lose(writers: Rank) -> None:
        verify = run_state.verify_file
        run_state.verify_file = lambda folder, file, entry: (verify(folder, file, entry), (folder / file).unlink())
        save(tmp_path, 3)(writers)

    outcomes = run_ranks(2, lose)
    assert len(set(outcomes)) == 1
    assert re.search(r"rank 0 on host .*optimizer-00002-of-00002\.safetensors is missing", outcomes[0])
    assert names_in(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_folders_that_are_not_shared(tmp_path, run_ranks):
    host = socket.gethostname()

    def elsewhere(writers: Rank) -> None:
        run_state._WAIT_FOR_FOLDER_SECONDS = 0.1
        save(tmp_path / ("other" if writers.rank == 2 else "run"), 1)(writers)

    outcomes = run_ranks(3, elsewhere)
    assert len(set(outcomes)) == 1
    assert re.fullmatch(
        rf"CheckpointError: run\.folder: rank 2 on host {host} does not see {tmp_path}/other/checkpoints/\S+, "
        rf"which rank 0 on host {host} made\. Put run\.folder on a file system that all machines share\.",
        outcomes[0],
    )
    assert load_run_state(tmp_path / "run") is None
    assert not (tmp_path / "other").exists()
    prepared(tmp_path / "run")
    outcomes = run_ranks(2, lambda w: load_run_state(tmp_path / ("other" if w.rank else "run"), writers=w))
    assert len(set(outcomes)) == 1
    assert f"rank 1 on host {host} does not see" in outcomes[0]


def test_a_folder_that_shows_late_is_waited_for(tmp_path, run_ranks):
    """The machine of rank 1 sees what rank 0 makes half a second later."""

    def late(writers: Rank) -> None:
        if writers.rank == 1:
            seen_at = time.monotonic() + 0.5
            is_dir = Path.is_dir
            Path.is_dir = lambda path: time.monotonic() > seen_at and is_dir(path)
        save(tmp_path, 1)(writers)

    assert run_ranks(2, late) == ["ok"] * 2


# ---------------------------------------------------------------- parts that are lost or damaged


def rewrite_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()
    write_manifest(path)


@pytest.mark.parametrize("knows", [True, False])
def test_parts_lost_damaged_or_doubled(tmp_path, run_ranks, knows):
    """The part is named, whether the manifest knows of it (knows) or was written after it happened."""
    save_run_state(tmp_path, whole_state(1))
    assert run_ranks(3, save(tmp_path, 2)) == ["ok"] * 3
    path = tmp_path / "checkpoints" / "step-000002"
    kept = tmp_path / "kept"
    shutil.copytree(path, kept)
    first, second, last = (path / f"optimizer-0000{number}-of-00003.safetensors" for number in (1, 2, 3))

    def flip() -> None:
        content = bytearray(second.read_bytes())
        content[8] ^= 64  # In the header: there is a reason to refuse it even where the hash is right.
        second.write_bytes(content)

    cases: list[tuple[Callable[[], object], str]] = [
        (second.unlink, f"{second.name} is missing"),
        (last.unlink, f"{last.name} is missing"),
        (lambda: shutil.copy(first, second), rf"{second.name} has|is in {first.name} and in {second.name}"),
        (lambda: shutil.copy(first, path / "optimizer.safetensors"), r"optimizer\.safetensors is (none|not)"),
        (lambda: shutil.copy(first, path / "optimizer-00001-of-00002.safetensors"), r"00001-of-00002\S* is (none|not)"),
        (lambda: last.rename(path / "optimizer-00003-of-00004.safetensors"), r"is missing|is not in MANIFEST"),
        (lambda: shutil.copy(first, path / "optimizer-2.safetensors"), r"optimizer-2\.safetensors"),
        (flip, second.name),
        (lambda: second.write_bytes(second.read_bytes()[:-3]), second.name),
    ]
    for damage, expected in cases:
        shutil.rmtree(path)
        shutil.copytree(kept, path)
        damage()
        if not knows:
            rewrite_manifest(path)
        loaded = assert_loads(tmp_path)
        assert loaded.state.step == 1
        assert str(path) in loaded.skipped[0]
        assert re.search(expected, loaded.skipped[0]), loaded.skipped


def test_a_rank_that_alone_sees_damage_takes_all_back(tmp_path, run_ranks):
    """Which rank checks which file does not matter, and never do two ranks go on from different checkpoints."""
    save_run_state(tmp_path, whole_state(1))
    run_ranks(3, save(tmp_path, 2))
    files = sorted((tmp_path / "checkpoints" / "step-000002").iterdir())
    for path in files[::3]:
        before = path.read_bytes()
        path.write_bytes(before[:-4] + bytes([before[-4] ^ 1]) + before[-3:])

        def load(writers: Rank, path=path) -> None:
            loaded = assert_loads(tmp_path, writers=writers)
            assert loaded.state.step == 1
            assert len(loaded.skipped) == 1
            assert (path.name if path.name != MANIFEST_NAME else "step-000002") in loaded.skipped[0]
            assert "on host" in loaded.skipped[0]

        assert run_ranks(3, load) == ["ok"] * 3
        path.write_bytes(before)

    def fail_to_read(writers: Rank) -> None:
        read = run_state.read_manifest

        def read_or_fail(folder: Path):
            if writers.rank == 1 and folder.name == "step-000002":
                raise OSError(5, "Input/output error")
            return read(folder)

        run_state.read_manifest = read_or_fail
        loaded = assert_loads(tmp_path, writers=writers)
        assert loaded.state.step == 1
        assert "Input/output error (rank 1 on host" in loaded.skipped[0]

    assert run_ranks(3, fail_to_read) == ["ok"] * 3


# ---------------------------------------------------------------- ownership


def test_owners_are_even_and_the_same_everywhere():
    assert owners([5, 9, 5, 1], 2) == [1, 0, 1, 0]
    assert owners([3, 3, 3, 3], 2) == [0, 1, 0, 1]
    assert owners([7], 4) == [0]
    assert owners([], 4) == []
    source = random.Random(3)
    for ranks in (1, 2, 5, 8):
        sizes = [source.choice([0, 1, 100, 4096, 1 << 20]) * source.randint(1, 9) for _ in range(200)]
        rank_of = owners(sizes, ranks)
        loads = [
            sum(size for size, owner in zip(sizes, rank_of, strict=True) if owner == rank) for rank in range(ranks)
        ]
        assert sum(loads) == sum(sizes)
        # The last thing given to the fullest rank went to the emptiest one of its time.
        assert max(loads) - min(loads) <= max(sizes)
