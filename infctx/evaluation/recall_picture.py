"""A recall map as a person sees it: in a terminal, readable without colour, and as SVG."""

from __future__ import annotations

from infctx.evaluation.recall import RecallMap

_BLOCKS = "·▁▂▃▄▅▆▇█"
_CELL_COLUMNS = 7
_LABEL_COLUMNS = 8
MAX_COLUMNS = 80

# Of middle lightness and no background, to be read on white as on black; cells go from one colour to the other.
_INK, _NONE, _ALL = "#808893", (232, 225, 214), (38, 120, 90)
_WIDTH, _HEIGHT, _LEFT, _TOP = 72, 36, 90, 48


def map_in_words(found: RecallMap) -> list[str]:
    """The map in characters: a block and percent for each cell, in as many stretches as 80 columns need."""
    lines = [
        f"Recall ({found.form} form): % of {found.trials} texts in which the value is the most probable; chance "
        f"{found.chance:.1%}."
    ]
    if len(lines[0]) > MAX_COLUMNS:
        lines = [
            f"Recall ({found.form} form): % of {found.trials} texts in which the value",
            f"is the most probable; chance {found.chance:.3g}.",
        ]
    at_once = (MAX_COLUMNS - _LABEL_COLUMNS) // _CELL_COLUMNS
    for first in range(0, len(found.lengths), at_once):
        lengths = found.lengths[first : first + at_once]
        lines.append(f"{'key at':<{_LABEL_COLUMNS}}" + "".join(f"{_short(one):>{_CELL_COLUMNS}}" for one in lengths))
        for depth, row in zip(found.depths, found.right, strict=True):
            cells = "".join(
                f"{_block(share)} {100 * share:3.0f}".rjust(_CELL_COLUMNS) for share in row[first:][:at_once]
            )
            lines.append(f"{f'{100 * depth:.0f} %':>{_LABEL_COLUMNS - 1}} {cells}")
    return lines


def draw_map(found: RecallMap, *, title: str) -> str:
    """The map as SVG. title: plain text."""
    width, height = _LEFT + _WIDTH * len(found.lengths) + 16, _TOP + _HEIGHT * len(found.depths) + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f"<title>{_escaped(title)}</title>",
        f'<text x="12" y="20" font-size="14">{_escaped(title)}</text>',
        f'<text x="12" y="{_TOP - 8}">depth</text>',
    ]
    for row, depth in enumerate(found.depths):
        y = _TOP + _HEIGHT * row
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 23}" text-anchor="end">{100 * depth:.0f} %</text>')
        for column, share in enumerate(found.right[row]):
            x = _LEFT + _WIDTH * column
            ink = "#ffffff" if share > 0.5 else "#303030"
            parts.append(f'<rect x="{x}" y="{y}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="{_colour(share)}"/>')
            parts.append(
                f'<text x="{x + _WIDTH // 2}" y="{y + 22}" text-anchor="middle" fill="{ink}">{100 * share:.0f}</text>'
            )
    bottom = _TOP + _HEIGHT * len(found.depths)
    for column, length in enumerate(found.lengths):
        x = _LEFT + _WIDTH * column + _WIDTH // 2
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{_short(length)}</text>')
    words = f"tokens; % right of {found.trials}, chance {found.chance:.3g}"
    parts += [f'<text x="{_LEFT}" y="{bottom + 40}">{words}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def _block(share: float) -> str:
    return _BLOCKS[round(share * (len(_BLOCKS) - 1))]


def _short(length: int) -> str:
    """A power of two as 16k or 1M, others in full."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def _colour(share: float) -> str:
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in zip(_NONE, _ALL, strict=True))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
