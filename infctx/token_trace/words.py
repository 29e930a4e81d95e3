"""The ten stops for people: at most 100 columns, at most six lines a stop."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infctx.token_trace.stop import Stop, code_place

WIDTH = 100
MOST_LINES = 4
MOST_BORDERS = 5
INDENT = "    "

Values = Mapping[str, Any]


def stops_in_words(stops: Sequence[Stop]) -> list[tuple[str, str, list[str]]]:
    """Of each stop its title, the place in the code, and lines about it."""
    told = []
    for stop in stops:
        place = code_place(stop.code)
        lines: list[str] = []
        for sentence in _WORDS[stop.number](stop.values):
            lines += textwrap.wrap(
                " ".join(sentence.split()),
                WIDTH,
                initial_indent=INDENT,
                subsequent_indent=INDENT * 2,
                max_lines=2,
                placeholder=" …",
            )
        title = f"{stop.number:>2}  {stop.title[0].upper()}{stop.title[1:]}"
        told.append((title, f"{place.file}:{place.line} {place.name}", lines[:MOST_LINES]))
    return told


def _file(values: Values) -> list[str]:
    where = f"{values['path']}, line {values['line']:,} ({values['format']})"
    before, token, behind = (_in_one_line(values[key]) for key in ("before", "token", "behind"))
    return [where, f"…{before[-36:]}⟦{token or 'end of text'}⟧{behind[:36]}…"]


def _key(values: Values) -> list[str]:
    path = values["path"]
    of_set = f" of the set {values['set']}" if values["set"] else ""
    return [f"{values['key']}: {path if isinstance(path, str) else ', '.join(path)}{of_set}"]


def _section(values: Values) -> list[str]:
    return [", ".join(f"{key}: {value}" for key, value in values.items() if value is not None)]


def _record(values: Values) -> list[str]:
    if "tokens" in values:
        return [f"{values['tokens']:,} tokens, which the file holds as such"]
    # One line a column; a row of very many does not push the others off the screen.
    shown = [f"{name}: {_cut(json.dumps(value, ensure_ascii=False), 84)}" for name, value in values["fields"].items()]
    return shown[:3] if len(shown) <= 3 else [*shown[:2], f"and {len(shown) - 2} more columns"]


def _document(values: Values) -> list[str]:
    sign = "trained" if values["is_trained"] else "not trained"
    text = _in_one_line(values["text"]) or "end of text"
    at = ""
    if values["bytes"] is not None:
        first, behind = values["bytes"]
        at = (
            f", byte {first:,} of its text"
            if behind == first + 1
            else f", bytes {first:,} to {behind - 1:,} of its text"
        )
    return [
        f"token {values['document_token']:,} of {values['document_tokens']:,}: id {values['id']} “{text}”{at}",
        f"{sign} (weight {values['weight']:g}): {values['why']}",
        f"{values['document_trained_tokens']:,} tokens of the document are trained",
    ]


def _place(values: Values) -> list[str]:
    group = f"group {values['group']}, " if values["group"] else ""
    start = (
        ", a document starts here" if values["starts"] else f", in a document from token {values['document_begin']:,}"
    )
    lines = [
        f"row {values['row']} ({group}b = {values['b']}), chunk i = {values['chunk']}, t = {values['t']}{start}; the "
        f"row has {values['row_tokens']:,} tokens"
    ]
    if values["target_id"] is None:
        lines.append("target: none, the document ends here")
    else:
        target = _in_one_line(values["target"]) or "end of text"
        lines.append(f"target: id {values['target_id']} “{target}”, weight {values['target_weight']:g}")
    if values["why_no_weight"] is not None and values["target_id"] is not None:
        ahead = values["next_trained_place"]
        lines[-1] += f": {values['why_no_weight']}"
        lines.append(
            f"{values['trained_places']:,} places of the row predict a trained token"
            + (f", the next at {values['row']}:{ahead}" if ahead is not None else ", none from here on")
        )
    return lines


def _model(values: Values) -> list[str]:
    layers, head = values["layer_norms"], values["wkv6"]
    before, behind = values["state_before_chunk"], values["state_behind_chunk"]
    return [
        f"norms: embedding {values['embedding_norm']:.4g}, behind layer 0 {layers[0]:.4g}, behind layer "
        f"{len(layers) - 1} {layers[-1]:.4g}, into the head {values['head_input_norm']:.4g}",
        f"wkv6, layer {head['layer']} head {head['head']}: r {head['receptance']:.3g}, k {head['key']:.3g}, "
        f"v {head['value']:.3g}, decay {head['smallest_decay']:.3g} to {head['largest_decay']:.3g}, "
        f"out {head['output']:.3g}",
        f"state of all layers: norm {before['wkv']:.4g} before the chunk, {behind['wkv']:.4g} behind it",
    ]


def _loss(values: Values) -> list[str]:
    if values["loss"] is None:
        return ["nothing is predicted here, so there is no loss"]
    lines = [
        f"loss {values['loss']:.4f} nats: the target has probability {values['probability']:.4g} and rank "
        f"{values['rank']:,} of {values['vocabulary']:,}"
    ]
    total = values.get("weight_total")
    if values.get("step_loss") is not None:
        share = values["share_of_step_loss"]
        part = (
            ""
            if share is None
            else f", {share:.3%} of it from here"
            if values["weight"]
            else ", nothing of it from here"
        )
        lines.append(f"weight {values['weight']:g} of {total:,g}; the step's loss is {values['step_loss']:.4f}{part}")
    else:
        lines.append(f"weight {values['weight']:g}; the step has nothing to learn")
    if values["is_without_random_numbers"]:
        lines.append("the token alone is measured without dropout and noise, the step with them")
    return lines


def _reach(values: Values) -> list[str]:
    first, last = values["window"]
    window = f"window: chunk {first}" if first == last else f"window: chunks {first} to {last}"
    reached = values["reaches_chunks"]
    if not reached:
        return [window, "no loss, so no gradient"]
    chunks = f"chunk {reached[0]} alone" if len(reached) == 1 else f"chunks {reached[0]} to {reached[-1]}"
    if values["weight"] == 0:
        window += "; weight 0, so nothing of this enters the step, and with weight 1:"
        lines = [window, f"the gradient of this loss reaches {chunks} and stops where {values['stops_because']}"]
    else:
        lines = [f"{window}; the gradient of this loss reaches {chunks} and stops where {values['stops_because']}"]
    borders = values["borders"]
    if borders:
        shown = borders if len(borders) <= MOST_BORDERS else [*borders[: MOST_BORDERS - 1], borders[-1]]
        norms = [f"chunk {one['before_chunk']}: {one['gradient_norm']['wkv']:.3g}" for one in shown]
        if len(borders) > MOST_BORDERS:
            norms.insert(-1, "…")
        lines.append(f"|d loss / d wkv state| before {', '.join(norms)}")
    return lines


def _optimizer(values: Values) -> list[str]:
    if "grad_norm" not in values:
        return [values["no_update"]]
    factor, clip = values["clip_factor"], values["clip"]
    how = (
        "not clipped"
        if clip is None
        else f"clipped at {clip:g}, × {factor:.4g}"
        if factor < 1
        else f"below the clip {clip:g}"
    )
    own = values["token_grad_norm"]
    lines = [
        f"gradient of the step: norm {values['grad_norm']:.4g}, {how}"
        + ("" if own is None else f"; this token's part: norm {own:.3g}"),
    ]
    share = values["parameter_token_share"]
    lines.append(
        f"{values['parameter']}: gradient {values['parameter_grad_norm']:.3g}"
        + ("" if share is None else f", {share:.2%} of it along this token's")
    )
    if "no_update" in values:
        return [*lines, f"no update: {values['no_update']}"]
    lines.append(
        f"its update at learning rate {values['learning_rate']:.3g}: norm {values['update_norm']:.3g} of "
        f"{values['parameter_norm']:.4g}, at most {values['update_largest']:.3g}; not made"
    )
    return lines


_WORDS: dict[int, Callable[[Values], list[str]]] = {
    1: _file,
    2: _key,
    3: _section,
    4: _record,
    5: _document,
    6: _place,
    7: _model,
    8: _loss,
    9: _reach,
    10: _optimizer,
}


def _in_one_line(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
