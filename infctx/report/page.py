"""A report as one file: it opens offline, loads nothing, runs nothing, and all text in it is escaped."""

from __future__ import annotations

from pathlib import Path

import infctx
from infctx.checkpoint.atomic import write_file_atomically
from infctx.html_page import escaped, page_head
from infctx.report import sections
from infctx.report.facts import RunFacts, State, read_facts
from infctx.report.findings import figures, state_in_words
from infctx.report.style import STYLE

REPORT_FILE = "report.html"

_PARTS = (
    ("findings", "What came of it", sections.found),
    ("curves", "Curves", sections.curves),
    ("positions", "Long context", sections.positions),
    ("samples", "Samples", sections.samples),
    ("use", "How to use the result", sections.use),
    ("gradient", "Gradient", sections.gradient),
    ("tokens", "Tokens", sections.tokens),
    ("settings", "Settings", sections.settings),
    ("versions", "Versions", sections.versions),
)


def write_report(folder: Path, *, output: Path | None = None, state: State | None = None) -> Path:
    """Write the report of a run folder, whole or not at all.

    Args:
        output: None = report.html in the folder.
        state: of the run; None = as its files tell.
    Returns: The path of the page.
    Raises: see `read_facts`; OSError where it cannot be written.
    """
    page = render_report(read_facts(folder, state=state))
    path = folder / REPORT_FILE if output is None else output

    def write(unfinished: Path) -> None:
        unfinished.write_text(page, encoding="utf-8")

    write_file_atomically(path, write)
    return path


def render_report(facts: RunFacts) -> str:
    """The page as HTML."""
    name = facts.folder.resolve().name
    links = "".join(f'<li><a href="#{anchor}">{heading}</a></li>' for anchor, heading, _ in _PARTS)
    cards = "".join(
        f'<div><dt>{escaped(one.name)}</dt><dd class="value">{escaped(one.value)}</dd>'
        f'<dd class="quiet">{escaped(one.told)}</dd></div>\n'
        for one in figures(facts)
    )
    kind = facts.state.replace(" ", "-")
    return "".join(
        [
            page_head(f"Report of {name}", style=STYLE),
            '<a class="skip" href="#findings">Skip to the findings</a>\n',
            f"<header>\n<h1>Report of <bdi>{escaped(name)}</bdi></h1>\n"
            f'<p><span class="state {kind}">{facts.state}</span> {escaped(state_in_words(facts))}.</p>\n'
            f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>\n</header>\n<main>\n',
            f'<dl class="figures">\n{cards}</dl>\n' if cards else "",
            *(part(facts) for _, _, part in _PARTS),
            f"</main>\n<footer>Made by infctx {escaped(infctx.__version__)}.</footer>\n</body>\n</html>\n",
        ]
    )
