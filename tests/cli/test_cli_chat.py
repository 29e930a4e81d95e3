"""infctx chat as a script of lines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Chat = Callable[..., Any]


@pytest.fixture
def chat(cli: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Chat:
    def run(*lines: str, source: Path | None = None, options: tuple[object, ...] = ()) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", source or models["pth"], "--seed", 3, "--max-tokens", 8, *options)

    return run


def turns(chat: Chat, *lines: str, **more: Any) -> list[tuple[str, str]]:
    more["options"] = (*more.get("options", ()), "--json")
    return [(turn["user"], turn["answer"]) for turn in chat(*lines, **more).ok().json["turns"]]


def test_a_script_of_lines_gives_the_same_talk(chat: Chat) -> None:
    first = chat("Hello", "And you?").ok()
    assert first.out == chat("Hello", "", "And you?", "/quit", "more").ok().out
    assert first.out != chat("Hello", "And you?", options=("--temperature", 3)).ok().out
    assert first.err.count("tokens/s") == 4
    found = chat("Hello", "And you?", options=("--json",)).ok()
    assert [turn["user"] for turn in found.json["turns"]] == ["Hello", "And you?"]
    # With --json the answers are shown on stderr until then.
    assert all(line in found.err for line in first.out.splitlines())


def test_lines_that_go_on(chat: Chat) -> None:
    assert turns(chat, "one \\", "two\\", "three")[0][0] == "one \ntwo\nthree"
    assert turns(chat, "one \\")[0][0] == "one "


def test_commands(chat: Chat, tmp_path: Path) -> None:
    plain = turns(chat, "a", "b")
    assert turns(chat, "a", "b", "c", "/undo") == plain
    assert [user for user, _ in turns(chat, "a", "b", "/again")] == ["a", "b"]
    assert turns(chat, "a", "/reset", "/again")[:1] == []
    cooler = turns(chat, "/set temperature=0", "/set max_tokens=3", "a")
    assert cooler == turns(chat, "/set temperature = 0", "/set max_tokens=3", "a") != plain[:1]
    ended = chat("/system Be brief.", "a", "/system", options=("--json",)).ok()
    assert ended.json["system"] == "Be brief."
    assert ended.err.count("System: Be brief.") == 2
    told = chat("/help").ok()
    for name in ("/undo", "/again", "/reset", "/system", "/set", "/save", "/load", "/quit"):
        assert name in told.err
    assert max(map(len, told.err.splitlines())) <= 80
    shown = chat("/set top_k=5", "/set").ok().err
    assert "top_k=5\n" in shown
    assert "max_tokens=8\n" in shown


def test_mistakes_are_told_and_the_talk_goes_on(chat: Chat, models: dict[str, Path], tmp_path: Path) -> None:
    lines = {
        "/nonsense": "expected one of /undo",
        "/undo": "no turn",
        "/set x=1": "expected one of temperature",
        "/set top_p=2": "top-p",
        "/set top_k=x": "expected a number",
        "/save": "expected a file",
        "/load none.state": "none.state",
        f"/save {tmp_path / 'x.state'}": "nothing to save",
        f"/save {models['pth']}": "no state",
        "/save none/x.state": "none",
        "\udcff": "surrogate",
    }
    ended = chat(*list(lines)[:7], *list(lines)[7:9], "a", *list(lines)[9:], "b", options=("--json",)).ok()
    for words in lines.values():
        assert words in ended.err, words
    assert [turn["user"] for turn in ended.json["turns"]] == ["a", "b"]


def test_save_and_load(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "talk.state"
    saved = turns(chat, "a", "b", f"/save {path}")
    assert turns(chat, "z", f"/load {path}") == saved
    assert turns(chat, options=("--state", path)) == saved
    assert [user for user, _ in turns(chat, "c", "/save " + str(path), options=("--state", path))] == ["a", "b", "c"]


def test_behind_a_document(cli: Any, chat: Chat, models: dict[str, Path], tmp_path: Path) -> None:
    state = tmp_path / "d.state"
    command = ["generate", models["pth"], "--prompt", "A document.\n\n", "--save-state", state, "--max-tokens", 0]
    cli(*command).ok()
    greedy: tuple[object, ...] = ("--temperature", 0)
    behind = turns(chat, "a", "b", options=("--state", state, *greedy))
    assert behind != turns(chat, "a", "b", options=greedy)
    # Forgetting the turns does not forget the document.
    assert behind == turns(chat, "x", "/reset", "a", "b", options=("--state", state, *greedy))


def test_a_run_is_asked_as_it_was_trained(cli: Any, chat: Chat, make_recipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(4)))
    cli("train", make_recipe(data={"path": str(data), "template": "question"}, run={"steps": 1})).ok()
    chat("a", source=tmp_path / "run", options=("--system", "x")).refused("no place")
    # Questions stand alone: with the most probable tokens, the same one has the same answer again.
    found = turns(chat, "a", "b", "a", source=tmp_path / "run", options=("--temperature", 0))
    assert found[0] == found[2]
    penalties = ["--presence-penalty", 0.3, "--frequency-penalty", 0.3]
    prompt = ["--prompt", "Question: a\n\nAnswer:", "--stop", "\\n\\n", "--temperature", 0, "--max-tokens", 8]
    alone = cli("generate", tmp_path / "run", *prompt, *penalties, "--json").ok()
    assert alone.json["text"].replace("\ufffd", "").strip() == found[0][1]


def test_interrupts(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stops an answer, and the talk goes on."""
    from infctx.generation.row import Row

    take, count = Row.take, [0]

    def interrupted(self: Row, logits: Any) -> str:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return take(self, logits)

    monkeypatch.setattr(Row, "take", interrupted)
    ended = chat("a", "b", options=("--json",)).ok()
    assert "Stopped." in ended.err
    assert [turn["user"] for turn in ended.json["turns"]] == ["a", "b"]


def test_a_model_of_infinities(chat: Chat, models: dict[str, Path], tmp_path: Path) -> None:
    import torch

    tensors = torch.load(models["pth"], weights_only=True)
    tensors["head.weight"].fill_(float("inf"))
    torch.save(tensors, tmp_path / "inf.pth")
    assert "not finite" in chat("a", source=tmp_path / "inf.pth").err
