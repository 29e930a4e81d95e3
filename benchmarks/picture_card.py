"""The card that pictures are drawn on: light or dark as the reader's system is, the same on any page."""

from __future__ import annotations

from xml.sax.saxutils import escape

_STYLE = """
svg { color: #24292f; font-family: system-ui, sans-serif; font-size: 13px }
text { fill: currentColor }
.card { fill: #ffffff; stroke: #d0d7de }
.strong { font-weight: 600 }
.quiet { fill: #57606a }
.thin { stroke: #d0d7de }
.room { fill: #f3f6f9; stroke: #afb8c1 }
.way { fill: none; stroke: #57606a; stroke-width: 1.5 }
.head { fill: #57606a }
.back { fill: none; stroke: #c2410c; stroke-width: 1.8 }
.backhead { fill: #c2410c }
.backtext { fill: #b03a0a }
@media (prefers-color-scheme: dark) {
svg { color: #e6edf3 }
.card { fill: #161b22; stroke: #30363d }
.quiet { fill: #9aa4af }
.thin { stroke: #30363d }
.room { fill: #1f2630; stroke: #444c56 }
.way { stroke: #9aa4af }
.head { fill: #9aa4af }
.back { stroke: #ff9b5e }
.backhead { fill: #ff9b5e }
.backtext { fill: #ff9b5e }
}
"""


def card(inside: str, *, width: float, height: float, title: str) -> str:
    """A whole SVG.

    Args:
        inside: what is drawn on the card. width, height: in pixels. title: what it shows, for those who cannot see it.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8" class="card"/>\n'
        f"{inside}\n</svg>\n"
    )
