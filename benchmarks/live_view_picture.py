"""The live view of a run as a picture: the view itself, told made-up numbers, on a terminal of 80 columns."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from infctx.training.step_work import ChunkPlace, SweepTokens

COLUMNS = 80
STEPS, CHUNK_TOKENS, TOKENS, SECONDS = 500, 4_096, 131_072, 47.4
HEADLINE = [
    "model      Finch (RWKV-6), 24 layers × 2048 channels, 1,600,000,000 parameters",
    "data       1,204 documents, 41,300,512 tokens (world)",
    "gradient   exact: crosses the whole document, in chunks of 4,096 tokens",
]


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def draw_live_view() -> str:
    """The headline and the last frame."""
    from infctx.training.pace import RunPlan
    from infctx.training.progress_live import LiveProgress
    from infctx.training.step_work import SweepTokens

    clock = Clock()
    terminal = Console(
        file=io.StringIO(),
        record=True,
        width=COLUMNS,
        height=24,
        force_terminal=True,
        get_time=clock,
        legacy_windows=False,
    )
    view = LiveProgress(terminal, clock=clock)
    of_step = SweepTokens(forward=TOKENS - CHUNK_TOKENS, backward=TOKENS)
    of_run = SweepTokens(forward=STEPS * of_step.forward, backward=STEPS * of_step.backward)
    view.start(STEPS, [], RunPlan(first_step=0, left=of_run, checkpoint_every=50))
    for step in range(1, 143):
        clock.seconds += SECONDS
        view.step(_report(step))
        if step % 50 == 0:
            view.interrupted("checkpoint", 4.0)
    clock.seconds += SECONDS * 0.6
    view.chunk(_place(143, of_step))
    terminal.export_text(clear=True)
    view.finish()
    last_frame = Text.from_ansi(terminal.export_text(styles=True))
    shown = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True, legacy_windows=False)
    shown.print("$ infctx train my.yaml", highlight=False)
    for line in HEADLINE:
        shown.print(line, highlight=False, markup=False)
    shown.print(last_frame)
    return _without_web_fonts(shown.export_svg(title="infctx train", unique_id="live"))


def _place(step: int, total: SweepTokens) -> ChunkPlace:
    """Sweep 2 of a step, half way through the document."""
    from infctx.training.step_work import ChunkPlace, SweepTokens

    chunk, num_chunks = 16, TOKENS // CHUNK_TOKENS
    return ChunkPlace(
        step=step,
        group=0,
        num_groups=1,
        chunk=chunk,
        num_chunks=num_chunks,
        window=0,
        num_windows=1,
        in_sweep_2=True,
        token=chunk * CHUNK_TOKENS,
        chunk_tokens=CHUNK_TOKENS,
        num_tokens=TOKENS,
        step_tokens=TOKENS,
        done=SweepTokens(forward=total.forward, backward=TOKENS - (chunk + 1) * CHUNK_TOKENS),
        total=total,
    )


def _report(step: int) -> dict[str, object]:
    loss = 1.9 + 0.5 * math.exp(-step / 60) + 0.04 * math.sin(step * 1.7)
    report: dict[str, object] = {
        "step": step,
        "tokens": TOKENS * step,
        "loss": loss,
        "lr": 2.0e-5,
        "grad_norm": 0.41 + 0.02 * math.sin(step),
        "tokens_per_second": 2_766.0,
        "peak_device_bytes": 7_900_000_000,
        "peak_host_bytes": 4_100_000_000,
        "seconds": SECONDS,
    }
    if step % 50 == 0:
        report["val_loss"] = loss + 0.06
    return report


def _without_web_fonts(picture: str) -> str:
    """The same without what it would load from elsewhere; any fixed-width font will do."""
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    picture = picture.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono")
    named = picture.replace(
        '<svg class="rich-terminal"', '<svg role="img" aria-label="The live view of a run" class="rich-terminal"', 1
    )
    return named if named.endswith("\n") else named + "\n"
