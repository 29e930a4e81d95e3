"""infctx doctor: its JSON, its exit code, and no colours where nobody sees them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest

KEYS = {"versions", "machine", "devices", "backends", "packages", "programs", "silently_wrong", "problems"}


def test_the_json_form(cli: Callable[..., Any]) -> None:
    told = cli("doctor", "--json").ok().json
    assert told.keys() == KEYS
    assert told["machine"].keys() >= {"cpu", "cores", "threads", "instructions", "memory_bytes", "free_memory_bytes"}
    assert told["machine"]["memory_bytes"] > told["machine"]["free_memory_bytes"] > 0
    assert told["backends"]["wkv6"].keys() == {"triton", "cpp", "torch", "reference"}
    assert told["backends"]["wkv6"][told["backends"]["chosen"]]["is_usable"]
    assert told["packages"]["peft"] == {
        "state": "usable",
        "version": importlib.metadata.version("peft"),
        "asked": ">=0.21",
        "extra": None,
        "is_core": True,
        "brings": "",
        "install": "pip install 'peft>=0.21'",
    }


def test_colours_are_for_terminals(cli: Callable[..., Any]) -> None:
    assert "\x1b" not in cli("doctor").ok().out


@pytest.mark.parametrize(("name", "code"), [("jsonlines", 4), ("gguf", 0)])
def test_the_exit_code_is_that_of_the_core(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    real = importlib.metadata.version

    def version(asked: str) -> str:
        if asked == name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return real(asked)

    monkeypatch.setattr(importlib.metadata, "version", version)
    ended = cli("doctor", "--json")
    assert ended.code == code
    assert ended.json["packages"][name]["state"] == "missing"
    assert (f"{name}: missing" in [problem["what"] for problem in ended.json["problems"]]) == bool(code)
