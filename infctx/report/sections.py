"""The parts of a report, each as HTML; what a run does not have says so, or is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infctx.html_page import cells, escaped, section, table
from infctx.recipe.schema import Recipe
from infctx.report.charts import render_chart
from infctx.report.facts import Record, RunFacts
from infctx.report.findings import duration, findings
from infctx.report.position_charts import before_after_chart, carried_reset_chart, in_words
from infctx.report.run_charts import loss_chart, set_charts, small_charts
from infctx.report.use import check_command, commands, gradient_as_run, gradient_in_words

MOST_REASONS = 12
# White space at the end of a text.
WORTH_COUNTING = 8
# Beside headlines, where a run says what it is.
HEADLINE_NAMES = ("folder", "gradient")


def found(facts: RunFacts) -> str:
    """What came of it, in sentences."""
    items = "".join(
        f"<li>{_verdict(one.kind)}{escaped(one.text)}{f' {escaped(one.to_do)}' if one.to_do else ''}</li>\n"
        for one in findings(facts)
    )
    return section("findings", "What came of it", f'<ul class="findings">\n{items}</ul>\n')


def _verdict(kind: str) -> str:
    return {"good": '<span class="good">Good: </span>', "bad": '<span class="bad">Look: </span>'}.get(kind, "")


def curves(facts: RunFacts) -> str:
    """The course of the run."""
    main = loss_chart(facts)
    if main is None:
        return section("curves", "Curves", "<p>No step has been done yet.</p>\n")
    sets = "".join(map(render_chart, set_charts(facts)))
    small = "".join(map(render_chart, small_charts(facts)))
    beside = f'<div class="charts">\n{sets}{small}</div>\n' if sets or small else ""
    return section("curves", "Curves", render_chart(main) + beside)


def positions(facts: RunFacts) -> str:
    """Loss by position, before and after, and carried against reset."""
    charts = [chart for chart in (before_after_chart(facts), carried_reset_chart(facts)) if chart is not None]
    told = [
        "A token is predicted from everything before it in its document. Where the state carries what matters, the "
        "loss keeps falling as documents go on."
    ]
    if not charts:
        return section("positions", "Long context", _sentences(_why_not(facts) or ["This was not measured."]))
    measured = facts.after or facts.before
    assert measured is not None
    told.append(f"{in_words(measured)}; it took {_seconds(facts)}.")
    return section("positions", "Long context", _sentences(told) + "".join(map(render_chart, charts)) + _missing(facts))


def _seconds(facts: RunFacts) -> str:
    sides = [(name, side) for name, side in (("before", facts.before), ("after", facts.after)) if side is not None]
    return ", ".join(f"{duration(side['seconds'])} {name}" for name, side in sides)


def _missing(facts: RunFacts) -> str:
    """Why a part of what could be there is not."""
    return _sentences(_why_not(facts))


def _why_not(facts: RunFacts) -> list[str]:
    if not facts.recipe.run.report:
        return ["Nothing was measured before and after the run, for run.report is false."]
    reasons = [reason for side in (facts.before, facts.after) if side is not None for reason in side["problems"]]
    if facts.before is None:
        reasons.append("Nothing was measured before the run.")
    if facts.after is None and facts.state == "finished":
        reasons.append("Nothing was measured after the run.")
    elif facts.after is None:
        reasons.append("What can be said after the run is measured at its end.")
    return list(dict.fromkeys(reasons))


def samples(facts: RunFacts) -> str:
    """What the model writes before and after."""
    before, after = ((side or {}).get("samples") or [] for side in (facts.before, facts.after))
    if not before and not after:
        return section("samples", "Samples", "<p>No samples were taken.</p>\n")
    later = {one["place"]: one for one in after}
    shown = "".join(
        _sample(one, before=one if before else None, after=later.get(one["place"])) for one in before or after
    )
    told = (
        "The model continues the beginnings of held-out documents, always with its most probable token. So little text "
        "is to be looked at, not to be measured by."
    )
    return section("samples", "Samples", _sentences([told]) + shown)


def _sample(one: Record, *, before: Record | None, after: Record | None) -> str:
    sides = [("Before", before["text"] if before else None), ("After", after["text"] if after else None)]
    sides.append(("The document itself", one["document"]))
    columns = "".join(f"<div><h4>{name}</h4>\n{_text_box(text)}</div>\n" for name, text in sides if text is not None)
    cut = "… " if one["is_cut"] else ""
    return (
        f'<article class="sampled">\n<h3><bdi>{escaped(one["origin"])}</bdi></h3>\n'
        f'<h4>Prompt</h4>\n{_text_box(cut + one["prompt"])}<div class="sides">\n{columns}</div>\n</article>\n'
    )


def _text_box(text: str) -> str:
    """A text in a box; what cannot be seen at its end is counted."""
    if not text:
        return '<p class="quiet">It ends here.</p>\n'
    seen = text.rstrip()
    num_unseen = len(text) - len(seen)
    box = f'<pre dir="auto">{escaped(seen)}</pre>\n' if seen else ""
    if num_unseen < WORTH_COUNTING and seen:
        return box
    told = f"{'Then' if seen else 'Only'} white space: {num_unseen:,} character{'' if num_unseen == 1 else 's'}."
    return f'{box}<p class="quiet">{told}</p>\n'


def tokens(facts: RunFacts) -> str:
    """Where every token of the data went."""
    ledger = facts.ledger
    if ledger is None or "tokens" not in ledger:
        return section("tokens", "Tokens", "<p>ledger.json is missing in the run folder.</p>\n")
    counts = ledger["tokens"]
    kinds = [kind for kind in ("trained", "masked", "dropped") if counts.get(kind)]
    whole = counts.get("in") or 1
    words = ", ".join(f"{kind} {counts[kind] / whole:.1%}" for kind in kinds)
    bars = "".join(f'<span class="{kind}" style="width:{100 * counts[kind] / whole:.3f}%"></span>' for kind in kinds)
    keys = "".join(
        f'<span class="key {kind}"></span>{kind} {counts[kind]:,} ({counts[kind] / whole:.1%}) ' for kind in kinds
    )
    held_out = ledger.get("held_out", {})
    told = [
        f"{_counted(ledger.get('documents', 0), 'document')} with {whole:,} tokens. Trained: predicted, with a "
        "weight above 0. Masked: read, not trained. Dropped: not read.",
        f"Held out besides: {held_out.get('tokens', 0):,} tokens of "
        f"{_counted(held_out.get('documents', 0), 'document')}.",
    ]
    if facts.steps:
        read = facts.steps[-1].get("tokens") or 0
        kept = whole - (counts.get("dropped") or 0)
        told.append(f"The run read {read:,} tokens, {read / max(1, kept):.2f} times what is there.")
    bar = f'<div class="parts" role="img" aria-label="{words}">{bars}</div>\n<p class="quiet">{keys}</p>\n'
    return section("tokens", "Tokens", bar + _sentences(told) + _token_tables(ledger))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _token_tables(ledger: Record) -> str:
    shown = ""
    sets = ledger.get("sets") or []
    if len(sets) > 1:
        rows = [cells((str(one.get("name", "")), *(_count(one, key) for key in _SET_KEYS))) for one in sets]
        shown += table(("set", *_SET_KEYS), rows, caption="Each set.")
    dropped = ledger.get("dropped_tokens") or {}
    if dropped:
        rows = [cells((reason, f"{count:,}")) for reason, count in list(dropped.items())[:MOST_REASONS]]
        shown += table(("dropped because", "tokens"), rows)
    rejected = ledger.get("rejected_rows") or []
    if rejected:
        shown += f"<p>{len(rejected):,} rows were skipped; ledger.json names them.</p>\n"
    return shown


_SET_KEYS = ("documents", "trained", "masked", "dropped")


def _count(one: Mapping[str, Any], key: str) -> str:
    value = one.get(key, (one.get("tokens") or {}).get(key) if isinstance(one.get("tokens"), dict) else None)
    return f"{value:,}" if isinstance(value, int) else ""


def gradient(facts: RunFacts) -> str:
    """How far the gradient reached."""
    return section(
        "gradient",
        "How far the gradient reached",
        _sentences([*gradient_in_words(facts.recipe), *gradient_as_run(facts)]) + _command(check_command(facts)),
    )


def use(facts: RunFacts) -> str:
    """What to do with the result."""
    shown = "".join(f"<h3>{escaped(purpose)}</h3>\n{_command(command)}" for purpose, command in commands(facts))
    return section("use", "How to use the result", shown)


def settings(facts: RunFacts) -> str:
    """The recipe: what is not as it is by default, and all of it."""
    rows = [cells((key, _value(value))) for key, value in _chosen(facts.recipe)]
    chosen = table(("key", "value"), rows, caption="What the recipe, the model file and the machine chose.")
    return section(
        "settings",
        "Settings",
        f'<div class="facts">{chosen}</div>\n<details><summary>All of recipe.yaml</summary>\n'
        f"<pre>{escaped(facts.recipe_text)}</pre></details>\n",
    )


def _chosen(recipe: Recipe) -> list[tuple[str, object]]:
    mapping = recipe.to_mapping()
    defaults = {name: type(part).model_fields for name, part in recipe}
    return [
        (f"{name}.{key}", value)
        for name, part in mapping.items()
        for key, value in part.items()
        if value != _plain(defaults[name][key].get_default(call_default_factory=True))
    ]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def versions(facts: RunFacts) -> str:
    """Programs and machine, as they were when the run began."""
    measured = facts.before or {}
    rows = [
        cells((name, str(value)))
        for name, value in {**measured.get("versions", {}), **measured.get("machine", {})}.items()
    ]
    head = [line for line in measured.get("headline", ()) if line.split(" ")[0] not in HEADLINE_NAMES]
    if not rows and not head:
        return section("versions", "Machine and versions", "<p>They were not recorded.</p>\n")
    parted = [line.partition(" ") for line in head]
    rows = [cells((name, told.strip())) for name, _, told in parted] + rows
    shown = table(("what", "as the run began"), rows)
    return section("versions", "Machine and versions", f'<div class="facts">{shown}</div>\n')


def _sentences(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escaped(text)}</p>\n" for text in texts)


def _command(text: str) -> str:
    return f'<pre class="command"><code>{escaped(text)}</code></pre>\n'
