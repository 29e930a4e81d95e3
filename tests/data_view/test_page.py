"""The page: well-formed, self-contained, escaped, bounded, and written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.sources.records import Rejection
from infctx.data_view import DataFacts, DataToView, check_page, measure, write_page
from infctx.data_view.page import render_page
from infctx.errors import InfctxError

MakeView = Callable[..., DataToView]
ByteDocument = Callable[..., Any]

VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = "</script></pre><img src=x onerror=alert(1)>\"'&amp;<!--\0\x1b[31m\u202e\ufffe]]>"


class Page(HTMLParser):
    """Reads a page strictly: every element that opens closes, in its place."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.section = ""
        self.comments: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        name = self.section if "main" in self.open else "style" if "style" in self.open else "around"
        self.text[name] = self.text.get(name, "") + data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def pieces(self, kind: str) -> int:
        return sum(kind in (attributes.get("class") or "").split() for _, attributes in self.elements)


def render(view: DataToView, *, show: int = 9, title: str = "recipe.yaml", folder: Path = Path("/none")) -> str:
    return render_page(measure(view, show=show), title=title, folder=folder)


@pytest.fixture
def facts(make_view: MakeView) -> DataFacts:
    return measure(make_view(), show=2)


def test_every_part_is_there(make_view: MakeView, byte_document: ByteDocument) -> None:
    document = byte_document("abcdefgh", origin="rows.jsonl:1")
    weights = np.array([0, 0, 1, 1, 0.5, 0.5, 2, 2, 0], dtype=np.float32)
    rejected = [Rejection(file="rows.jsonl", line=line, reason="empty document") for line in (2, 3, 4, 5)]
    page = Page(
        render(
            make_view(
                documents=[replace(document, weights=weights), byte_document("longer text", set_index=1)],
                set_names=("plain", "chat"),
                loaded={"rejected": rejected, "dropped": {"cut": 4}},
                rows=9,
            )
        )
    )
    sections = [name for name, text in page.text.items() if text.strip()]
    assert sections == ["around", "style", "warnings", "sets", "lengths", "ledger", "documents", "first-step"]
    assert "recipe.yaml" in page.text["around"]
    assert "First: rows.jsonl:2, rows.jsonl:3, rows.jsonl:4." in page.text["warnings"]
    assert "plain" in page.text["sets"]
    assert "8 to 15" in page.text["lengths"]
    assert "tokens in 25 = trained 17 + masked 4 + dropped 4" in page.text["ledger"]
    assert "rows.jsonl:2, rows.jsonl:3, rows.jsonl:4, …" in page.text["ledger"]
    assert "abcdefghend" in page.text["documents"]
    assert "weight 0.5" in {attributes.get("title") for _, attributes in page.elements}
    assert "And 1 more row." in page.text["first-step"]
    # Two documents, each with a start in the first step.
    assert page.pieces("start") == 2 + 1
    # In the legend, in the document, twice in the first step.
    assert (page.pieces("lo"), page.pieces("hi")) == (1 + 1 + 2, 1 + 1 + 2)


def test_it_needs_nothing_else_and_runs_nothing(make_view: MakeView, byte_document: ByteDocument) -> None:
    page = Page(render(make_view(documents=[byte_document(EVIL)])))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "svg", "image"}
    names = {name for _, attributes in page.elements for name in attributes if not name.startswith("aria-")}
    assert names <= {
        "lang", "charset", "name", "content", "http-equiv", "id", "class", "style", "scope", "role", "dir", "title",
    }  # fmt: skip
    policies = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    style = page.text["style"]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_hostile_text_stays_text_wherever_it_stands(make_view: MakeView, byte_document: ByteDocument) -> None:
    lone = Document(
        tokens=np.array([0x81, 0xC0, 0x100, 0], dtype=np.uint16),
        weights=np.zeros(4, np.float32),
        origin=f"{EVIL}\udcff:1",
    )
    documents = [byte_document(EVIL, origin=f"{EVIL}:1"), replace(lone, set_index=1)]
    rejected = [Rejection(file=EVIL, line=1, reason=EVIL)] * 3
    view = make_view(documents=documents, set_names=(EVIL, "two"), loaded={"rejected": rejected, "dropped": {EVIL: 3}})
    raw = render(view, title=EVIL)
    assert "<img" not in raw
    assert "<!--" not in raw
    assert {c for c in raw if not c.isprintable()} == {"\n"}
    page = Page(raw)
    assert page.comments == []
    seen = "</script></pre><img src=x onerror=alert(1)>\"'&amp;<!--␀␛[31m<U+202E><U+FFFE>]]>"
    for section in ("around", "warnings", "sets", "lengths", "ledger", "documents"):
        assert seen in page.text[section], section
    # There every byte is a token of its own, with its id.
    assert "</script></pre><imgsrc=x" in re.sub(r"[\d\s]", "", page.text["first-step"])
    assert "\ufffd" in page.text["documents"]


def test_any_script_keeps_its_direction_and_its_characters(make_view: MakeView, byte_document: ByteDocument) -> None:
    text = "مرحبا بالعالم שלום 世界、こんにちは 안녕 👩\u200d👧 e\u0301"
    raw = render(make_view(documents=[byte_document(text, origin="قائمة.jsonl:1")]))
    page = Page(raw)
    assert text[1:] in page.text["documents"]
    boxes = [attributes for tag, attributes in page.elements if tag == "pre"]
    assert boxes[0]["dir"] == "auto"
    assert "<bdi>قائمة.jsonl:1</bdi>" in raw


def test_a_page_of_much_data_stays_below_a_megabyte(make_view: MakeView, byte_document: ByteDocument) -> None:
    hostile = "\u202e<&\"'>" * 400
    documents = [byte_document(f"{place}{hostile}", origin="f" * 300, set_index=place % 20) for place in range(80)]
    # A piece for every token.
    weights = (np.arange(len(documents[-1])) % 2 / 2).astype(np.float32)
    documents = [replace(one, weights=weights[: len(one)]) for one in documents]
    rejected = [Rejection(file="f" * 2000, line=place, reason=chr(0x4E00 + place) * 5000) for place in range(300)]
    names = tuple(f"set {'&' * 60}{place}" for place in range(20))
    page = render(make_view(documents=documents, set_names=names, loaded={"rejected": rejected}, rows=50), show=80)
    assert 100_000 < len(page.encode()) < 1_000_000
    assert "more documents are left out of this page" in Page(page).text["documents"]
    assert "And rows with 280 other reasons" in Page(page).text["ledger"]


def test_folders_of_the_machine_are_not_told(make_view: MakeView, byte_document: ByteDocument) -> None:
    documents = [
        byte_document("one", origin="/home/alice/project/rows/a.jsonl:1"),
        byte_document("one", origin="/home/alice/project/rows/b.jsonl:1"),
        byte_document("two", origin="/srv/alice/corpus/c.jsonl:3"),
        byte_document("more", origin="/srv/alice/corpus/deep/d.jsonl:3"),
    ]
    rejected = [Rejection(file="/srv/alice/corpus/c.jsonl", line=4, reason="empty document")]
    # As a set of files has its names, without lines.
    training = DocumentSet.of(documents)
    names = tuple(name.rpartition(":")[0] for name in training.files[0])
    view = make_view(documents=replace(training, files=(names,)), loaded={"rejected": rejected})
    raw = render(view, folder=Path("/home/alice/project"))
    assert "alice" not in raw
    assert "/srv" not in raw
    page = Page(raw)
    assert "rows/b.jsonl as rows/a.jsonl" in page.text["warnings"]
    assert "c.jsonl:4" in page.text["ledger"]
    assert "rows/a.jsonl" in page.text["documents"]
    assert "deep/d.jsonl" in page.text["documents"]


def test_it_is_written_and_not_over_another_file(facts: DataFacts, tmp_path: Path) -> None:
    path = tmp_path / "data view.html"
    write_page(facts, path, title="recipe.yaml", force=False)
    first = path.read_bytes()
    assert Page(first.decode("utf-8")).text["warnings"]
    with pytest.raises(InfctxError, match=r"data view.html: exists. Give another path, or --force"):
        write_page(facts, path, title="other.yaml", force=False)
    assert path.read_bytes() == first
    write_page(facts, path, title="other.yaml", force=True)
    assert b"other.yaml" in path.read_bytes()
    assert os.listdir(tmp_path) == ["data view.html"]


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    check_page(tmp_path / "new.html", force=False)
    with pytest.raises(InfctxError, match="exists"):
        check_page(tmp_path, force=True)
    with pytest.raises(InfctxError, match="does not exist"):
        check_page(tmp_path / "none" / "page.html", force=True)


def test_a_page_that_cannot_be_finished_leaves_nothing(
    facts: DataFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    write_text = Path.write_text

    def half(self: Path, text: str, encoding: str) -> int:
        write_text(self, text[:100], encoding)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_page(facts, path, title="recipe.yaml", force=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
