"""The picture of benchmarks/recall.py: accuracy against distance, a panel for each setting, a line for each window.

Every seed is a dot and their mean a mark: what is learned all at once or not at all has no meaningful spread.

python benchmarks/recall_picture.py benchmarks/results/recall_cpu.json recall.svg
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
        *_legend(),
    ]
    for number, (name, setting) in enumerate(settings.items()):
        parts += _panel(name, setting, left=LEFT + number * (PANEL_WIDTH + GAP), chance=found["chance"])
    middle = LEFT + (width - LEFT - GAP) / 2
    chunk_tokens = next(iter(settings.values()))["setting"]["chunk_tokens"]
    words = f"chunk borders between key and question (a chunk is {chunk_tokens} tokens)"
    words += "; shaded: trained; dots: seeds, lines: means"
    parts += [_text(middle, height - 12, words, anchor="middle"), "</svg>"]
    return "\n".join(parts) + "\n"


def _legend() -> list[str]:
    parts = []
    for number, (window, (colour, shape)) in enumerate(STYLES.items()):
        x = LEFT + 10 + 190 * number
        words = "gradient over the document" if window == "document" else f"gradient over {window} chunk"
        words += "s" if window == "3" else ""
        parts += [_line(x - 10, 14, x + 10, 14, colour, 2), _mark(x, 14, colour, shape), _text(x + 16, 18, words)]
    return parts


def _panel(name: str, setting: dict[str, Any], *, left: float, chance: float) -> list[str]:
    runs = setting["runs"]
    distances = list(runs[0]["accuracy"])
    step = PANEL_WIDTH / len(distances)

    def x(borders: str) -> float:
        return left + step * (distances.index(borders) + 0.5)

    def y(score: float) -> float:
        return TOP + PANEL_HEIGHT * (1 - score)

    trained = [x(str(borders)) for borders in setting["setting"]["borders"]]
    first, last = min(trained) - step / 2, max(trained) + step / 2
    parts = [
        f'<rect x="{first:.1f}" y="{TOP}" width="{last - first:.1f}" height="{PANEL_HEIGHT}" opacity="0.15"/>',
        _text(left + PANEL_WIDTH / 2, TOP - 14, _title(name, setting), anchor="middle"),
        _line(left, y(0), left + PANEL_WIDTH, y(0), INK, 1),
        _line(left, y(1), left, y(0), INK, 1),
        _line(left, y(chance), left + PANEL_WIDTH, y(chance), INK, 1, dash="3 3"),
        *(_text(x(borders), y(0) + 16, borders, anchor="middle") for borders in distances),
        *(_text(left - 6, y(score) + 4, f"{score:.0%}", anchor="end") for score in (0, 0.5, 1)),
        _text(left + PANEL_WIDTH - 2, y(0) - 4, "chance", anchor="end"),
    ]
    windows = list(dict.fromkeys(str(run["window"]) for run in runs))
    for number, window in enumerate(windows):
        colour, shape = STYLES[window]
        shift = APART * (number - (len(windows) - 1) / 2)
        points, dots = [], ""
        for borders in distances:
            scores = [run["accuracy"][borders] for run in runs if str(run["window"]) == window]
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
    picture.write_text(draw(json.loads(figures.read_text())))


if __name__ == "__main__":
    main()
