"""What our pages have in common: one file that needs nothing else, runs nothing, and shows all text as text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from infctx.visible_text import visible

BASE_STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1c2128; --quiet: #59626e; --line: #d5dae1; --panel: #f5f7f9; --bar: #2f9e57;
  --dropped: #b3261e; --warn-back: #fff4d6; --warn-line: #c98a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --text: #e3e7ec; --quiet: #9aa4b1; --line: #363d46; --panel: #1c2127; --bar: #46b870;
    --dropped: #ff8a80; --warn-back: #33290f; --warn-line: #d9a429;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; }
.quiet { color: var(--quiet); font-weight: normal; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: start; color: var(--quiet); padding-bottom: .3rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: end; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child, td.words { text-align: start; overflow-wrap: anywhere; }
.parts { display: flex; height: 1.1rem; margin: .6rem 0; border-radius: 3px; overflow: hidden; }
.trained { background: var(--bar); }
.masked { background: var(--quiet); }
.dropped { background: var(--dropped); }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin: 0 .4rem 0 1rem; }
.key:first-child { margin-inline-start: 0; }
.warnings { list-style: none; padding: 0; margin: 0; }
.warnings li { background: var(--warn-back); border-inline-start: 4px solid var(--warn-line); padding: .6rem .9rem;
  margin: .5rem 0; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem; margin: .3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; text-align: start;
  font: .9rem/1.6 ui-monospace, "Noto Sans Mono", "Noto Sans Mono CJK SC", monospace; }
footer { margin-top: 3rem; color: var(--quiet); font-size: .85rem; }
@media print { body { max-width: none; } .parts span, .key { print-color-adjust: exact; } }
"""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def page_head(title: str, *, style: str) -> str:
    """Everything up to the opened body; the page may load nothing and run nothing.

    Args:
        title: plain text. style: CSS that follows BASE_STYLE.
    """
    return _HEAD.format(title=escaped(title), style=BASE_STYLE + style)


def escaped(text: str) -> str:
    """Any text as HTML that shows it, in an element or an attribute."""
    return escape(visible(text), quote=True)


def section(name: str, heading: str, content: str) -> str:
    """A part of the page with its heading. content: HTML."""
    return f'<section id="{name}">\n<h2>{heading}</h2>\n{content}</section>\n'


def table(columns: Iterable[str], rows: Iterable[str], *, caption: str = "") -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        columns: plain text. rows: the cells of each as HTML, see `cells`. caption: plain text.
    """
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    told = f"<caption>{escaped(caption)}</caption>\n" if caption else ""
    return f'<div class="wide"><table>\n{told}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def cells(texts: Iterable[str]) -> str:
    """Cells of a row, of plain texts in any direction of writing."""
    return "".join(f"<td><bdi>{escaped(text)}</bdi></td>" for text in texts)
