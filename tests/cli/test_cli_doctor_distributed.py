"""infctx doctor --distributed: right values are said to be right, wrong ones wrong, and missing ranks are named."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

from infctx import doctor_ranks
from infctx.errors import MachineError

OPERATIONS = ["all-reduce", "all-gather", "reduce-scatter", "broadcast", "barrier"]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def rank_environ(rank: int, ranks: int, port: str) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def check_findings(found: dict[str, Any], *, ranks: int) -> None:
    assert found["is_right"] is True
    assert found["wrong"] == {}
    assert found["ranks"] == [socket.gethostname()] * ranks
    assert list(found["operations"]) == OPERATIONS
    for name, one in found["operations"].items():
        assert one["latency_seconds"] > 0
        if name != "barrier":
            assert one["bytes_per_second"] == pytest.approx(
                {"all-reduce": 2 * (ranks - 1) / ranks, "broadcast": 1}.get(name, (ranks - 1) / ranks)
                * one["bytes"]
                / one["seconds"]
            )


def test_it_starts_two_processes_by_itself(fresh_process: Any) -> None:
    ended = fresh_process("-m", "infctx", "doctor", "--distributed", "--processes", "2", "--json").ok()
    check_findings(ended.json, ranks=2)
    assert ended.err == ""


def test_it_uses_the_processes_that_are_there(forks: Any) -> None:
    port = free_port()
    # Not on GPUs, of which there may be fewer than ranks.
    started = [
        forks.start("doctor", "--distributed", env={**rank_environ(rank, 2, port), "CUDA_VISIBLE_DEVICES": ""})
        for rank in range(2)
    ]
    first, second = [process.wait().ok() for process in started]
    assert second.out == ""
    assert first.out.startswith(f"2 ranks, gloo, on {socket.gethostname()}\n")
    assert first.out.count(" right ") == len(OPERATIONS)
    assert "WRONG" not in first.out


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only rank of its run."""
    for name, value in rank_environ(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("wrong", OPERATIONS[:4])
def test_wrong_values_are_named(cli: Any, alone: None, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    run = doctor_ranks._collective

    def spoilt(name: str, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        result = run(name, whole, part)
        if name == wrong:
            result.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(doctor_ranks, "_collective", spoilt)
    ended = cli("doctor", "--distributed")
    assert ended.code == 4
    assert f"Wrong values, by rank: {{0: '{wrong}'}}" in ended.err
    assert [line.split()[0] for line in ended.out.splitlines() if "WRONG" in line] == [wrong]
    assert ended.out.count(" right ") == len(OPERATIONS) - 1


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    port = free_port()
    with pytest.raises(MachineError, match=rf"Of 3 ranks, 1, 2 did not come to 127.0.0.1, port {port} within 0.3 s"):
        doctor_ranks.check_ranks(rank_environ(0, 3, port), seconds=0.3)


def test_rank_0_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"Rank 1 on .* cannot reach rank 0 at 127.0.0.1, port"):
        doctor_ranks.check_ranks(rank_environ(1, 2, free_port()), seconds=0.3)


def test_options_that_mean_nothing(cli: Any, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("doctor", "--processes", "2").refused("--distributed")
    cli("doctor", "--distributed", "--processes", "2").refused("already")
    monkeypatch.delenv("RANK")
    cli("doctor", "--distributed").refused("rank (None)", "torchrun")


def test_fewer_gpus_than_processes(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cli("doctor", "--distributed", "--processes", "3").refused("--processes 3", "1 GPUs")
