"""The words and numbers that the terminal and the page have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infctx.data_view.excerpts import ShownDocument
from infctx.data_view.first_step import StepFacts
from infctx.data_view.sets import LengthFacts, SetFacts
from infctx.visible_text import visible

EPOCH_COLUMNS = ("set", "documents", "tokens", "trained", "masked", "of an epoch", "passes an epoch")
LENGTH_COLUMNS = ("set", "shortest", "10 %", "median", "90 %", "longest", "mean")
LEVELS = "▁▂▃▄▅▆▇█"


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def document_in_words(document: ShownDocument, *, is_set_named: bool) -> str:
    """What is known of a document beside its origin."""
    of_set = f"set {document.set_name}, " if is_set_named else ""
    return f"{of_set}{counted(document.num_tokens, 'token')}, {document.num_trained:,} trained"


def epoch_cells(one: SetFacts) -> tuple[str, ...]:
    """A set's row below EPOCH_COLUMNS."""
    return (
        visible(one.name),
        f"{one.num_documents:,}",
        f"{one.num_tokens:,}",
        _with_share(one.num_trained, one.num_tokens),
        _with_share(one.num_tokens - one.num_trained, one.num_tokens),
        f"{one.share:.1%}",
        f"{one.passes:,.2f}",
    )


def length_cells(lengths: LengthFacts) -> tuple[str, ...]:
    """The cells below LENGTH_COLUMNS, after the first."""
    counts = (lengths.shortest, lengths.tenth, lengths.median, lengths.ninetieth, lengths.longest)
    return (*(f"{count:,}" for count in counts), f"{lengths.mean:,.1f}")


def sketch(lengths: LengthFacts, among: LengthFacts, levels: str = LEVELS) -> str:
    """The histogram in a word, with a place for each bucket of `among`, of which this is a part."""
    counts = {bucket.first: bucket.num_documents for bucket in lengths.buckets}
    most = max(counts.values())
    heights = [-(-(len(levels) - 1) * counts.get(bucket.first, 0) // most) for bucket in among.buckets]
    return "".join(levels[height] for height in heights)


def ledger_lines(account: Mapping[str, Any]) -> list[str]:
    """Where every token went, a sentence a line."""
    tokens, held_out = account["tokens"], account["held_out"]
    lines = [
        f"documents {account['documents']:,}, rejected rows {len(account['rejected_rows']):,}, duplicates "
        f"{account['duplicate_documents']:,}",
        f"tokens in {tokens['in']:,} = trained {tokens['trained']:,} + masked {tokens['masked']:,} "
        f"+ dropped {tokens['dropped']:,}",
    ]
    dropped = account["dropped_tokens"]
    if dropped:
        reasons = " + ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        lines.append(f"dropped {tokens['dropped']:,} = {reasons}")
    lines.append(
        f"held out besides: {counted(held_out['tokens'], 'token')} of {counted(held_out['documents'], 'document')}"
    )
    return lines


def step_in_words(step: StepFacts) -> str:
    """What the first step holds, in a line."""
    groups = f" in {step.num_groups:,} groups" if step.num_groups > 1 else ""
    return (
        f"{step.mode} mode: {counted(step.num_rows, 'row')}{groups}, {counted(step.num_chunks, 'chunk')} of up to "
        f"{step.chunk_tokens:,} tokens, {counted(step.num_tokens, 'token')}, {step.padding:.1%} padding"
    )


def _with_share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})"
