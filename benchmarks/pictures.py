"""The pictures of README and docs, made from results, contracts and the live view itself.

python benchmarks/pictures.py              # writes docs/pictures/*.svg
python benchmarks/pictures.py --check      # exit code 1 where one is not what would be written
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent))

from architecture_pictures import draw_house, draw_step
from live_view_picture import draw_live_view
from picture_card import card
from recall_picture import INK, draw_models
from recall_picture import draw as draw_recall

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"


def pictures() -> dict[str, Callable[[], str]]:
    """Name of a file: what draws it."""
    return {
        "memory.svg": lambda: draw_memory(_result("memory_against_length_cpu.json")),
        "recall.svg": lambda: on_card(draw_recall(_result("recall_cpu.json"))),
        "recall_hybrid.svg": lambda: on_card(draw_models(_result("recall_hybrid_cpu.json"))),
        "house.svg": lambda: draw_house(ROOT / "pyproject.toml"),
        "step.svg": draw_step,
        "live_view.svg": draw_live_view,
    }


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def on_card(drawing: str) -> str:
    """A drawing in neutral ink on the card of the others, in its ink."""
    opening, rest = drawing.split(">", 1)
    width, height = (float(opening.split(f' {side}="')[1].split('"')[0]) for side in ("width", "height"))
    inside = rest.rsplit("</svg>", 1)[0].replace(INK, "currentColor")
    title, inside = inside.split("</title>", 1)
    return card(
        f'<g transform="translate(16 16)" fill="currentColor" font-size="12">{inside}</g>',
        width=width + 8,
        height=height + 24,
        title=title.split("<title>")[1],
    )


def draw_memory(found: dict[str, Any]) -> str:
    """Peak memory against length, exact in chunks and in one piece. found: of memory_against_length.py."""
    left, top, width, height = 70, 52, 560, 230
    lines = {"in_chunks": ("in chunks, exact", "#2fa35a", ""), "in_one_piece": ("in one piece", "#e0792b", "6 4")}
    points = {name: [(row["tokens"], row["peak_mb"]) for row in found[name]] for name in lines}
    lengths = sorted({tokens for rows in points.values() for tokens, _ in rows})
    most = max(peak for rows in points.values() for _, peak in rows)
    step = 10 ** math.floor(math.log10(most)) / (1 if most / 10 ** math.floor(math.log10(most)) >= 4 else 2)
    top_mb = math.ceil(most / step) * step

    def x(tokens: float) -> float:
        return left + width * math.log2(tokens / lengths[0]) / math.log2(lengths[-1] / lengths[0])

    def y(megabytes: float) -> float:
        return top + height * (1 - megabytes / top_mb)

    parts = [f'<text x="{left - 54}" y="30" class="strong">Peak memory of one exact gradient, MB</text>']
    for level in range(round(top_mb / step) + 1):
        at = y(level * step)
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{left + width}" y2="{at:.1f}" class="thin"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{level * step:,.0f}</text>')
    for tokens in lengths[::2] if len(lengths) > 8 else lengths:
        label = f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 1024}k"
        parts.append(f'<text x="{x(tokens):.1f}" y="{top + height + 20}" text-anchor="middle">{label}</text>')
    words = "tokens of the document; "
    words += f"a model of 1 million parameters, chunks of {found['chunk_tokens']:,}, on a CPU"
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 44}" text-anchor="middle">{words}</text>')
    for name, (label, colour, dashes) in lines.items():
        path = " ".join(f"{x(tokens):.1f},{y(peak):.1f}" for tokens, peak in points[name])
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
        )
        for tokens, peak in points[name]:
            parts.append(f'<circle cx="{x(tokens):.1f}" cy="{y(peak):.1f}" r="4" fill="{colour}"/>')
        tokens, peak = points[name][-1]
        is_right = x(tokens) > left + width * 0.8
        at, lift = (x(tokens), -12) if is_right else (x(tokens) + 12, 5)
        anchor = "end" if is_right else "start"
        said = f"{label}: {peak:,} MB at {tokens:,}"
        parts.append(f'<text x="{at:.1f}" y="{y(peak) + lift:.1f}" text-anchor="{anchor}">{escape(said)}</text>')
    title = "Peak memory against the length of a document: level in chunks, growing in one piece"
    return card("\n".join(parts), width=left + width + 40, height=top + height + 64, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", help="Of these only, as memory.svg.")
    arguments = parser.parse_args()
    is_different = False
    for name, draw in pictures().items():
        if arguments.names and name not in arguments.names:
            continue
        path, drawn = FOLDER / name, draw()
        if arguments.check:
            is_same = path.is_file() and path.read_text(encoding="utf-8") == drawn
            is_different |= not is_same
            print(name, "is the same" if is_same else "DIFFERS")
        else:
            path.write_text(drawn, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {len(drawn.encode()):,} bytes")
    sys.exit(is_different)


if __name__ == "__main__":
    main()
