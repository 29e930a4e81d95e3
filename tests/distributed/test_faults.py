"""A rank that dies, hangs or is told to stop: the run ends in bounded time, by name, and loses nothing saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infctx.checkpoint.run_state import load_run_state
from infctx.exit_codes import EXIT_MACHINE
from tests.distributed.processes import Ended, end_ranks
from tests.distributed.run_worker import run_one
from tests.distributed.test_elastic import SPREAD, WORKER, lines, recipe, spread, weights

__all__ = ["recipe"]
DEAD_SECONDS, STARTING_SECONDS = 20.0, 120.0
SEVERAL_WINDOWS = ["bptt.window=2", "data.mode=document"]
CHUNK_OF_A_SECOND_WINDOW = 11


def end_run(recipe: Path, folder: Path, *overrides: str, at: dict[str, object]) -> list[Ended]:
    """Two ranks of which one does something to itself."""
    run = {"recipe": str(recipe), "overrides": [*SPREAD[2], *overrides, f"run.folder={folder}"], "at": at}
    arguments = [WORKER, json.dumps([run]), str(folder.parent / "report")]
    return end_ranks(arguments, ranks=2, seconds=STARTING_SECONDS + 90)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run_by_its_name(recipe: Path, tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "run"
    settings = ["run.checkpoint_every=2", "run.strategy=ddp"]
    ended = end_run(recipe, folder, *settings, at={"rank": rank, "chunk": 40, "do": "SIGKILL"})
    dead, other = ended[rank], ended[1 - rank]
    assert dead.code == -9
    assert other.code == EXIT_MACHINE, other.output
    assert f"ank {rank}" in other.output
    if rank == 1:
        assert "step-00000" in other.output, "the checkpoint that is good"
    assert other.seconds - dead.seconds < DEAD_SECONDS
    # And the run goes on, on one rank.
    run_one(str(recipe), [*SPREAD[1], *settings[:1], f"run.folder={folder}"])
    assert [line["step"] for line in lines(folder)] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.timeout(400)
def test_a_rank_that_hangs_ends_the_run_by_its_name(recipe: Path, tmp_path: Path) -> None:
    ended = end_run(recipe, tmp_path / "run", "run.hang_seconds=10", at={"rank": 1, "step": 2, "do": "sleep"})
    assert [end.code for end in ended] == [EXIT_MACHINE] * 2, ended
    for end in ended:
        assert "ank 1 on" in end.output
        assert "has not moved for" in end.output, end.output


@pytest.mark.timeout(400)
def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before_it(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = end_run(recipe, folder, "run.checkpoint_every=2", at={"rank": 1, "step": 3, "do": "die_in_save"})
    assert ended[1].code == -9
    assert ended[0].code == EXIT_MACHINE
    loaded = load_run_state(folder)
    assert loaded is not None
    assert loaded.state.step == 2
    assert not loaded.skipped


@pytest.mark.timeout(600)
def test_what_one_rank_finds_all_ranks_do(recipe: Path, tmp_path: Path) -> None:
    """A gradient that is not finite on one rank, a signal to one inside a step, a recipe that differs on one."""
    for strategy in ("ddp", "fsdp", "deepspeed_2"):
        folder = tmp_path / f"poisoned-{strategy}"
        settings = [*SEVERAL_WINDOWS, *SPREAD[2], f"run.strategy={strategy}", f"run.folder={folder}", "run.steps=4"]
        poison = {"rank": 1, "step": 2, "do": "poison"}
        stop = {"rank": 1, "chunk": CHUNK_OF_A_SECOND_WINDOW, "do": "SIGTERM"}
        inside = [*settings[:-2], f"run.folder={tmp_path}/inside-{strategy}"]
        runs = [
            {"recipe": str(recipe), "overrides": settings, "at": poison},
            {"recipe": str(recipe), "overrides": inside, "at": stop},
            {"recipe": str(recipe), "overrides": inside},
        ]
        poisoned, stopped, continued = spread(recipe, runs, ranks=2)
        assert [told.get("steps") for told in poisoned] == [4, 4], poisoned
        skipped = [line for line in lines(folder) if "not_updated" in line]
        assert [line["step"] for line in skipped] == [3]
        assert "not finite" in skipped[0]["not_updated"]
        assert skipped[0]["documents"]
        assert [told.get("stopped") for told in stopped] == ["SIGTERM"] * 2, stopped
        assert [told.get("steps") for told in continued] == [6, 6], continued
    straight = tmp_path / "straight"
    run_one(str(recipe), [*SEVERAL_WINDOWS, *SPREAD[1], f"run.folder={straight}"])
    for strategy in ("ddp", "fsdp", "deepspeed_2"):
        folder = tmp_path / f"inside-{strategy}"
        for line, other in zip(lines(folder)[1:], lines(straight)[1:], strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        for name, tensor in weights(folder).items():
            difference = float((tensor - weights(straight)[name]).norm() / weights(straight)[name].norm())
            assert difference < 1e-6, (folder.name, name, difference)
