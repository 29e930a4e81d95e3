"""What a run comes to, in sentences and in the few numbers that people look for first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from infctx.report.curves import finite, median
from infctx.report.facts import Record, RunFacts

Kind = Literal["good", "bad", ""]
# A held-out loss that ends so far above its lowest is worth a word; nats.
RISEN = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A sentence. kind: whether it is what one hopes for. to_do: what follows from it, "" for nothing."""

    text: str
    kind: Kind = ""
    to_do: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number to look at first: its name, the number, and a few words below it."""

    name: str
    value: str
    told: str = ""


def findings(facts: RunFacts) -> list[Finding]:
    """Sentences, the most important first."""
    return [*_held_out(facts), *_long_context(facts), *_left_out(facts)]


def figures(facts: RunFacts) -> list[Figure]:
    """The numbers at the head of the page."""
    return [*_losses(facts), *_gain_figure(facts), *_work(facts)]


def state_in_words(facts: RunFacts) -> str:
    """How far the run is."""
    total = facts.total_steps
    if facts.state == "finished":
        return f"all {facts.last_step:,} steps done"
    of_all = f" of {total:,}" if total is not None else ""
    if facts.state == "under way":
        return f"step {facts.last_step:,}{of_all} when this page was written"
    goes_on = "the same infctx train command continues it" if facts.checkpoint else "no checkpoint was written"
    return f"at step {facts.last_step:,}{of_all}; {goes_on}"


def nats(loss: float) -> str:
    """A loss to three digits behind the point."""
    return f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.2e}"


def perplexity(loss: float) -> str:
    """exp(loss)."""
    return f"{math.exp(loss):,.2f}" if loss < 20 else "over 400 million"


def interval_text(interval: Any) -> str:
    """A 95 % interval; "" where there is none."""
    return "" if interval is None else f"{nats(interval[0])} to {nats(interval[1])}"


def _held_out(facts: RunFacts) -> Iterator[Finding]:
    losses = facts.val_losses
    if not losses:
        yield Finding(
            text="No documents were held out: nothing here says how good the model is on text it was not trained on.",
            to_do="Set data.validation next time.",
        )
        return
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    if last_step == first_step:
        yield Finding(text=f"The held-out loss at step {first_step:,} is {nats(first)} nats per token.")
        return
    share = f"{abs(last - first) / first:.1%}" if first > 0 else f"{abs(last - first):.3f} nats"
    words = f"from {nats(first)} nats per token at step {first_step:,} to {nats(last)} at step {last_step:,}"
    if last < first:
        yield Finding(
            text=f"The held-out loss fell by {share}, {words}; perplexity from {perplexity(first)} to "
            f"{perplexity(last)}.",
            kind="good",
        )
    else:
        yield Finding(
            text=f"The held-out loss rose by {share}, {words}: the model is worse on held-out text than before.",
            kind="bad",
            to_do="Try a lower optimizer.lr or fewer steps, and look at the data with infctx data.",
        )
    lowest_step, lowest = min(losses, key=lambda place: place[1])
    if lowest < min(first, last) - RISEN and lowest_step not in (first_step, last_step):
        yield Finding(
            text=f"It was lowest at step {lowest_step:,}, with {nats(lowest)}, and has risen since.",
            kind="bad",
            to_do="More steps made it worse: stop there, or train on more data.",
        )


def _long_context(facts: RunFacts) -> Iterator[Finding]:
    gain = (facts.after or {}).get("gain")
    if gain is None:
        return
    beyond, value = gain["beyond"], gain["gain"]
    interval = gain["interval"]
    sure = f" (95 % interval {interval_text(interval)})" if interval else ""
    words = (
        f"{nats(abs(value))} nats per token{sure} beyond position {beyond:,}, compared with a state that is set back "
        f"every {beyond:,} tokens"
    )
    if interval and interval[0] <= 0 <= interval[1]:
        yield Finding(
            text=f"Carrying the state changes the held-out loss by {nats(value)} nats per token{sure} beyond position "
            f"{beyond:,}, which cannot be told from nothing: on these documents the model makes no use of what lies "
            f"more than {beyond:,} tokens back.",
        )
    elif value > 0:
        only = "" if interval else " One document was measured, so nobody knows how sure this is."
        yield Finding(text=f"The model uses the long context: it gains {words}.{only}", kind="good")
    else:
        yield Finding(
            text=f"The model does worse with its state carried: it loses {words}.",
            kind="bad",
            to_do="Train with longer documents or a wider bptt.window.",
        )


def _left_out(facts: RunFacts) -> Iterator[Finding]:
    reasons: dict[str, int] = {}
    for record in facts.steps:
        reason = record.get("not_updated")
        if reason is not None:
            reasons[str(reason)] = reasons.get(str(reason), 0) + 1
    for reason, count in reasons.items():
        steps = "1 step" if count == 1 else f"{count:,} steps"
        yield Finding(text=f"{steps} changed no weight: {reason}.", kind="bad", to_do="metrics.jsonl names the steps.")
    spikes = [record for record in facts.steps if record.get("spike")]
    if spikes:
        named = ", ".join(f"{record['step']:,}" for record in spikes[:8]) + (", …" if len(spikes) > 8 else "")
        yield Finding(
            text=f"The loss jumped at {len(spikes):,} step{'' if len(spikes) == 1 else 's'}: {named}.",
            kind="bad",
            to_do="run.log names the documents.",
        )
    largest = max((finite(record.get("recompute_difference")) or 0.0 for record in facts.steps), default=0.0)
    if largest > 0.01:
        yield Finding(
            text=f"The two sweeps over a chunk differed by {largest:.1e} at most: the gradient was not exact there.",
            kind="bad",
            to_do="Try another kernel.backend.",
        )


def _losses(facts: RunFacts) -> Iterator[Figure]:
    losses = facts.val_losses
    if len(losses) > 1:
        first, last = losses[0][1], losses[-1][1]
        yield Figure(name="Held-out loss", value=f"{nats(first)} → {nats(last)}", told="nats per token, first and last")
        yield Figure(name="Perplexity", value=f"{perplexity(first)} → {perplexity(last)}", told="of held-out tokens")
    elif losses:
        yield Figure(name="Held-out loss", value=nats(losses[0][1]), told=f"nats per token, step {losses[0][0]:,}")
    trained = [value for record in facts.steps if (value := finite(record.get("loss"))) is not None]
    if trained and not losses:
        yield Figure(
            name="Training loss", value=f"{nats(trained[0])} → {nats(trained[-1])}", told="first and last step"
        )


def _gain_figure(facts: RunFacts) -> Iterator[Figure]:
    gain = (facts.after or {}).get("gain")
    if gain is not None:
        yield Figure(
            name="Gain from long context",
            value=f"{gain['gain']:.3f} nats",
            told=f"state carried, not reset every {gain['beyond']:,} tokens",
        )


def _work(facts: RunFacts) -> Iterator[Figure]:
    if not facts.steps:
        return
    tokens, seconds = _last(facts.steps, "tokens"), _sum(facts.steps, "seconds")
    yield Figure(name="Tokens read", value=f"{tokens:,.0f}", told=f"in {facts.last_step:,} steps")
    speeds = [value for record in facts.steps if (value := finite(record.get("tokens_per_second"))) is not None]
    speed = median(speeds)
    if speed is not None:
        yield Figure(name="Time in steps", value=duration(seconds), told=f"{speed:,.0f} tokens/s, median")
    memory = max((finite(record.get("peak_device_bytes")) or 0.0 for record in facts.steps), default=0.0)
    place = "of the device"
    if memory == 0:
        memory, place = (
            max((finite(record.get("peak_host_bytes")) or 0.0 for record in facts.steps), default=0.0),
            "host",
        )
    if memory > 0:
        size = f"{memory / 1e9:,.1f} GB" if memory >= 1e9 else f"{memory / 1e6:,.0f} MB"
        yield Figure(name="Peak memory", value=size, told=place)


def duration(seconds: float) -> str:
    """A duration as 42 s, 3 min 5 s or 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _last(records: list[Record], key: str) -> float:
    return finite(records[-1].get(key)) or 0.0


def _sum(records: list[Record], key: str) -> float:
    return math.fsum(finite(record.get(key)) or 0.0 for record in records)
