"""The pictures of benchmarks/recall.py and recall_hybrid.py: accuracy against distance, or pairs, in panels.

A line for each window, or model. Every seed is a dot and their mean a mark: what is learned all at once or not at all
has no meaningful spread.

python benchmarks/recall_picture.py benchmarks/results/recall_cpu.json recall.svg
python benchmarks/recall_picture.py benchmarks/results/recall_hybrid_cpu.json recall_hybrid.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

# Of middle lightness, and no background, so that it can be read on white as well as on black.
INK = "#808893"
STYLES = {"1": ("#e0792b", "square"), "3": ("#5b8def", "triangle"), "document": ("#2fa35a", "circle")}
MODEL_STYLES = {"finch": ("#5b8def", "triangle"), "goldfinch": ("#e0a52b", "circle")}
MODEL_NAMES = {"finch": "Finch", "goldfinch": "GoldFinch"}
PANEL_WIDTH, PANEL_HEIGHT, GAP = 240, 170, 44
LEFT, TOP, BOTTOM = 48, 60, 56
# Lines that coincide are drawn side by side, so many pixels apart.
APART = 5


def draw(found: dict[str, Any]) -> str:
    """The picture as SVG. found: what benchmarks/recall.py writes."""
    settings = found["settings"]
    width = LEFT + len(settings) * (PANEL_WIDTH + GAP)
    height = TOP + PANEL_HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        "<title>Accuracy of recall against the distance between key and question</title>",
        *_legend({window: _window_in_words(window) for window in STYLES}, STYLES),
    ]
    for number, (name, setting) in enumerate(settings.items()):
        parts += _panel(
            _title(name, setting),
            setting["runs"],
            lines=("window", STYLES),
            trained_at=setting["setting"]["borders"],
            left=LEFT + number * (PANEL_WIDTH + GAP),
            chance=found["chance"],
        )
    middle = LEFT + (width - LEFT - GAP) / 2
    chunk_tokens = next(iter(settings.values()))["setting"]["chunk_tokens"]
    words = f"chunk borders between key and question (a chunk is {chunk_tokens} tokens)"
    words += "; shaded: trained; dots: seeds, lines: means"
    parts += [_text(middle, height - 12, words, anchor="middle"), "</svg>"]
    return "\n".join(parts) + "\n"


def draw_models(found: dict[str, Any]) -> str:
    """The picture of two models as SVG. found: what benchmarks/recall_hybrid.py writes."""
    tasks = found["tasks"]
    width = LEFT + len(tasks) * (PANEL_WIDTH + GAP)
    height = TOP + PANEL_HEIGHT + BOTTOM
    titles = {"one": "one key: chunk borders to the question", "pairs": "pairs of name and value in the document"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        "<title>Accuracy of recall by a Finch and a GoldFinch of the same number of parameters</title>",
        *_legend(MODEL_NAMES, MODEL_STYLES),
    ]
    for number, (name, task) in enumerate(tasks.items()):
        parts += _panel(
            titles[name],
            task["runs"],
            lines=("model", MODEL_STYLES),
            trained_at=task["trained_at"],
            left=LEFT + number * (PANEL_WIDTH + GAP),
            chance=found["chance"][name],
        )
    words = "shaded: trained; dots: seeds, lines: means"
    parts += [_text(LEFT + (width - LEFT - GAP) / 2, height - 12, words, anchor="middle"), "</svg>"]
    return "\n".join(parts) + "\n"


def _window_in_words(window: str) -> str:
    if window == "document":
        return "gradient over the document"
    return f"gradient over {window} chunk" + ("s" if window == "3" else "")


def _legend(names: dict[str, str], styles: dict[str, tuple[str, str]]) -> list[str]:
    parts = []
    for number, (name, words) in enumerate(names.items()):
        colour, shape = styles[name]
        x = LEFT + 10 + 190 * number
        parts += [_line(x - 10, 14, x + 10, 14, colour, 2), _mark(x, 14, colour, shape), _text(x + 16, 18, words)]
    return parts


def _panel(
    title: str,
    runs: list[dict[str, Any]],
    *,
    lines: tuple[str, dict[str, tuple[str, str]]],
    trained_at: list[int],
    left: float,
    chance: float,
) -> list[str]:
    key, styles = lines
    distances = list(runs[0]["accuracy"])
    step = PANEL_WIDTH / len(distances)

    def x(borders: str) -> float:
        return left + step * (distances.index(borders) + 0.5)

    def y(score: float) -> float:
        return TOP + PANEL_HEIGHT * (1 - score)

    trained = [x(str(borders)) for borders in trained_at]
    first, last = min(trained) - step / 2, max(trained) + step / 2
    parts = [
        f'<rect x="{first:.1f}" y="{TOP}" width="{last - first:.1f}" height="{PANEL_HEIGHT}" opacity="0.15"/>',
        _text(left + PANEL_WIDTH / 2, TOP - 14, title, anchor="middle"),
        _line(left, y(0), left + PANEL_WIDTH, y(0), INK, 1),
        _line(left, y(1), left, y(0), INK, 1),
        _line(left, y(chance), left + PANEL_WIDTH, y(chance), INK, 1, dash="3 3"),
        *(_text(x(borders), y(0) + 16, borders, anchor="middle") for borders in distances),
        *(_text(left - 6, y(score) + 4, f"{score:.0%}", anchor="end") for score in (0, 0.5, 1)),
        _text(left + PANEL_WIDTH - 2, y(0) - 4, "chance", anchor="end"),
    ]
    names = list(dict.fromkeys(str(run[key]) for run in runs))
    for number, name in enumerate(names):
        colour, shape = styles[name]
        shift = APART * (number - (len(names) - 1) / 2)
        points, dots = [], ""
        for borders in distances:
            scores = [run["accuracy"][borders] for run in runs if str(run[key]) == name]
            place = x(borders) + shift
            dots += "".join(f"M{place:.1f} {y(score):.1f}h0" for score in sorted(set(scores)))
            points.append((place, y(mean(scores))))
        # A line of no length with round ends is a dot.
        parts.append(f'<path d="{dots}" stroke="{colour}" stroke-width="3.5" stroke-linecap="round"/>')
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="0.7"/>')
        parts += [_mark(across, down, colour, shape) for across, down in points]
    return parts


def _title(name: str, setting: dict[str, Any]) -> str:
    borders = setting["setting"]["borders"]
    return f"{name}: trained at {min(borders)} to {max(borders)} borders"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, *, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def _mark(x: float, y: float, colour: str, shape: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    if shape == "square":
        return f'<rect x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4" fill="{colour}"/>'
    points = f"{x:.1f},{y - 4.5:.1f} {x - 4:.1f},{y + 3:.1f} {x + 4:.1f},{y + 3:.1f}"
    return f'<polygon points="{points}" fill="{colour}"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def main() -> None:
    figures, picture = map(Path, sys.argv[1:])
    found = json.loads(figures.read_text())
    picture.write_text(draw_models(found) if "tasks" in found else draw(found))


if __name__ == "__main__":
    main()
