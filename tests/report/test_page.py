"""The page from a run folder: what it says, of runs in every state, with hostile text, and what it does without."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from infctx.cli import main
from infctx.errors import CheckpointError
from infctx.recipe.load import load_recipe
from infctx.report import read_facts, write_report
from infctx.report.findings import findings
from infctx.report.use import commands, gradient_in_words
from tests.report.conftest import EVIL, MakeRun

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element that opens closes, in its place."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sections: dict[str, str] = {}
        self._section = ""
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        assert not any(name.startswith("on") or name in ("src", "srcset") for name, _ in attrs)
        self.tags.add(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


def test_every_part_of_a_finished_run(make_run: MakeRun) -> None:
    folder = make_run()
    page = page_of(folder)
    assert list(page.sections)[1:] == [
        "findings", "curves", "positions", "samples", "use", "gradient", "tokens", "settings", "versions",
    ]  # fmt: skip
    shown = page.sections
    assert "fell by 36.1%, from 3.600 nats per token at step 0 to 2.302 at step 1,000" in shown["findings"]
    assert "gains 0.270 nats per token (95 % interval 0.210 to 0.330) beyond position 4,096" in shown["findings"]
    assert "1 step changed no weight: its gradient is not finite." in shown["findings"]
    assert "1 point lies above the plot, up to 44.87." in shown["curves"]
    assert "Training loss of each set" in shown["curves"]
    assert (
        "Measured on 12 of 40 held-out documents, 180,000 of their 900,000 tokens, long ones cut" in shown["positions"]
    )
    assert "32K to 64K" in shown["positions"]
    assert "Then white space: 60 characters." in shown["samples"]
    assert "Exact across 4 chunks of 4,096 tokens, 16,384 tokens together" in shown["gradient"]
    assert "The longest step of this run had 4 chunks." in shown["gradient"]
    assert "trained 15,000,000 (75.0%)" in shown["tokens"]
    assert "The run read 16,384,000 tokens, 0.86 times what is there." in shown["tokens"]
    assert "cut at max_tokens" in shown["tokens"]
    assert re.search(r"adapter\.rank|optimizer\.lr", shown["settings"])
    assert "optimizer.eps" not in shown["settings"].split("All of recipe.yaml")[0]
    assert "Finch (RWKV-6), 24 layers" in shown["versions"]
    assert "2.13.0" in shown["versions"]
    assert f"--output '{folder}.pth'".replace("'s", "'\"'\"'s") in shown["use"]
    assert sorted(os.listdir(folder)) == [
        "adapter", "checkpoints", "ledger.json", "metrics.jsonl", "recipe.yaml", "report", "report.html", "result.json",
    ]  # fmt: skip


def test_hostile_text_stays_text(make_run: MakeRun) -> None:
    page = page_of(make_run(EVIL.replace("/", "_")))
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert "<img" not in page.raw
    assert "<!--" not in page.raw
    assert EVIL in page.sections["samples"]
    assert "<chats>" in page.sections["curves"]
    assert "default-src 'none'" in page.raw
    assert "url(" not in page.raw
    assert "@import" not in page.raw


def test_commands_are_quoted_and_mean_the_run(make_run: MakeRun) -> None:
    folder = make_run('it\'s; $(touch x) `y` "z"')
    facts = read_facts(folder)
    told = dict(commands(facts))
    for purpose, command in told.items():
        if "Python" in purpose:
            compile(command, "report", "exec")
            assert repr(f"{folder}/adapter") in command
            continue
        words = shlex.split(command)
        assert words[0] == "infctx"
        assert str(folder) in words or str(folder / "recipe.yaml") in words, words
    generate = shlex.split(told["Continue a text:"])
    assert generate[3:] == ["--prompt", "Chapter 0. </script></pre><img src=x one"]
    assert shlex.split(told["Measure it by position and against a reset state:"]) == ["infctx", "eval", str(folder)]


@pytest.mark.parametrize(
    ("holder", "is_finished", "state", "told"),
    [
        ("", True, "finished", "all 500 steps done"),
        ("", False, "stopped", "at step 500 of 1,000; the same infctx train command continues it"),
        (f"pid {os.getpid()} host {socket.gethostname()}", False, "under way", "step 500 of 1,000 when this page"),
        ("pid 1 host elsewhere", False, "under way", "step 500 of 1,000 when this page"),
        (f"pid 999999999 host {socket.gethostname()}", False, "stopped", "at step 500 of 1,000"),
        ("half a li", False, "stopped", "at step 500 of 1,000"),
    ],
    # Processes of one test run have to agree on the names of tests.
    ids=["finished", "left", "alive", "elsewhere", "dead", "damaged"],
)
def test_the_state_of_a_run(make_run: MakeRun, holder: str, is_finished: bool, state: str, told: str) -> None:
    folder = make_run(steps=500, is_finished=is_finished)
    (folder / ".lock").write_text(holder)
    assert read_facts(folder).state == state
    page = page_of(folder)
    assert f"{state} {told}" in re.sub(r"\s+", " ", page.sections[""])
    has_after = "State carried against" in page.sections["positions"]
    assert has_after == is_finished
    assert ("measured at its end" in page.sections["positions"]) != is_finished


def test_a_folder_with_nothing_but_a_recipe(make_run: MakeRun) -> None:
    folder = make_run(with_measured=False, is_finished=False)
    for name in ("metrics.jsonl", "ledger.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints")
    page = page_of(folder)
    assert "No step has been done yet." in page.sections["curves"]
    assert "ledger.json is missing" in page.sections["tokens"]
    assert "no checkpoint" in page.sections["use"]


def test_damaged_measurements_are_left_out(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "report" / "before.json").write_text('{"schema": 1, "car')
    (folder / "report" / "after.json").write_text('{"schema": 99}')
    page = page_of(folder)
    assert "Nothing was measured before the run." in page.sections["positions"]
    assert "Nothing was measured after the run." in page.sections["positions"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1001, "lo')
    assert read_facts(folder).last_step == 1000


def test_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a run folder, found no recipe.yaml"):
        read_facts(tmp_path)


def worded(make_run: MakeRun, *, after: dict[str, Any] | None = None, val: list[float | None] | None = None) -> str:
    """All findings of a run with this gain, and with these held-out losses at steps 0, 100, …"""
    folder = make_run()
    if after is not None:
        path = folder / "report" / "after.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **after}))
    if val is not None:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("val_loss", None)
        for place, loss in enumerate(val):
            lines[100 * place]["val_loss"] = loss
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "\n".join(f"{one.kind}: {one.text} {one.to_do}" for one in findings(read_facts(folder)))


def gain(value: float, interval: list[float] | None) -> dict[str, Any]:
    return {"gain": {"beyond": 64, "gain": value, "interval": interval, "documents": 3, "tokens": 900.0}}


def test_findings_say_what_the_numbers_say(make_run: MakeRun, tmp_path: Path) -> None:
    cases = [
        ({"after": gain(0.2, None)}, "good: The model uses the long context: it gains 0.200 nats per token beyond"),
        ({"after": gain(0.2, None)}, "nobody knows how sure"),
        ({"after": gain(0.02, [-0.01, 0.05])}, "cannot be told from nothing"),
        ({"after": gain(-0.2, [-0.3, -0.1])}, "bad: The model does worse with its state carried: it loses 0.200 nats"),
        ({"val": [2.0, 2.5]}, "bad: The held-out loss rose by 25.0%"),
        ({"val": [2.0, 1.5, 1.8]}, "bad: It was lowest at step 100, with 1.500, and has risen since."),
        ({"val": [2.0, 1.5, None, 1.501]}, "good: The held-out loss fell"),
        ({"val": [None]}, "No documents were held out"),
    ]
    for number, (changes, expected) in enumerate(cases):
        text = worded(lambda number=number, **keys: make_run(f"run {number}", **keys), **changes)
        assert expected in text, text
    assert "has risen since" not in worded(lambda **keys: make_run("flat", **keys), val=[2.0, 1.5, 1.501])


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("document", "Exact: the gradient of every step crosses all chunks"),
        (1, "Truncated at every border between chunks of 4,096 tokens. The state itself is carried"),
        (8, "Exact across 8 chunks of 4,096 tokens, 32,768 tokens together, and truncated between such windows."),
    ],
)
def test_the_gradient_in_words(make_run: MakeRun, window: int | str, expected: str) -> None:
    folder = make_run(sections={"bptt": {"window": window}})
    assert gradient_in_words(load_recipe(folder / "recipe.yaml"))[0].startswith(expected)


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_command(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(is_finished=False)
    assert run_cli("report", folder, "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"path": str(folder / "report.html"), "state": "stopped", "steps": 1000}
    assert "the run is stopped, at step 1,000" in told.err
    elsewhere = tmp_path / "page.html"
    assert run_cli("report", folder, "--output", elsewhere) == 0
    first = elsewhere.read_bytes()
    assert first == (folder / "report.html").read_bytes()
    for wrong, word in ((elsewhere, "exists"), (tmp_path, "exists"), (tmp_path / "no" / "page.html", "does not exist")):
        capsys.readouterr()
        assert run_cli("report", folder, "--output", wrong) == 2
        assert word in capsys.readouterr().err
    assert run_cli("report", folder, "--output", elsewhere, "--force") == 0
    assert run_cli("report", tmp_path) == 2
