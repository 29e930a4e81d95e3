"""The same as a page to share: one file that needs nothing else, without scripts, with all text escaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import infctx
from infctx.checkpoint.atomic import write_file_atomically
from infctx.data_view.excerpts import Piece, ShownDocument
from infctx.data_view.facts import DataFacts
from infctx.data_view.first_step import ShownRow, ShownToken, StepFacts
from infctx.data_view.page_style import STYLE
from infctx.data_view.places import without_folders
from infctx.data_view.wording import (
    EPOCH_COLUMNS,
    LENGTH_COLUMNS,
    counted,
    document_in_words,
    epoch_cells,
    ledger_lines,
    length_cells,
    sketch,
    step_in_words,
)
from infctx.errors import InfctxError
from infctx.html_page import cells, escaped, page_head, section, table
from infctx.visible_text import visible

# Of all documents together; with the tables the page then stays below a megabyte.
DOCUMENT_BYTES = 600_000
PIECE_CHARACTERS = 20_000
SHOWN_REASONS = 20
SHOWN_WARNINGS = 100
REASON_CHARACTERS = 400

ShortPlace = Callable[[str], str]


def check_page(path: Path, *, force: bool) -> None:
    """Refuse a path that cannot be written, before any work is done.

    Raises: InfctxError for a file that exists without force, a folder, or a folder that does not exist.
    """
    if path.is_dir() or (path.exists() and not force):
        raise InfctxError(f"--html {path}: exists. Give another path, or --force to replace a file.")
    if not path.parent.is_dir():
        raise InfctxError(f"--html {path}: the folder {path.parent} does not exist. Create it first.")


def write_page(facts: DataFacts, path: Path, *, title: str, force: bool) -> None:
    """Write the page, whole or not at all.

    Args:
        title: what the data is of, as the name of a recipe.
    Raises: see `check_page`.
    """
    check_page(path, force=force)
    page = render_page(facts, title=title, folder=Path.cwd())

    def write(unfinished: Path) -> None:
        unfinished.write_text(page, encoding="utf-8")

    write_file_atomically(path, write)


def render_page(facts: DataFacts, *, title: str, folder: Path) -> str:
    """The page as HTML. folder: documents in it are named from there, and others without the folders they lie in."""
    short_place = without_folders(facts.files, folder=folder)
    tokens, held_out = facts.account["tokens"], facts.account["held_out"]
    summary = (
        f"{facts.account['documents']:,} documents, {tokens['trained'] + tokens['masked']:,} tokens "
        f"({visible(facts.tokenizer)}); held out {held_out['tokens']:,} tokens"
    )
    parts = [
        page_head(f"Data of {title}", style=STYLE),
        f"<header><h1>Data of <bdi>{escaped(title)}</bdi></h1>"
        f'<p class="quiet">{escaped(summary)}</p></header>\n<main>\n',
        _warnings(facts, short_place),
        _sets(facts),
        _lengths(facts),
        _ledger(facts, short_place),
        _documents(facts, short_place),
        _first_step(facts.first_step) if facts.first_step is not None else "",
        f"</main>\n<footer>Made by infctx {escaped(infctx.__version__)}.</footer>\n</body>\n</html>\n",
    ]
    return "".join(parts)


def _warnings(facts: DataFacts, short_place: ShortPlace) -> str:
    if not facts.warnings:
        return section("warnings", "Warnings", "<p>None.</p>\n")
    items = [
        f"<li><strong>{escaped(short_place(advice.seen))}</strong> {escaped(advice.where(short_place))} "
        f"{escaped(advice.to_do)}</li>\n"
        for advice in facts.warnings[:SHOWN_WARNINGS]
    ]
    if len(facts.warnings) > SHOWN_WARNINGS:
        items.append(f"<li>And {len(facts.warnings) - SHOWN_WARNINGS:,} more.</li>\n")
    return section("warnings", "Warnings", f'<ul class="warnings">\n{"".join(items)}</ul>\n')


def _sets(facts: DataFacts) -> str:
    return section("sets", "Sets", table(EPOCH_COLUMNS, (cells(epoch_cells(one)) for one in facts.sets)))


def _lengths(facts: DataFacts) -> str:
    lengths = facts.lengths
    most = max(bucket.num_documents for bucket in lengths.buckets)
    total = sum(bucket.num_tokens for bucket in lengths.buckets)
    rows = [
        f"<td>{bucket.first:,} to {bucket.last:,}</td>"
        f'<td class="bar">{_bar(bucket.num_documents / most)}</td>'
        f"<td>{bucket.num_documents:,}</td><td>{bucket.num_tokens / total:.1%}</td>"
        for bucket in lengths.buckets
    ]
    named = [("all", lengths)]
    if len(facts.sets) > 1:
        named += [(one.name, one.lengths) for one in facts.sets]
    quantiles = [
        f'{cells((name, *length_cells(of_name)))}<td class="words">{sketch(of_name, lengths)}</td>'
        for name, of_name in named
    ]
    histogram = table(("tokens", "", "documents", "of all tokens"), rows)
    described = table((*LENGTH_COLUMNS, ""), quantiles)
    return section("lengths", "Lengths in tokens", f"{histogram}<p></p>\n{described}")


def _bar(share: float) -> str:
    return f'<span style="width:{100 * share:.2f}%"></span>' if share else ""


def _ledger(facts: DataFacts, short_place: ShortPlace) -> str:
    tokens = facts.account["tokens"]
    shares = {kind: tokens[kind] / (tokens["in"] or 1) for kind in ("trained", "masked", "dropped")}
    words = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
    bars = "".join(f'<span class="{kind}" style="width:{100 * share:.3f}%"></span>' for kind, share in shares.items())
    keys = "".join(f'<span class="key {kind}"></span>{kind} {share:.1%} ' for kind, share in shares.items())
    lines = "".join(f"<p>{escaped(line)}</p>\n" for line in ledger_lines(facts.account))
    bar = f'<div class="parts" role="img" aria-label="{words}">{bars}</div>\n<p class="quiet">{keys}</p>\n'
    return section("ledger", "Ledger", bar + lines + (_rejected(facts, short_place) if facts.rejected else ""))


def _rejected(facts: DataFacts, short_place: ShortPlace) -> str:
    rows = []
    for group in facts.rejected[:SHOWN_REASONS]:
        places = ", ".join(short_place(place) for place in group.places)
        reason = _shortened(short_place(group.reason), REASON_CHARACTERS)
        more = ", …" if group.num_rows > len(group.places) else ""
        rows.append(
            f'<td class="words">{escaped(reason)}</td><td>{group.num_rows:,}</td>'
            f'<td class="words"><bdi>{escaped(_shortened(places, 3 * REASON_CHARACTERS) + more)}</bdi></td>'
        )
    shown = table(("rows left out because", "rows", "the first"), rows)
    if len(facts.rejected) > SHOWN_REASONS:
        shown += f"<p>And rows with {len(facts.rejected) - SHOWN_REASONS:,} other reasons.</p>\n"
    return shown


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


_LEGEND = (
    '<p class="legend"><span class="t1">trained</span><span class="lo">weight below 1</span>'
    '<span class="hi">weight above 1</span><span class="m0">masked: read, not trained</span>'
    '<span><span class="end">end</span> end of text</span></p>\n'
)


def _documents(facts: DataFacts, short_place: ShortPlace) -> str:
    documents = facts.documents
    if not documents:
        return ""
    articles: list[str] = []
    size = 0
    for document in documents:
        article = _document(document, short_place, is_set_named=len(facts.sets) > 1)
        size += len(article.encode())
        if size > DOCUMENT_BYTES and articles:
            articles.append(f"<p>{len(documents) - len(articles):,} more documents are left out of this page.</p>\n")
            break
        articles.append(article)
    return section("documents", "Documents", _LEGEND + "".join(articles))


def _document(document: ShownDocument, short_place: ShortPlace, *, is_set_named: bool) -> str:
    counts = document_in_words(document, is_set_named=is_set_named)
    pieces = []
    shown = 0
    left = PIECE_CHARACTERS
    for excerpt in document.excerpts:
        if excerpt.begin > shown:
            pieces.append(f'<span class="gap">… {excerpt.begin - shown:,} tokens …</span>')
        for piece in excerpt.pieces:
            pieces.append(_piece(piece, left))
            left = max(0, left - len(piece.text))
        shown = excerpt.end
    return (
        f'<h3><bdi>{escaped(short_place(document.origin))}</bdi> <span class="quiet">{escaped(counts)}</span></h3>\n'
        f'<pre dir="auto">{"".join(pieces)}</pre>\n'
    )


def _piece(piece: Piece, most_characters: int) -> str:
    if piece.is_end:
        return f'<span class="{_kind(piece.weight)} end"{_tooltip(piece.weight)}>end</span>'
    text = _shortened(piece.text, most_characters)
    return f'<span class="{_kind(piece.weight)}"{_tooltip(piece.weight)}>{escaped(text)}</span>'


def _kind(weight: float) -> str:
    if weight == 0:
        return "m0"
    if weight == 1:
        return "t1"
    return "lo" if weight < 1 else "hi"


def _tooltip(weight: float) -> str:
    return "" if weight in (0, 1) else f' title="weight {weight:g}"'


def _first_step(step: StepFacts) -> str:
    rows = "".join(_row(row) for row in step.rows)
    if step.num_rows > len(step.rows):
        rows += f"<p>And {counted(step.num_rows - len(step.rows), 'more row')}.</p>\n"
    explanation = (
        '<p class="quiet">The first tokens of each row with their ids. A document, and a fresh state, starts at '
        '<span class="start">a bar</span>; colours are those of the targets.</p>\n'
    )
    return section("first-step", "First step", f"<p>{escaped(step_in_words(step))}</p>\n{explanation}{rows}")


def _row(row: ShownRow) -> str:
    name = f"row {row.row}" if row.group == 0 else f"row {row.row} of group {row.group}"
    more = "…" if row.num_tokens > len(row.tokens) else ""
    counts = f"{counted(row.num_tokens, 'token')}, {counted(row.num_starts, 'start')}"
    return (
        f'<h3>{name} <span class="quiet">{counts}</span></h3>\n'
        f'<pre class="tokens">{"".join(_token(token) for token in row.tokens)}{more}</pre>\n'
    )


def _token(token: ShownToken) -> str:
    start = " start" if token.is_start else ""
    inner = '<span class="end">end</span>' if token.is_end else escaped(token.text)
    shown = f'<bdi class="{_kind(token.weight)}"{_tooltip(token.weight)}>{inner}</bdi>'
    return f'<span class="token{start}">{shown}<small>{token.id}</small></span>'
