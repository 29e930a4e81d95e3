"""`infctx train` over several processes: started by itself, on two machines, by torchrun and by Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, free_port
from tests.distributed.run_worker import run_one
from tests.distributed.test_elastic import SPREAD, lines, recipe

__all__ = ["recipe"]
TRAIN = ["-m", "infctx.cli", "train"]
SHORT = ["bptt.window=2", "run.steps=2", "run.validate_every=null"]


def start(arguments: Sequence[str], **environ: str) -> subprocess.Popen[str]:
    """Python on these arguments, in an environment that knows nothing of other ranks."""
    ours = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, **ours, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(processes: Sequence[subprocess.Popen[str]], *, code: int = 0) -> list[tuple[str, str]]:
    """What each printed, when all have ended with this code."""
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


@pytest.fixture
def expected(recipe: Path, tmp_path: Path) -> Mapping[str, float]:
    """The last step of the same run in one process."""
    run_one(str(recipe), [*SHORT, *SPREAD[1], f"run.folder={tmp_path}/alone"])
    return lines(tmp_path / "alone")[-1]


@pytest.mark.timeout(600)
def test_every_way_to_start_ranks(recipe: Path, tmp_path: Path, expected: Mapping[str, float]) -> None:
    two = [*SHORT, "run.rows=2", "run.strategy=ddp"]
    port = str(free_port())

    def folder(name: str) -> str:
        return f"run.folder={tmp_path}/{name}"

    # One machine, started by the command itself; all of its JSON is the first rank's.
    [(out, err)] = finish([start([*TRAIN, recipe, *two, "run.devices=2", folder("itself"), "--json"])])
    assert json.loads(out)["steps"] == 2
    assert err.count("ranks      2, ddp; 4 rows a step") == 1
    assert err.count("Run folder:") == 1
    # Two machines, each with the documented command.
    nodes = [
        start(
            [*TRAIN, recipe, *two, "run.devices=1", "run.num_nodes=2", folder("machines")],
            NODE_RANK=str(node),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for node in range(2)
    ]
    (_, first), (_, second) = finish(nodes)
    assert "ranks      2 on 2 machines, ddp" in first
    assert "Run folder" not in second
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish([start([*torchrun, *TRAIN, recipe, *two, "run.devices=2", folder("torchrun")])])
    tasks = [
        start(
            [*TRAIN, recipe, *two, "run.devices=2", folder("slurm")],
            SLURM_NTASKS="2",
            SLURM_NTASKS_PER_NODE="2",
            SLURM_PROCID=str(task),
            SLURM_LOCALID=str(task),
            SLURM_NODEID="0",
            SLURM_JOB_ID="4711",
            SLURM_JOB_NAME="infctx",
            SLURM_NODELIST="127.0.0.1",
            MASTER_PORT=str(free_port()) if task < 0 else port,
        )
        for task in range(2)
    ]
    finish(tasks)
    for name in ("itself", "machines", "torchrun", "slurm"):
        assert lines(tmp_path / name)[-1]["loss"] == pytest.approx(expected["loss"], rel=1e-6), name


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.devices=4", "run.time_parallel=3"], "run.time_parallel: expected a divisor"),
        (["run.devices=2", "run.strategy=single"], "single is for one device"),
        (["run.devices=4", "run.time_parallel=4", "bptt.chunk_tokens=3"], "bptt.chunk_tokens: expected at least one"),
        (["run.num_nodes=2"], "NODE_RANK=0 MASTER_ADDR="),
    ],
)
def test_what_cannot_be_spread_is_refused_before_anything_starts(
    recipe: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    (tmp_path / "model.safetensors").unlink()
    [(_, err)] = finish([start([*TRAIN, recipe, *overrides, f"run.folder={tmp_path}/run"])], code=2)
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(300)
def test_ranks_with_different_recipes_are_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    port = str(free_port())
    nodes = [
        start(
            [*TRAIN, recipe, f"optimizer.lr={rate}", "run.devices=1", "run.num_nodes=2", f"run.folder={tmp_path}/run"],
            NODE_RANK=str(node),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for node, rate in enumerate(("0.1", "0.2"))
    ]
    (_, first), (_, second) = finish(nodes, code=2)
    assert "The recipe of rank 1 differs from that of rank 0: optimizer.lr: 0.1 on rank 0, 0.2 on rank 1." in first
    assert "Error" not in second
    assert not (tmp_path / "run").exists()
