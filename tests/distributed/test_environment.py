"""Who has started the processes of a run, as Fabric is told."""

from __future__ import annotations

import os

import pytest

from infctx.errors import RecipeError
from infctx.training.fabric_run import _environment

SLURM = {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "7",
    "RANK": "11",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "16",
    "GROUP_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
LAUNCHED = {"LOCAL_RANK": "3", "NODE_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    def start(**environ: str) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM", "TORCHELASTIC", "RANK", "LOCAL_", "NODE_RANK", "WORLD", "GROUP_", "MASTER_")):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

    return start


def test_torchrun_that_srun_has_started(started) -> None:
    started(**SLURM, SLURM_NTASKS="2", **TORCHRUN)
    environment = _environment(8, 2)
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (11, 3, 1)


def test_our_launcher_inside_a_batch_job(started) -> None:
    started(**{**SLURM, "SLURM_PROCID": "0"}, SLURM_NTASKS="1", **LAUNCHED)
    environment = _environment(8, 2)
    assert (environment.node_rank() * 8 + environment.local_rank(), environment.main_address) == (11, "a")


def test_tasks_of_srun(started) -> None:
    started(**{**SLURM, "SLURM_PROCID": "9"}, SLURM_NTASKS="16", SLURM_NTASKS_PER_NODE="8", SLURM_NNODES="2")
    assert _environment(8, 2).global_rank() == 9
    with pytest.raises(RecipeError, match="expected 4 × 1 = 4 processes, 16 were started"):
        _environment(4, 1)


def test_srun_that_does_not_say_how_many_are_on_a_machine(started) -> None:
    started(**SLURM, SLURM_NTASKS="16")
    with pytest.raises(RecipeError, match=r"not started as they have to be.*ntasks"):
        _environment(8, 2)


def test_ranks_that_are_counted_otherwise(started) -> None:
    started(**LAUNCHED, RANK="11")
    _environment(8, 2)
    started(**{**LAUNCHED, "NODE_RANK": "0"}, RANK="11")
    with pytest.raises(RecipeError, match=r"RANK is 11, but NODE_RANK 0 and LOCAL_RANK 3 .* make it rank 3"):
        _environment(8, 2)


def test_a_process_that_was_started_alone(started) -> None:
    started()
    with pytest.raises(RecipeError, match="16 processes have to be started, and this one was started alone"):
        _environment(8, 2)
