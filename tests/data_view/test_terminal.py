"""What reaches a terminal: the same facts in colour, in brackets, and in ASCII; never a control character."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from infctx.data.order import Portion
from infctx.data.sources.records import Rejection
from infctx.data_view import DataToView, measure, show_data

MakeView = Callable[..., DataToView]
ByteDocument = Callable[..., Any]

STYLES = re.compile(r"\x1b\[[\d;]*m")


class Terminal(io.StringIO):
    """A terminal that keeps what it is told."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


class Pipe(Terminal):
    """What somebody else reads."""

    def isatty(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def _a_usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def printed(view: DataToView, file: Terminal, *, show: int = 9) -> str:
    show_data(measure(view, show=show), file=file)
    return file.getvalue()


@pytest.fixture
def weighted(byte_document: ByteDocument) -> Any:
    """abcdefgh, of which cd is trained, ef at half and gh at double weight."""
    document = byte_document("abcdefgh", origin="rows.jsonl:1")
    return replace(document, weights=np.array([0, 0, 1, 1, 0.5, 0.5, 2, 2, 0], dtype=np.float32))


def test_weights_in_colour(make_view: MakeView, weighted: Any) -> None:
    text = printed(make_view(documents=[weighted]), Terminal())
    styles = [re.search(rf"(\x1b\[[\d;]*m){part}\x1b", text) for part in ("ab", "cd", "ef", "gh")]
    assert all(styles), text
    found = [match[1] for match in styles if match]
    assert len(set(found)) == 4
    assert found[1] == "\x1b[32m"
    assert "⟦" not in text
    # A boundary stands out from a sign of the text itself.
    assert re.search(r"\x1b\[[\d;]*7m⏹\x1b", text)


@pytest.mark.parametrize("kind", ["pipe", "no colour", "dumb"])
def test_weights_without_colour(make_view: MakeView, weighted: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "no colour":
        monkeypatch.setenv("NO_COLOR", "1")
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    text = STYLES.sub("", printed(make_view(documents=[weighted]), Pipe() if kind == "pipe" else Terminal()))
    assert "ab⟦cd⟧⟦0.5×: ef⟧⟦2×: gh⟧⏹" in text
    assert "▶a‹98› b‹99› ⟦c⟧‹100› ⟦d⟧‹101› ⟦0.5×: e⟧‹102›" in text


def test_brackets_of_the_text_do_not_pass_for_ours(make_view: MakeView, byte_document: ByteDocument) -> None:
    text = printed(make_view(documents=[byte_document("a⟧b⟦c⏹d▶", trained="c")]), Pipe())
    assert "a\ufffdb\ufffd⟦c⟧\ufffdd\ufffd⏹" in text


@pytest.mark.parametrize("kind", [Terminal, Pipe])
def test_no_control_character_reaches_a_terminal(
    make_view: MakeView, byte_document: ByteDocument, kind: type[Terminal]
) -> None:
    evil = "\x1b]0;title\a\x1b[2J\x9b31m\b\0\r\u202e[red]:smile:"
    documents = [
        replace(byte_document(f"{evil}{number}", origin=f"{evil}.jsonl:{number}"), set_index=number % 2)
        for number in range(4)
    ]
    rejected = [Rejection(file=evil, line=1, reason=f"bad {evil}")]
    view = make_view(documents=documents, set_names=(evil, "two"), loaded={"rejected": rejected}, held_out=documents)
    text = STYLES.sub("", printed(view, kind()))
    assert {c for c in text if not c.isprintable()} == {"\n"}
    # Nor does it mean anything to rich, in a table as little as in a line.
    documents_shown, rest = text.split("\nSets\n")
    tables, lines = rest.split("\nLedger\n")
    assert [part.count("[red]:smile:") for part in (documents_shown, tables)] == [8 + 2, 2]
    assert "1 row: bad ␛]0;title␇␛[2J<U+009B>31m␈␀␍<U+202E>[red]:smile: (" in lines


def test_ascii_terminals_get_signs_they_have(make_view: MakeView, weighted: Any) -> None:
    text = printed(make_view(documents=[weighted]), Pipe("ascii"))
    assert text.isascii(), {c for c in text if not c.isascii()}
    assert "ab{+cd+}{+0.5x: ef+}{+2x: gh+}<END>" in text
    assert "|>a(98)" in text


def test_the_text_is_not_broken_into_lines(make_view: MakeView, byte_document: ByteDocument) -> None:
    long = " ".join(["word"] * 60)
    rejected = [Rejection(file=f"/{'folder/' * 30}a.jsonl", line=5, reason="empty document")]
    text = printed(make_view(documents=[byte_document(long, trained=long[1:])], loaded={"rejected": rejected}), Pipe())
    assert long[1:] in text
    assert f"1 row: empty document (/{'folder/' * 30}a.jsonl:5)" in text


def test_every_part_is_there(make_view: MakeView, byte_document: ByteDocument) -> None:
    documents = [byte_document("x" * (20 + 10 * place), origin=f"rows.jsonl:{place}") for place in range(5)]
    documents.append(byte_document("a question", trained="question", set_index=1))
    text = printed(
        make_view(
            documents=documents,
            held_out=[byte_document("held")],
            set_names=("plain", "chat"),
            portions=[Portion(epochs=1), Portion(epochs=2)],
            loaded={"dropped": {"cut": 3, "long": 4}, "duplicates": (1, 2)},
            rows=9,
        ),
        Pipe(),
        show=1,
    )
    squeezed = re.sub(" +", " ", text)
    for words in (
        "rows.jsonl:0 set plain, 21 tokens, 20 trained",
        "plain 5 205 200 (97.6%) 5 (2.4%) 90.3% 1.00",
        "chat 1 11 8 (72.7%) 3 (27.3%) 9.7% 2.00",
        "8 to 15 ██████████ 1 5.1%",
        "32 to 63 ██████████████████████████████ 3 70.8%",
        "all 11 11 31 61 61 36.0 ▄▆█",
        "chat 11 11 11 11 11 11.0 █▁▁",
        "documents 6, rejected rows 0, duplicates 3",
        "tokens in 223 = trained 208 + masked 8 + dropped 7",
        "dropped 7 = cut 3 + long 4",
        "held out besides: 5 tokens of 1 document",
        "stream mode: 9 rows, 2 chunks of up to 16 tokens",
        "and 1 more row",
        "! The end of text is trained in none",
    ):
        assert words in squeezed, f"{words!r} is not in: {squeezed}"
    assert text.count("rows.jsonl") == 1


def test_of_one_sound_set_little_is_said(make_view: MakeView) -> None:
    text = printed(make_view(), Pipe())
    assert text.endswith("Warnings\nnone\n")
    # Nor is there much to say about the only set.
    assert "rows.jsonl:1  37 tokens, 36 trained\n" in text


def test_a_narrow_terminal_loses_nothing(make_view: MakeView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert Console(file=Terminal()).width == 40
    text = STYLES.sub("", printed(make_view(set_names=("a-very-long-name-of-a-set",)), Terminal()))
    assert "444" in re.sub(r"\s", "", text)
    assert "…" not in text.split("Sets")[1].split("Ledger")[0]
