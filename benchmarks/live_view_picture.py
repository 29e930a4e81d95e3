"""The live view of a run as a picture: the view itself, told made-up numbers, on a terminal of 80 columns."""

from __future__ import annotations

import io
import math
import re

from rich.console import Console
from rich.text import Text

COLUMNS = 80
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
    from infctx.training.progress import LiveProgress

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
    view.start(500, [])
    for step in range(1, 143):
        clock.seconds += 12.4
        view.step(_report(step))
    terminal.export_text(clear=True)
    view.finish()
    last_frame = Text.from_ansi(terminal.export_text(styles=True))
    shown = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True, legacy_windows=False)
    shown.print("$ infctx train my.yaml", highlight=False)
    for line in HEADLINE:
        shown.print(line, highlight=False, markup=False)
    shown.print(last_frame)
    return _without_web_fonts(shown.export_svg(title="infctx train", unique_id="live"))


def _report(step: int) -> dict[str, object]:
    loss = 1.9 + 0.5 * math.exp(-step / 60) + 0.04 * math.sin(step * 1.7)
    report: dict[str, object] = {
        "step": step,
        "tokens": 34_300 * step,
        "loss": loss,
        "lr": 2.0e-5,
        "grad_norm": 0.41 + 0.02 * math.sin(step),
        "tokens_per_second": 2_766.0,
        "peak_device_bytes": 7_900_000_000,
        "peak_host_bytes": 4_100_000_000,
        "seconds": 12.4,
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
