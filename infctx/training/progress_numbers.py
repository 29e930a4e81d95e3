"""The numbers of a run as people read them, and how fast it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

SMOOTHING = 0.9
"""Share of the past in the smoothed loss: it looks back over about ten steps."""
MOST_SETS = 8
"""Of a mixture, so many sets are shown."""


class Pace:
    """Where a run is, how long it will still take, and its loss without the jitter of single steps.

    Args:
        clock: seconds from any fixed moment.
        total_steps: steps of the whole run, those before a resume included; None: not known.
    """

    def __init__(self, clock: Callable[[], float], total_steps: int | None = None) -> None:
        self._clock = clock
        self._total_steps = total_steps
        self._times: list[tuple[int, float]] = []
        self._loss_sum = 0.0
        self._loss_weight = 0.0
        self.current_step = 0
        self.val_loss: float | None = None
        self.set_losses: dict[str, float | None] = {}
        self.set_val_losses: dict[str, float | None] = {}

    def step(self, report: Mapping[str, object]) -> None:
        """Take note of a finished step."""
        self.current_step = int(number(report, "step") or self.current_step + 1)
        moment = (self.current_step, self._clock())
        # Two moments are enough: after the first step, which has the warm-up of everything in it, and now.
        self._times = [*self._times[:1], moment]
        loss = number(report, "loss")
        if loss is not None:
            self._loss_sum = SMOOTHING * self._loss_sum + (1 - SMOOTHING) * loss
            self._loss_weight = SMOOTHING * self._loss_weight + (1 - SMOOTHING)
        val_loss = number(report, "val_loss")
        self.val_loss = self.val_loss if val_loss is None else val_loss
        # A step need not have read every set.
        self.set_losses |= set_losses(report, "sets")
        self.set_val_losses |= set_losses(report, "val_loss_by_set")

    @property
    def smoothed_loss(self) -> float | None:
        """Moving average of the finite losses; None before the first."""
        return self._loss_sum / self._loss_weight if self._loss_weight else None

    @property
    def is_last(self) -> bool:
        """Whether the run's last step is done."""
        return self._total_steps is not None and self.current_step >= self._total_steps

    def position(self) -> str:
        """The step and how many there will be, where that is known."""
        return f"{self.current_step}" if self._total_steps is None else f"{self.current_step}/{self._total_steps}"

    def remaining_seconds(self) -> float | None:
        """Seconds to the last step at the pace so far, validation and checkpoints included; None: not known yet."""
        if self._total_steps is None:
            return None
        if self.is_last:
            return 0.0
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self._total_steps - last_step)


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


def speed_text(report: Mapping[str, object]) -> str:
    """Tokens per second."""
    speed = number(report, "tokens_per_second")
    return "–" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"


def rate_text(report: Mapping[str, object]) -> str:
    """The learning rate."""
    rate = number(report, "lr")
    return "–" if rate is None else f"{rate:.1e}"


def memory_text(report: Mapping[str, object]) -> str:
    """Peak memory of the device, or of the host where the device has none of its own."""
    num_bytes = number(report, "peak_device_bytes") or number(report, "peak_host_bytes")
    if num_bytes is None:
        return "–"
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes < 9.95e9 else f"{num_bytes / 1e9:,.1f} GB"


def clock_text(seconds: float) -> str:
    """A duration as 1:20 or 2:01:20."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
