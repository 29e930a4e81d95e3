"""What a person sees: which form is chosen, plain lines and when, and a live bar that fits 80 columns."""

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from infctx.training.pace import RunPlan
from infctx.training.progress import LoggedProgress, PlainProgress, Progress, SilentProgress, make_progress
from infctx.training.progress_live import LiveProgress
from infctx.training.progress_numbers import clock_text
from infctx.training.step_work import ChunkPlace, SweepTokens


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(step: int, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "tokens": 4096,
        "loss": 2.345,
        "lr": 2e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 12345.4,
        "peak_device_bytes": 512_000_000,
        "peak_host_bytes": 2_000_000_000,
        "seconds": 1.0,
        **more,
    }


def plain_run(num_steps: int, *, total: int | None, seconds_a_step: float, every: float = 5.0) -> list[str]:
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, every_seconds=every, clock=clock)
    progress.start(total, ["Finch", "4 chunks"])
    for step in range(1, num_steps + 1):
        clock.seconds += seconds_a_step
        progress.step(report(step))
    progress.finish()
    return stream.getvalue().splitlines()


def test_a_plain_line() -> None:
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, every_seconds=0, clock=clock)
    progress.start(400, [])
    for step in (119, 120):
        clock.seconds += 2 / 7
        progress.step(report(step))
    assert stream.getvalue().splitlines()[1] == (
        "step 120/400  loss 2.345  12,345 tokens/s  peak 512 MB  norm 0.50  lr 2.0e-04  eta 1:20"
    )


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (2, "4 chunks of 1,024, gradient across 2, 3 rows carried on"),
        ("document", "gradient across the whole document"),
    ],
)
def test_a_plain_line_says_what_the_step_did(window: int | str, words: str) -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_seconds=0)
    progress.start(4, [])
    progress.step({**report(1), "chunks": 4, "chunk_tokens": 1024, "window": window, "carried_rows": 3})
    assert words in stream.getvalue()


def test_plain_lines_come_every_few_seconds_and_first_and_last_always() -> None:
    lines = plain_run(12, total=12, seconds_a_step=1)
    assert lines[:2] == ["Finch", "4 chunks"]
    assert [line.split("/")[0] for line in lines[2:]] == ["step 1", "step 6", "step 11", "step 12"]


def test_slow_steps_are_all_shown() -> None:
    assert len(plain_run(4, total=4, seconds_a_step=9)) == 2 + 4


def test_a_run_that_ends_early_or_has_no_known_end_shows_its_last_step() -> None:
    assert plain_run(3, total=12, seconds_a_step=1)[-1].startswith("step 3/12 ")
    lines = plain_run(3, total=None, seconds_a_step=1)
    assert lines[-1].startswith("step 3  loss")
    assert "eta" not in lines[-1]


def test_finishing_twice_or_without_a_step_prints_nothing_more() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.finish()
    progress.start(3, [])
    progress.finish()
    progress.step(report(1))
    progress.finish()
    progress.finish()
    assert len(stream.getvalue().splitlines()) == 1


def test_a_validated_step_is_always_shown_with_its_loss() -> None:
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, every_seconds=60, clock=clock)
    progress.start(9, [])
    progress.step(report(1))
    progress.step(report(2))
    progress.step(report(3, val_loss=1.25))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "val 1.250" in lines[1]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_numbers_that_are_missing_are_a_dash(value: object) -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.start(2, [])
    progress.step(report(1, loss=value, lr=value, grad_norm=value, tokens_per_second=value, peak_device_bytes=value))
    progress.step({"step": 2})
    assert [line.removesuffix("  eta 0:00") for line in stream.getvalue().splitlines()] == [
        "step 1/2  loss –  – tokens/s  peak 2,000 MB  norm –  lr –",
        "step 2/2  loss –  – tokens/s  peak –  norm –  lr –",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (80, "1:20"), (7280, "2:01:20"), (200_000, "2d 8h")]
)
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.fixture
def live() -> Iterator[tuple[LiveProgress, io.StringIO, FakeClock]]:
    stream, clock = io.StringIO(), FakeClock()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    progress = LiveProgress(console, clock=clock)
    yield progress, stream, clock
    progress.finish()


def last_frame(stream: io.StringIO) -> list[str]:
    """The lines that stay on the screen: what was printed after the cursor last moved up."""
    text = re.split(r"\x1b\[[0-9]*A", stream.getvalue())[-1]
    return [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "").split("\n") if line.strip()]


def test_live_shows_the_numbers_within_80_columns(live: tuple[LiveProgress, io.StringIO, FakeClock]) -> None:
    progress, stream, clock = live
    progress.start(400, ["Finch 1.6B [bf16] :smile:"])
    progress.step(report(119, loss=3.0))
    clock.seconds += 2
    progress.step(report(120, loss=2.0))
    progress.message("checkpoint runs/[x]/step-000120")
    progress.finish()
    bar, losses, speed = last_frame(stream)[-3:]
    assert "step 120/400" in bar
    assert "30%" in bar
    assert "eta 9:20" in bar
    assert "━" in bar
    assert losses.rstrip() == "loss 2.000  smooth 2.474  norm 0.50  lr 2.0e-04"
    assert speed.rstrip() == "12,345 tokens/s  512 MB"
    assert "Finch 1.6B [bf16] :smile:" in stream.getvalue()
    assert "checkpoint runs/[x]/step-000120" in stream.getvalue()


def test_live_with_the_longest_numbers_still_fits(live: tuple[LiveProgress, io.StringIO, FakeClock]) -> None:
    progress, stream, clock = live
    progress.start(400_000, [])
    progress.step(report(100_000))
    clock.seconds += 3
    progress.step(
        report(
            100_001, loss=123.456, val_loss=123.456, tokens_per_second=1_234_567.0, peak_device_bytes=1_239_000_000_000
        )
    )
    progress.finish()
    bar, numbers, speed = last_frame(stream)[-3:]
    assert max(len(bar), len(numbers), len(speed)) <= 80
    assert "100001/400000" in bar
    assert re.search(r"[━╸ ]{30}", bar), "the bar itself must keep a readable length"
    assert "val 123.456" in numbers
    assert "1,239.0 GB" in speed


def test_live_gives_the_terminal_back(live: tuple[LiveProgress, io.StringIO, FakeClock]) -> None:
    progress, stream, _ = live
    progress.start(None, [])
    progress.step(report(1))
    assert "\x1b[?25l" in stream.getvalue()
    progress.finish()
    progress.finish()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1


def test_live_may_be_started_again(live: tuple[LiveProgress, io.StringIO, FakeClock]) -> None:
    progress, stream, _ = live
    for total in (5, 7):
        progress.start(total, [])
        progress.step(report(1))
    progress.finish()
    assert [line for line in last_frame(stream) if "step 1/" in line][-1].startswith("step 1/7")


def test_a_terminal_gets_the_live_form_and_a_file_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_progress(Terminal()), LiveProgress)
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_progress(io.StringIO()), PlainProgress), "colour in a log is no wish for a moving bar"
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(Terminal()), PlainProgress)


def test_the_default_stream_is_standard_error_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress()
    progress.message("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_silent_is_a_progress_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = SilentProgress()
    progress.start(3, ["x"])
    progress.step(report(1))
    progress.message("y")
    progress.finish()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_log_gets_plain_lines_beside_what_is_shown(tmp_path) -> None:
    shown = io.StringIO()
    for _ in range(2):
        logged = LoggedProgress(PlainProgress(shown), tmp_path / "run.log")
        logged.start(2, ["headline"])
        logged.step({"step": 1, "loss": 2.5})
        logged.message("a message")
        logged.finish()
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines[1:4] == shown.getvalue().splitlines()[:3]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", lines[0])
    assert len(lines) == 8


def test_a_log_that_cannot_be_written_is_told_of_once(tmp_path) -> None:
    shown = io.StringIO()
    logged = LoggedProgress(PlainProgress(shown), tmp_path / "missing" / "run.log")
    logged.start(2, ["headline"])
    logged.message("a message")
    logged.finish()
    assert shown.getvalue().count("cannot write") == 1
    assert "a message" in shown.getvalue()


MIXTURE = {
    "sets": {"code": {"tokens": 90, "loss": 2.1}, "chat": {"tokens": 10, "loss": None}},
    "val_loss": 1.25,
    "val_loss_by_set": {"chat": 1.5, "code": None},
}


def test_a_plain_line_shows_the_sets_of_a_mixture() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_seconds=0)
    progress.start(9, [])
    progress.step(report(1, **MIXTURE))
    assert stream.getvalue().startswith(
        "step 1/9  loss 2.345 (code 2.100, chat –)  val 1.250 (chat 1.500, code –)  12,345 tokens/s"
    )


def test_of_many_sets_some_are_shown() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_seconds=0)
    progress.start(9, [])
    progress.step(report(1, sets={f"s{n}": {"tokens": 1, "loss": n / 2} for n in range(10)}))
    assert "loss 2.345 (s0 0.000, s1 0.500, s2 1.000," in stream.getvalue()
    assert "s7 3.500, 2 more)" in stream.getvalue()


def test_live_keeps_the_latest_of_every_set_on_lines_of_their_own(
    live: tuple[LiveProgress, io.StringIO, FakeClock],
) -> None:
    progress, stream, _ = live
    progress.start(400, [])
    progress.step(report(119, **MIXTURE))
    progress.step(report(120, sets={"chat": {"tokens": 10, "loss": 3.0}, "long " * 20: {"tokens": 1, "loss": 1.0}}))
    progress.finish()
    numbers, _, losses, validation = (line.rstrip() for line in last_frame(stream)[-4:])
    assert numbers.startswith("loss 2.345  smooth 2.345  val 1.250")
    assert losses.startswith("loss code 2.100, chat 3.000, long long")
    assert len(losses) <= 80
    assert validation == "val chat 1.500, code –"


def place(chunk: int, *, in_sweep_2: bool = False) -> ChunkPlace:
    """A place in a step over a document of ten million tokens."""
    return ChunkPlace(
        step=2,
        group=0,
        num_groups=2,
        chunk=chunk,
        num_chunks=2442,
        window=3,
        num_windows=10,
        in_sweep_2=in_sweep_2,
        token=4096 * chunk,
        chunk_tokens=4096,
        num_tokens=10_000_000,
        step_tokens=20_000_000,
        done=SweepTokens(forward=4096.0 * chunk, backward=1e6 if in_sweep_2 else 0.0),
        total=SweepTokens(forward=2e7, backward=2e7),
    )


IN_A_LONG_STEP = {
    80: [
        "step 1/400 eta 27:46:39",
        "in step 2: chunk 812/2,442 forward  token 3.3M of 10.0M  window 4/10  group 1/2",
        "loss 2.345  smooth 2.345  val 1.250  norm 0.50  lr 2.0e-04",
        "1,024 tokens/s  512 MB  saved step 1, 13:32 ago",
    ],
    40: [
        "step 1/400 eta 27:46:39",
        "in step 2: chunk 812/2,442 forward",
        "loss 2.345  smooth 2.345  val 1.250",
        "1,024 tokens/s  512 MB",
    ],
    20: ["step 1/400", "in step 2: chunk 8…", "loss 2.345", "1,024 tokens/s"],
}


@pytest.mark.parametrize("width", list(IN_A_LONG_STEP))
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_inside_a_long_step_at_any_width(width: int, encoding: str) -> None:
    clock = FakeClock()
    progress = LiveProgress(Console(file=io.StringIO()), clock=clock)
    plan = RunPlan(first_step=0, left=SweepTokens(forward=4e7, backward=4e7), backward_cost=3.0)
    progress.start(400, [], plan)
    progress.finish()
    progress.step(report(1, val_loss=1.25, seconds=0.5))
    progress.interrupted("checkpoint")
    clock.seconds += 2
    progress.interrupted("checkpoint", 2.0)
    for chunk in range(812):
        progress.chunk(place(chunk))
        clock.seconds += 1
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width, color_system=None).print(progress)
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).splitlines()
    assert all(len(line) < width for line in lines)
    shown = [re.sub(r"[━╸=>]|\d+%|\d+:\d\d(?=  eta)", "", line) for line in lines]
    found = [re.sub(r" {2,}eta .*", " eta ...", line) if number == 0 else line for number, line in enumerate(shown)]
    expected = [re.sub(r"eta .*", "eta ...", line) for line in IN_A_LONG_STEP[width]]
    if encoding == "ascii":
        expected = [line.replace("…", ".") for line in expected]
    assert [line.strip() for line in found] == expected


def test_plain_lines_move_inside_a_long_step() -> None:
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, clock=clock)
    progress.start(400, [], RunPlan(first_step=1, left=SweepTokens(forward=4e7, backward=4e7), backward_cost=3.0))
    for chunk in range(100):
        progress.chunk(place(chunk))
        clock.seconds += 3
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("in step 2  chunk 21/2,442 forward  token 81.9k of 10.0M  window 4/10  group 1/2  ")
    assert " tokens/s  eta " in lines[0]
    progress.chunk(place(700, in_sweep_2=True))
    assert "chunk 701/2,442 backward" in stream.getvalue()


def test_a_checkpoint_is_told_behind_its_step() -> None:
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, clock=clock, every_seconds=60)
    progress.start(400, [])
    for step in (1, 2):
        progress.step(report(step))
    progress.interrupted("checkpoint")
    clock.seconds += 75
    progress.interrupted("checkpoint", 75.0)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "step 1/400",
        "step 2/400",
        "checkpoint after step 2, 1:15 to write",
    ]
