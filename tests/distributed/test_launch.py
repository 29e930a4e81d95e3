"""The supervisor: what the ranks get, how they end, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from infctx.errors import RecipeError
from infctx.launch import check_nodes, code_of, is_launched
from infctx.rank_place import first_host, place_of

# Python without what a rank of these tests does not need.
RANK = ["-I", "-S", "-c"]
SUPERVISOR = (
    "import json, sys; from infctx.launch import launch; "
    "sys.exit(launch([sys.executable, *json.loads(sys.argv[1])], **json.loads(sys.argv[2])))"
)
PREFIX = "import os, sys, time, signal; from pathlib import Path; rank = int(os.environ['RANK']); "
# Writes a dot for each signal that it gets, and ends at the second one.
COUNTING = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
def note(number, frame):
    with open(folder / f"{rank}.signals", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, note)
(folder / f"{rank}.pid").write_text(str(os.getpid()))
while not (folder / f"{rank}.signals").exists() or len((folder / f"{rank}.signals").read_text().split()) < 2:
    time.sleep(0.02)
sys.exit(3)
"""


@pytest.fixture
def supervise(python: Callable[..., Any]) -> Callable[..., subprocess.Popen[str]]:
    """Start a supervisor of ranks that run a program text."""

    def start(
        program: str, *arguments: object, environ: dict[str, str] | None = None, **settings: object
    ) -> subprocess.Popen[str]:
        command = [*RANK, program, *map(str, arguments)]
        settings = {"processes": 2, "grace_seconds": 1.0, **settings}
        return python("-c", SUPERVISOR, json.dumps(command), json.dumps(settings), **(environ or {}))

    return start


@pytest.fixture
def counting(
    supervise: Callable[..., Any], wait_for: Callable[..., None], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], Callable[[int], list[str]], list[int]]]:
    """Two ranks that count signals: the supervisor, what a rank has got, the ranks' pids."""
    supervisor = supervise(COUNTING, tmp_path, grace_seconds=10.0)
    files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))

    def got(rank: int) -> list[str]:
        path = tmp_path / f"{rank}.signals"
        return path.read_text().split() if path.exists() else []

    pids = [int(file.read_text()) for file in files]
    yield supervisor, got, pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def state_of(pid: int) -> str:
    """As Linux has it: S sleeps, T is stopped, Z has ended; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_ranks_find_what_fabric_looks_for(supervise: Callable[..., Any], tmp_path: Path) -> None:
    program = PREFIX + "import json; Path(sys.argv[1], str(rank)).write_text(json.dumps(dict(os.environ)))"
    done = supervise(program, tmp_path, processes=3, environ={"OMP_NUM_THREADS": "", "MASTER_PORT": "1"})
    assert done.wait(timeout=60) == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [one["LOCAL_RANK"] for one in found] == ["0", "1", "2"]
    assert {(one["WORLD_SIZE"], one["NODE_RANK"], one["MASTER_ADDR"]) for one in found} == {("3", "0", "127.0.0.1")}
    assert len({one["MASTER_PORT"] for one in found}) == 1
    assert 1024 < int(found[0]["MASTER_PORT"]) < 65536
    places = [place_of(one) for one in found]
    assert [place.rank for place in places] == [0, 1, 2]
    assert all(is_launched(one) for one in found)


def test_processors_are_shared_out_where_nothing_else_is_said(supervise: Callable[..., Any]) -> None:
    program = PREFIX + "print(os.environ['OMP_NUM_THREADS'])"
    one = supervise(program, processes=1, environ={"OMP_NUM_THREADS": "5"})
    assert one.communicate(timeout=60)[0] == "5\n"
    unset = supervise(program, processes=2, environ={"OMP_NUM_THREADS": ""})
    assert unset.communicate(timeout=60)[0] == f"{max(1, len(os.sched_getaffinity(0)) // 2)}\n"


def test_ranks_of_the_second_machine(supervise: Callable[..., Any]) -> None:
    program = PREFIX + "print('out', rank); sys.stderr.write(f'{rank} of ' + os.environ['WORLD_SIZE'] + '\\n')"
    environ = {"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    out, err = supervise(program, num_nodes=2, environ=environ).communicate(timeout=60)
    assert sorted(err.split("\n")) == ["", "2 of 4", "3 of 4"]
    # Rank 0 alone speaks, and it is elsewhere.
    assert out == ""


def test_only_rank_0_has_a_stdout(supervise: Callable[..., Any]) -> None:
    program = PREFIX + "print('out', rank); sys.stderr.write(f'err {rank}\\n')"
    out, err = supervise(program, processes=3).communicate(timeout=60)
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["err 0", "err 1", "err 2"]


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_code_on_which_all_agree(supervise: Callable[..., Any], code: int) -> None:
    supervisor = supervise(f"raise SystemExit({code})")
    out, err = supervisor.communicate(timeout=60)
    assert (supervisor.returncode, out, err) == (code, "", "")


@pytest.mark.parametrize(("code", "of_the_whole"), [(1, 1), (4, 4), (2, 2), (3, 3), (97, 1)])
def test_one_rank_ends_and_the_others_do_not(supervise: Callable[..., Any], code: int, of_the_whole: int) -> None:
    began = time.monotonic()
    supervisor = supervise(PREFIX + f"sys.exit({code}) if rank == 1 else time.sleep(600)", grace_seconds=0.5)
    _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == of_the_whole
    assert time.monotonic() - began < 20
    assert err.count("rank 1 (pid ") == 1
    assert f") ended with code {code}" in err
    assert "Killed 0.5 s after that, not having ended: rank 0 (pid " in err


def test_a_killed_rank(supervise: Callable[..., Any]) -> None:
    supervisor = supervise(
        PREFIX + "os.kill(os.getpid(), 9) if rank == 1 else (time.sleep(0.5), sys.exit(4))", processes=3
    )
    _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 4
    assert ") was killed by SIGKILL; the other ranks have 1 s to end by themselves.\n" in err
    assert err.count("rank 1 (pid ") == 1
    assert "infctx: Then rank " in err
    assert err.count("ended with code 4") == 2
    assert "not having ended" not in err


def test_a_signal_to_one_rank_is_that_rank_s_end(counting: Any) -> None:
    supervisor, got, pids = counting
    os.kill(pids[1], signal.SIGUSR1)
    os.kill(supervisor.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(supervisor.pid, signal.SIGTERM)
    _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 4
    assert f"rank 1 (pid {pids[1]}) was killed by SIGUSR1" in err
    assert got(0) == ["SIGTERM", "SIGTERM"]


def test_what_a_killed_rank_has_started_goes_with_it(
    supervise: Callable[..., Any], wait_for: Callable[..., None], tmp_path: Path
) -> None:
    program = PREFIX + (
        "pid = os.fork(); "
        "pid and Path(sys.argv[1], 'pid').write_text(str(pid)) if rank == 0 else None; "
        "time.sleep(0.5) if rank else time.sleep(600); sys.exit(1)"
    )
    supervisor = supervise(program, tmp_path, grace_seconds=0.5)
    assert supervisor.wait(timeout=60) == 1
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: state_of(pid) in ("", "Z"), seconds=10)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_reaches_every_rank_once_and_a_second_one_again(
    counting: Any, wait_for: Callable[..., None], name: str
) -> None:
    supervisor, got, pids = counting
    # In its group, a rank could get the signal twice.
    assert [os.getpgid(pid) for pid in pids] == pids
    # As a terminal does it: to the whole group of the supervisor.
    os.killpg(supervisor.pid, getattr(signal, name))
    wait_for(lambda: got(0) == got(1) == [name])
    time.sleep(0.3)
    assert got(0) == got(1) == [name]
    os.kill(supervisor.pid, signal.SIGTERM)
    out, err = supervisor.communicate(timeout=60)
    assert got(0) == got(1) == [name, "SIGTERM"]
    assert (supervisor.returncode, out, err) == (3, "", "")


def test_a_signal_before_the_ranks_can_take_it(supervise: Callable[..., Any], wait_for: Callable[..., None]) -> None:
    supervisor = supervise(PREFIX + "print('here', flush=True); time.sleep(600)")
    assert supervisor.stdout.readline() == "here\n"
    supervisor.send_signal(signal.SIGTERM)
    _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 130
    assert err == "infctx: Interrupted; nothing since the last checkpoint was saved.\n"


def test_under_nohup_nobody_hears_of_a_hangup(python: Callable[..., Any], tmp_path: Path) -> None:
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " + SUPERVISOR
    ranks = [*RANK, "import time; print('here', flush=True); time.sleep(1.5)"]
    supervisor = python("-c", program, json.dumps(ranks), json.dumps({"processes": 2}))
    assert supervisor.stdout.readline() == "here\n"
    os.kill(supervisor.pid, signal.SIGHUP)
    assert supervisor.wait(timeout=60) == 0


def test_stopped_in_a_terminal_and_continued(counting: Any, wait_for: Callable[..., None]) -> None:
    supervisor, _, pids = counting
    os.kill(supervisor.pid, signal.SIGTSTP)
    wait_for(lambda: [state_of(pid) for pid in (*pids, supervisor.pid)] == ["T"] * 3)
    os.kill(supervisor.pid, signal.SIGCONT)
    wait_for(lambda: "T" not in [state_of(pid) for pid in (*pids, supervisor.pid)])
    for _ in range(2):
        os.kill(supervisor.pid, signal.SIGTERM)
        time.sleep(0.3)
    assert supervisor.wait(timeout=60) == 3


def test_no_rank_outlives_its_supervisor(counting: Any, wait_for: Callable[..., None]) -> None:
    supervisor, _, pids = counting
    supervisor.kill()
    wait_for(lambda: all(state_of(pid) in ("", "Z") for pid in pids), seconds=10)


def test_waiting_uses_no_processor(counting: Any) -> None:
    supervisor, _, _ = counting

    def ticks() -> int:
        return sum(map(int, Path(f"/proc/{supervisor.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))

    before = ticks()
    time.sleep(1.0)
    assert ticks() == before


def test_a_program_that_cannot_be_started_leaves_nobody(python: Callable[..., Any]) -> None:
    program = "from infctx.launch import launch; launch(['/no/such/program'], processes=2)"
    process = python("-c", program)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "FileNotFoundError" in err


@pytest.mark.parametrize(
    ("codes", "forwarded", "expected"),
    [
        ([0, 0], [], 0),
        ([3, 3], [15], 3),
        ([2], [], 2),
        ([2, 4], [], 2),
        ([2, 0], [], 2),
        ([3, 4], [], 4),
        ([3, 0], [], 4),
        ([2, 3], [], 2),
        ([4, 1], [], 1),
        ([1, 4, 4], [], 1),
        ([-9, 1, 4], [], 4),
        ([-11, 0], [], 4),
        ([130, 130], [2], 130),
        ([-15, 130], [15], 130),
        ([3, -15], [15], 130),
        ([-15, -15], [], 4),
        ([130, 0], [], 4),
        ([-9, 3], [15], 4),
        ([-15, 1], [15], 1),
        ([], [15], 0),
    ],
)
def test_code_of_the_whole(codes: list[int], forwarded: list[int], expected: int) -> None:
    assert code_of(codes, forwarded=forwarded) == expected
    assert code_of(codes[::-1], forwarded=forwarded) == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, ["NODE_RANK is not set; MASTER_ADDR is not set; MASTER_PORT is not set"]),
        ({"NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["NODE_RANK is '2', not a number from 0 to 1."]),
        ({"NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, ["MASTER_PORT is 'x'", "MASTER_ADDR=a "]),
    ],
)
def test_several_machines_and_what_to_type(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        check_nodes(["infctx", "train", "my recipe.yaml"], 2, environ)
    text = str(refused.value)
    for word in [*words, "2 machines: "]:
        assert word in text
    commands = [line.strip() for line in text.splitlines() if "MASTER_PORT=29500" in line]
    assert [command.split()[0] for command in commands] == ["NODE_RANK=0", "NODE_RANK=1"]
    assert all(command.endswith("infctx train 'my recipe.yaml'") for command in commands)


def test_several_machines_that_are_told() -> None:
    check_nodes(["infctx"], 2, {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"LOCAL_RANK": "0"}, True),
        ({"TORCHELASTIC_RUN_ID": "none"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}, True),
        ({"SLURM_NTASKS": "2"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive"}, False),
        ({"SLURM_JOB_ID": "7"}, False),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "batch"}, False),
    ],
)
def test_who_has_been_started_as_a_rank(environ: dict[str, str], expected: bool) -> None:
    assert is_launched(environ) is expected


def test_the_place_of_a_slurm_task() -> None:
    environ = {
        "SLURM_PROCID": "9",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "1234567",
    }
    place = place_of(environ)
    assert (place.rank, place.ranks, place.local_rank) == (9, 16, 1)
    assert (place.address, place.port, place.is_store_there) == ("gpu003", 19567, False)
    assert place_of({**environ, "MASTER_ADDR": "other", "MASTER_PORT": "5"}).port == 5


def test_the_place_of_a_torchrun_worker() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29400"}
    assert place_of({**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}).is_store_there
    with pytest.raises(RecipeError, match="rank \\(None\\)"):
        place_of({name: value for name, value in environ.items() if name != "RANK"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("gpu[12]", "gpu12"),
        ("a[1,3]-ib,b", "a1-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
