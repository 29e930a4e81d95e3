"""Every command there is has an example in its help, and the example is one that the command takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from infctx.cli import app


def commands_below(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield names, command
        return
    for name, one in below.items():
        yield from commands_below(one, (*names, name))


COMMANDS = dict(commands_below(typer.main.get_command(app)))


def test_all_of_them_are_looked_at() -> None:
    assert len(COMMANDS) >= 19
    assert {("train",), ("check",), ("doctor",), ("model", "info"), ("bench", "kernels")} <= COMMANDS.keys()


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_the_example_in_the_help_can_be_typed(names: tuple[str, ...]) -> None:
    command = COMMANDS[names]
    first, _, _ = (command.epilog or "").partition("\n\n")
    found = re.fullmatch(r"Example: infctx (.*)", " ".join(first.split()))
    assert found, f"{names} has no example"
    # What comes behind is the shell's.
    words = shlex.split(found[1].partition(" > ")[0].partition(" | ")[0])
    assert tuple(words[: len(names)]) == names
    # Parsed and checked as a command line would be; nothing is run.
    command.make_context(" ".join(names), words[len(names) :])


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_option_says_what_it_does(names: tuple[str, ...]) -> None:
    undescribed = [one.name for one in COMMANDS[names].params if not getattr(one, "help", None)]
    assert undescribed == []
    assert COMMANDS[names].help
