"""A rank whose peer is dead, failed or hanging ends in bounded time and says why; nobody else ends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any

import pytest

from infctx.training.rank_verdict import CLOSED, COMING_SECONDS, FAILED, Seen, Status, judge
from infctx.training.rank_watch import RankWatch, may_blame_a_peer

SCRIPT = Path(__file__).with_name("watch_scenarios.py")
# As watch_scenarios.py has them.
DEAD_SECONDS, HANG_SECONDS = 4.0, 6.0
# To tell, to judge, to publish, to read, to wait for the others, each at most one beat of DEAD_SECONDS / 6; and the
# processors of a busy machine.
SLACK_SECONDS = DEAD_SECONDS + 5.0


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All scenarios, run at the same time: most of each is waiting."""
    folder = tmp_path_factory.mktemp("scenarios")
    with (folder / "stderr").open("w") as errors:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(folder)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # As the supervisor has it.
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, (folder / "stderr").read_text()
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("scenario", "culprit", "survivors", "within", "words"),
    [
        ("kill_1", 1, (0, 2), DEAD_SECONDS, ["last at step 3, chunk 2", "no sign of life for 4 s"]),
        ("kill_0", 0, (1, 2), 0, ["is gone, last at step 3, chunk 2"]),
        ("stop_1", 1, (0, 2), DEAD_SECONDS, ["last at step 3, chunk 2", "no sign of life for 4 s"]),
        ("stop_0", 0, (1, 2), DEAD_SECONDS, ["last at step 3, chunk 2", "no sign of life for 4 s"]),
        ("sleep_1", 1, (0, 1, 2), HANG_SECONDS, ["has not moved", "ranks 0, 2 waiting at step 3, chunk 3"]),
        ("sleep_all", None, (0, 1, 2), HANG_SECONDS, ["No rank has moved", "all 3 are at step 3, chunk 2"]),
        ("fail_1", 1, (0, 2), 0, ["failed at step 3, chunk 2: ValueError: no such thing."]),
        ("fail_0", 0, (1, 2), 0, ["failed at step 3, chunk 2: ValueError: no such thing."]),
        ("error_after_kill", 1, (0, 2), DEAD_SECONDS, ["no sign of life"]),
        ("stderr_that_nobody_reads", 1, (0,), DEAD_SECONDS, ["no sign of life"]),
        ("last_words_that_block", 1, (0, 2), DEAD_SECONDS, ["no sign of life"]),
        ("patient_1_dies", 1, (0, 2), DEAD_SECONDS, ["last at loading the model"]),
    ],
)
def test_survivors_end_in_time_and_name_the_rank(
    found: dict[str, Any],
    scenario: str,
    culprit: int | None,
    survivors: tuple[int, ...],
    within: float,
    words: list[str],
) -> None:
    ended = found[scenario]
    for rank in survivors:
        error = ended["errors"][rank]
        assert ended["codes"][rank] == 4, (rank, error)
        assert error.count("\n") == 1
        assert f"infctx: rank {rank} ends. " in error
        if culprit is not None:
            assert f"Rank {culprit} on " in error
            assert not any(f"Rank {other} on" in error for other in range(3) if other != culprit)
        for word in words:
            assert word in error
        # A rank that is silent was heard of up to a beat before its fault.
        assert within - DEAD_SECONDS / 3 <= ended["seconds"][rank] <= within + SLACK_SECONDS
    if culprit != 0 and scenario != "last_words_that_block":
        assert "Checkpoint step-000002 is good." in ended["errors"][0]
        assert not any("Checkpoint" in error for error in ended["errors"][1:])


def test_a_rank_that_nobody_can_hear_ends_all_the_same(found: dict[str, Any]) -> None:
    ended = found["stderr_that_nobody_reads"]
    assert ended["codes"] == [4, -9, 4]
    assert ended["seconds"][2] <= DEAD_SECONDS + SLACK_SECONDS


def test_a_rank_that_failed_keeps_its_own_code(found: dict[str, Any]) -> None:
    assert found["fail_1"]["codes"] == [4, 1, 4]
    assert found["fail_0"]["codes"] == [1, 4, 4]


@pytest.mark.parametrize(
    ("scenario", "codes"),
    [
        ("close_in_any_order", [3, 3, 3]),
        ("rank_0_ends_first", [0, 0, 0]),
        ("rank_1_ends_first", [0, 2, 0]),
        ("moves_slowly", [0, 0, 0]),
        ("patient_1", [0, 0, 0]),
        ("all_stopped", [0, 0, 0]),
    ],
)
def test_no_alarm(found: dict[str, Any], scenario: str, codes: list[int]) -> None:
    assert found[scenario]["codes"] == codes, found[scenario]["errors"]
    assert found[scenario]["errors"] == ["", "", ""]


def seen(rank: int, *, moves: int = 5, heard: float = 100.0, moved: float = 100.0, **status: Any) -> Seen:
    told = Status(rank=rank, host="h", pid=10 + rank, moves=moves, place=f"chunk {moves}", **status)
    return Seen(status=told, heard=heard, moved=moved)


def verdict(*ranks: Seen, now: float = 100.0) -> str | None:
    return judge(ranks, now, dead_seconds=15, hang_seconds=60)


def test_nothing_is_wrong() -> None:
    assert verdict(seen(0), seen(1)) is None
    assert verdict(seen(0, heard=85.0), seen(1)) is None
    # All but the slowest wait, however long.
    assert verdict(seen(0, moved=0.0), seen(1, moves=4, moved=40.0)) is None
    # Of those furthest behind, one has just come there.
    assert verdict(seen(0, moves=4, moved=0.0), seen(1, moves=4), seen(2)) is None


def test_the_dead_are_named_and_the_closed_are_not() -> None:
    text = verdict(seen(0), seen(1, heard=84.9), seen(2, heard=0.0, end=CLOSED), seen(3, heard=0.0))
    assert text == (
        "Rank 1 on h (pid 11), last at chunk 5, and Rank 3 on h (pid 13), last at chunk 5, have given no sign of life "
        "for 15 s: killed, stopped, or their machines cannot be reached."
    )


def test_those_behind_are_named_and_where_the_others_are() -> None:
    ahead = [seen(rank, moved=0.0) for rank in (0, 2, 3, 4, 7)]
    text = verdict(*ahead, seen(5, moves=4, moved=39.0), seen(6, moves=4, moved=0.0, end=CLOSED))
    assert text == (
        "Rank 5 on h (pid 15), at chunk 4, has not moved for 61 s; ranks 0, 2-4, 7 waiting at chunk 5; rank 6 ended at "
        "chunk 4."
    )


def test_a_rank_not_heard_for_a_moment_is_not_called_slow_before_it_is_called_dead() -> None:
    assert verdict(seen(0, moved=0.0), seen(1, moved=0.0, heard=94.0)) is None
    assert "No rank has moved" in (verdict(seen(0, moved=0.0), seen(1, moved=0.0, heard=96.0)) or "")


def test_while_a_rank_is_patient_only_death_counts() -> None:
    assert verdict(seen(0, moved=0.0), seen(1, moved=0.0, is_patient=True)) is None
    assert "no sign" in (verdict(seen(0, moved=0.0, heard=80.0), seen(1, is_patient=True)) or "")


def test_a_failure_is_told_before_anything_else() -> None:
    text = verdict(seen(0, heard=0.0), seen(1, end=f"{FAILED}KeyError: 'x'"))
    assert text == "Rank 1 on h (pid 11) failed at chunk 5: KeyError: 'x'."


def test_a_rank_may_take_longer_to_come_than_to_tell_again() -> None:
    unheard = Seen(status=Status(rank=1), heard=0.0, moved=0.0)
    assert verdict(seen(0, heard=70.0, moved=70.0), unheard, now=15 + COMING_SECONDS - 1) is None
    now = 15 + COMING_SECONDS + 1
    assert (verdict(seen(0, heard=now), unheard, now=now) or "").startswith(
        "Rank 1, last at its start, has given no sign"
    )


def test_an_update_notes_what_has_changed() -> None:
    first = seen(1, beat=3)
    assert first.updated(first.status, 200.0) is first
    beaten = first.updated(Status(**{**status_of(first), "beat": 4}), 200.0)
    assert (beaten.heard, beaten.moved) == (200.0, 100.0)
    moved = first.updated(Status(**{**status_of(first), "beat": 4, "moves": 6}), 200.0)
    assert (moved.heard, moved.moved) == (200.0, 200.0)
    later = moved.counted_from(heard=250.0, moved=150.0)
    assert (later.heard, later.moved) == (250.0, 200.0)


def status_of(one: Seen) -> dict[str, Any]:
    return json.loads(one.status.to_json())


def test_saying_where_one_is_costs_less_than_two_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.Thread.start", lambda self: None)
    watch = RankWatch(None, rank=0, ranks=2, hang_seconds=math.inf)  # type: ignore[arg-type]
    best = min(timeit.repeat(lambda: watch.at("step 12, chunk 3"), number=2000, repeat=20)) / 2000
    assert best < 2e-6


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_that_another_rank_may_have_caused(error: Exception, expected: bool) -> None:
    assert may_blame_a_peer(error) is expected
