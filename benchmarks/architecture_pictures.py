"""The house, drawn from the import contracts of pyproject.toml, and what one step does."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

from picture_card import card

WORDS = {
    "cli": "commands",
    "cli_output": "how commands speak",
    "doctor_ranks": "several processes",
    "run_folder": "a run's folder and recipe",
    "run_data": "a recipe's data",
    "run_adapter": "a recipe's adapter",
    "launch": "starts processes",
    "rank_place": "which process is which",
    "spread": "over devices",
    "shapes": "letters of shapes",
    "errors": "what users are told",
    "exit_codes": "how a command ends",
    "signal_queue": "Ctrl-C and SIGTERM",
    "assemble": "recipe to objects",
    "trained": "a run's model",
    "data_view": "infctx data",
    "planning": "what will be needed",
    "bench": "timings",
    "doctor": "this machine",
    "training": "sweeps, steps, loop",
    "export": "formats out",
    "adapters": "what is trained",
    "checkpoint": "files in",
    "surgery": "models to models",
    "model": "Finch and Eagle",
    "data": "rows to chunks",
    "recipe": "the schema",
    "infctx_kernels": "the recurrence, needs torch only",
    "evaluation": "loss by position",
    "report": "report.html",
    "generation": "sampling, chat",
    "token_trace": "infctx check --trace-token",
    "html_page": "the style of pages",
    "visible_text": "what cannot be seen, shown",
}
WIDTH, ROOM_HEIGHT, GAP, MARGIN = 900, 40, 8, 16
CHARACTER, PADDING = 6.9, 18


def floors(pyproject: Path) -> list[list[str]]:
    """The layers of the import contracts, the top one first."""
    contracts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [[name.strip().removeprefix("infctx.") for name in layer.split("|")] for layer in layers]


def draw_house(pyproject: Path) -> str:
    """Floors from the commands down to the kernels."""
    parts = [f'<text x="{MARGIN}" y="30" class="strong">A floor uses the floors below it</text>']
    top = 46.0
    for names in floors(pyproject):
        for line in _lines(names):
            wide = (WIDTH - 2 * MARGIN - GAP * (len(line) - 1)) / len(line)
            for place, name in enumerate(line):
                left = MARGIN + place * (wide + GAP)
                parts.append(_room(name, left=left, top=top, width=wide))
            top += ROOM_HEIGHT + 3
        top += GAP
    return card(
        "\n".join(parts), width=WIDTH, height=top + MARGIN - GAP, title="The packages of infctx, commands above kernels"
    )


def _lines(names: list[str]) -> list[list[str]]:
    """A floor's rooms in as few lines of about as many rooms as they fit into."""
    longest = max(max(len(name), len(WORDS.get(name, ""))) for name in names) * CHARACTER + PADDING
    most = max(1, int((WIDTH - 2 * MARGIN + GAP) // (longest + GAP)))
    num_lines = -(-len(names) // most)
    borders = [round(len(names) * line / num_lines) for line in range(num_lines + 1)]
    return [names[first:end] for first, end in itertools.pairwise(borders)]


def _room(name: str, *, left: float, top: float, width: float) -> str:
    middle, words = left + width / 2, WORDS.get(name)
    at = f'x="{middle:.1f}" text-anchor="middle"'
    text = f'<text {at} y="{top + (17 if words else 25):.1f}" class="strong">{name}</text>'
    if words:
        text += f'<text {at} y="{top + 33:.1f}" class="quiet">{words}</text>'
    box = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{ROOM_HEIGHT}" rx="5" class="room"/>'
    return box + text


def draw_step() -> str:
    """Rows become chunks; sweep 1 banks states going forward, sweep 2 brings gradients back."""
    chunks, wide, left, gap = 4, 150, 36, 40
    step = wide + gap
    first_y, second_y = 130, 232
    parts = [
        '<text x="16" y="30" class="strong">One step</text>',
        '<text x="16" y="56" class="quiet">rows → documents → chunks; the total weight of all targets is counted '
        "before the first chunk</text>",
    ]
    for number in range(chunks):
        x = left + number * step
        parts.append(f'<rect x="{x}" y="72" width="{wide}" height="26" rx="5" class="room"/>')
        parts.append(f'<text x="{x + wide / 2}" y="90" text-anchor="middle">chunk {number}</text>')
        parts.append(f'<rect x="{x}" y="{first_y}" width="{wide}" height="34" rx="5" class="room"/>')
        words = "forward, no graph" if number < chunks - 1 else "not needed"
        parts.append(f'<text x="{x + wide / 2}" y="{first_y + 22}" text-anchor="middle">{words}</text>')
        parts.append(f'<rect x="{x}" y="{second_y}" width="{wide}" height="48" rx="5" class="room"/>')
        again = "forward again," if number < chunks - 1 else "forward,"
        parts.append(f'<text x="{x + wide / 2}" y="{second_y + 20}" text-anchor="middle">{again}</text>')
        parts.append(f'<text x="{x + wide / 2}" y="{second_y + 37}" text-anchor="middle">backward</text>')
        if number < chunks - 1:
            parts.append(_arrow(x + wide, first_y + 17, x + step, first_y + 17, "way", "head"))
            parts.append(
                f'<text x="{x + wide + gap / 2}" y="{first_y + 8}" text-anchor="middle" class="quiet">S</text>'
            )
            parts.append(_arrow(x + step, second_y + 30, x + wide, second_y + 30, "back", "backhead"))
            text = f'<text x="{x + wide + gap / 2}" y="{second_y + 21}" text-anchor="middle" class="backtext">dS</text>'
            parts.append(text)
        # The banked state before a chunk comes down to where the chunk is computed again.
        parts.append(_arrow(x + 12, first_y + 34, x + 12, second_y, "way", "head"))
        parts.append(f'<text x="{x + 20}" y="{second_y - 28}" class="quiet">state before chunk {number}</text>')
    parts += [
        f'<text x="{left}" y="{first_y - 10}" class="quiet">sweep 1: front to back, banks the states</text>',
        f'<text x="{left}" y="{second_y + 72}" class="backtext">sweep 2: back to front; backward on '
        "loss / total weight + Σ⟨dS, S⟩; parameters add up their gradients</text>",
        f'<text x="{left}" y="{second_y + 98}">then: norm over all ranks, clip, update once</text>',
    ]
    title = "One step: a sweep forward that banks states, a sweep back that carries the gradient of the state"
    return card("\n".join(parts), width=left + chunks * step, height=second_y + 118, title=title)


def _arrow(x1: float, y1: float, x2: float, y2: float, line: str, head: str) -> str:
    """A straight arrow along an axis."""
    along = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    tip = [(x2, y2)]
    for side in (-1, 1):
        tip.append((x2 - 7 * along[0] + 4 * side * along[1], y2 - 7 * along[1] + 4 * side * along[0]))
    points = " ".join(f"{x:g},{y:g}" for x, y in tip)
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2 - 5 * along[0]:g}" y2="{y2 - 5 * along[1]:g}" class="{line}"/>'
        f'<polygon points="{points}" class="{head}"/>'
    )
