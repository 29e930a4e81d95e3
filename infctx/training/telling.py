"""What a run tells people beside its numbers: what lies before it, what interrupts it, what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from infctx.data.step_source import StepData
from infctx.model.state import ModelState
from infctx.training.document_losses import PartLoss, document_losses, group_losses, show_command, worst_first
from infctx.training.loss_spikes import UsualLoss, remember, usual_loss
from infctx.training.pace import RunPlan
from infctx.training.run import Done, Run
from infctx.training.step import StepGradient
from infctx.training.step_work import guess_backward_cost, sweep_tokens

# Of the documents of a step, so many are named.
MOST_NAMED = 8
# Spikes in a row that are looked into and told; a loss that stays high is told by its numbers.
MOST_SPIKES_IN_A_ROW = 3
# Another forward pass over a step that took longer is not worth its time.
LONGEST_STEP_SECONDS = 120


def plan_of(run: Run, done: Done) -> RunPlan:
    """What the run has before it, as far as its data and settings tell."""
    settings = run.settings
    lengths = run.source.row_lengths_left()
    again = 1.0 if settings.boundaries.is_thinned else 0.0
    return RunPlan(
        first_step=done.step,
        left=sweep_tokens(lengths, chunk_tokens=settings.chunk_tokens, window=settings.window),
        backward_cost=guess_backward_cost(run.model) + again,
        is_validated=bool(run.validation),
        validate_every=settings.validate_every,
        checkpoint_every=settings.checkpoint_every,
        checkpoint_minutes=settings.checkpoint_minutes,
    )


@contextmanager
def interruption(run: Run, by: str) -> Iterator[None]:
    """While entered, the steps of the run wait for this (see pace.py)."""
    run.progress.interrupted(by)
    began = time.monotonic()
    yield
    # What fails is never told to be done.
    run.progress.interrupted(by, time.monotonic() - began)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """A step that is done, and what it was made of. states: makes those of each group, before its first chunk."""

    gradient: StepGradient
    data: StepData
    states: Callable[[], Sequence[ModelState]]


def look_for_spike(run: Run, done: Done, loss: float | None, step: StepDone) -> dict[str, object] | None:
    """Compare the loss of a step with those before it, and remember it; all ranks decide alike.

    Returns:
        What metrics.jsonl says of a spike; None where there is none.
    """
    if loss is None:
        return None
    usual = usual_loss(done.recent_losses)
    done.recent_losses = remember(done.recent_losses, loss)
    if usual is None or loss < usual.threshold:
        done.spikes_in_a_row = 0
        return None
    done.spikes_in_a_row += 1
    worst = worst_first(run.engine.ranks.gather(_losses_of_parts(run, done, step)))
    documents = [{"origin": origin, "loss": mean} for origin, mean in worst[:MOST_NAMED]]
    if done.spikes_in_a_row <= MOST_SPIKES_IN_A_ROW:
        run.progress.message(_spike_in_words(done, loss, usual, worst))
    return {"loss": loss, "usual": usual.median, "threshold": usual.threshold, "documents": documents}


def named(origins: Sequence[str]) -> str:
    """Documents as the end of a sentence, and how to look at the first; empty where there are none."""
    if not origins:
        return ""
    more = f" and {len(origins) - MOST_NAMED} more" if len(origins) > MOST_NAMED else ""
    return f"; in it: {', '.join(origins[:MOST_NAMED])}{more}{_how_to_look(origins[0])}"


def _losses_of_parts(run: Run, done: Done, step: StepDone) -> list[PartLoss]:
    """By documents where that is cheap or known, else by groups of rows."""
    ranks, gradient, data = run.engine.ranks, step.gradient, step.data
    has_several = any(len(group.origins) > 1 for group in data.groups)
    seconds, is_asked = ranks.most(int(gradient.seconds), int(has_several))
    if not is_asked or seconds > LONGEST_STEP_SECONDS or done.spikes_in_a_row > MOST_SPIKES_IN_A_ROW:
        return group_losses(gradient.loss_sums, data, ranks)
    run.model.eval()
    found = document_losses(run.objective, data, step.states(), ranks)
    run.model.train()
    return found


def _spike_in_words(done: Done, loss: float, usual: UsualLoss, worst: Sequence[tuple[str, float]]) -> str:
    text = f"step {done.step}: the loss leapt to {loss:.4g} (usually {usual.median:.4g})"
    if worst:
        text += "; highest in: " + ", ".join(f"{origin} ({mean:.4g})" for origin, mean in worst[:MOST_NAMED])
        text += _how_to_look(worst[0][0])
    if done.spikes_in_a_row == MOST_SPIKES_IN_A_ROW:
        text += "\n  the third in a row: further ones are in metrics.jsonl only"
    return text


def _how_to_look(origin: str) -> str:
    command = show_command(origin)
    return f"\n  to look at the first: {command}" if command is not None else ""
