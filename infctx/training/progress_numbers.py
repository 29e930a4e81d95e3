"""The numbers of a run as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from infctx.training.step_work import ChunkPlace

MOST_SETS = 8
"""Of a mixture, so many sets are shown."""


def number(report: Mapping[str, object], key: str) -> float | None:
    """A finite number of a report; None where there is none."""
    value = report.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def loss_text(loss: float | None) -> str:
    """A loss in nats per token."""
    return "–" if loss is None else f"{loss:.3f}" if loss < 1000 else f"{loss:.1e}"


def set_losses(report: Mapping[str, object], key: str) -> dict[str, float | None]:
    """The losses of the sets of a mixture: of the step ("sets") or of the validation ("val_loss_by_set")."""
    found = report.get(key)
    if not isinstance(found, Mapping):
        return {}
    return {
        str(name): number(value if isinstance(value, Mapping) else {"loss": value}, "loss")
        for name, value in found.items()
    }


def by_set_text(losses: Mapping[str, float | None]) -> str:
    """The losses by the names of the sets; empty without sets."""
    shown = [f"{name} {loss_text(loss)}" for name, loss in list(losses.items())[:MOST_SETS]]
    if len(losses) > MOST_SETS:
        shown.append(f"{len(losses) - MOST_SETS} more")
    return ", ".join(shown)


def work_text(report: Mapping[str, object]) -> str:
    """What the step computed: its chunks, how many the gradient crossed, and rows that went on from the step before."""
    chunks, chunk_tokens = number(report, "chunks"), number(report, "chunk_tokens")
    if chunks is None or chunk_tokens is None:
        return ""
    window = number(report, "window")
    reach = "the whole document" if window is None else f"{window:,.0f}"
    carried = number(report, "carried_rows") or 0
    return f"{chunks:,.0f} chunks of {chunk_tokens:,.0f}, gradient across {reach}, {carried:,.0f} rows carried on"


def speed_text(speed: float | None) -> str:
    """Tokens per second."""
    return "–" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"


def rate_text(report: Mapping[str, object]) -> str:
    """The learning rate."""
    rate = number(report, "lr")
    return "–" if rate is None else f"{rate:.1e}"


def norm_text(report: Mapping[str, object]) -> str:
    """The norm of the gradient, before clipping."""
    norm = number(report, "grad_norm")
    return "–" if norm is None else f"{norm:.2f}" if 0.01 <= norm < 1000 else f"{norm:.1e}"


def memory_text(report: Mapping[str, object]) -> str:
    """Peak memory of the device, or of the host where the device has none of its own."""
    num_bytes = number(report, "peak_device_bytes") or number(report, "peak_host_bytes")
    if num_bytes is None:
        return "–"
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes < 9.95e9 else f"{num_bytes / 1e9:,.1f} GB"


def clock_text(seconds: float) -> str:
    """A duration as 1:20, 2:01:20 or 5d 4h."""
    if seconds >= 48 * 3600:
        days, hour = divmod(round(seconds / 3600), 24)
        return f"{days}d {hour}h"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count_text(count: float) -> str:
    """A count of tokens in short: 950, 16.4k, 3.3M."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if count >= least:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


def place_parts(place: ChunkPlace) -> list[str]:
    """Where inside a step a run is, the most important first."""
    sweep = "backward" if place.in_sweep_2 else "forward"
    parts = [
        f"chunk {place.chunk + 1:,}/{place.num_chunks:,} {sweep}",
        f"token {count_text(place.token)} of {count_text(place.num_tokens)}",
    ]
    if place.num_windows > 1:
        parts.append(f"window {place.window + 1:,}/{place.num_windows:,}")
    if place.num_groups > 1:
        parts.append(f"group {place.group + 1:,}/{place.num_groups:,}")
    return parts
