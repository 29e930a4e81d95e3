"""What no tensor tells of a Finch-C2, GoldFinch or GPTAlpha: a few switches of its training.

A safetensors file has them in its metadata; beside any other file they lie in a file of the same name with `SUFFIX`
behind it, which people may write themselves for a model they have fetched.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from infctx.checkpoint.atomic import write_file_atomically
from infctx.errors import CheckpointError, InfctxWarning
from infctx.model.config import FinchConfig

SUFFIX = ".switches.json"
# Key of a file's metadata: the same as JSON.
SWITCHES_KEY = "infctx.switches"

# The names of the published training code -> ours.
_NAMES = {
    "use_v2": "uses_value2",
    "use_one_minus_w": "weakens_keys",
    "rope": "uses_rope",
    "head_size": "head_size",
}


class DefaultedSwitchesWarning(InfctxWarning):
    """A model was read without being told its switches, or some of them."""


def switches_of(config: FinchConfig) -> dict[str, bool | int]:
    """The switches that a model of this kind has; {} for a Finch and an Eagle."""
    names = []
    if "6c2" in config.kinds:
        names += ["use_v2", "use_one_minus_w"]
    if config.n_attention:
        names.append("rope")
    if "gptalpha" in config.kinds and not config.n_recurrent:
        names.append("head_size")
    return {name: getattr(config, _NAMES[name]) for name in names}


def switches_as_metadata(config: FinchConfig) -> dict[str, str]:
    """What belongs into a safetensors file's metadata."""
    found = switches_of(config)
    return {SWITCHES_KEY: json.dumps(found)} if found else {}


def write_switches_beside(path: Path, config: FinchConfig) -> None:
    """Write the file beside a model's, where its format has no place for them; none is left of a model without any.

    Raises: OSError: the disk is full or fails.
    """
    if found := switches_of(config):
        text = json.dumps(found) + "\n"
        write_file_atomically(_beside(path), lambda unfinished: _write(unfinished, text))
    else:
        remove_switches(path)


def move_switches(old: Path, new: Path) -> None:
    """Let the file beside a model follow it to another name; none is left of the model that was there."""
    if _beside(old).is_file():
        os.replace(_beside(old), _beside(new))
    else:
        remove_switches(new)


def remove_switches(path: Path) -> None:
    """Remove the file beside a model, if there is one."""
    _beside(path).unlink(missing_ok=True)


class Switches(NamedTuple):
    """What was found. model: the file they are of. file: where. values: by the published names; {} = none are told."""

    model: Path
    file: str
    values: dict[str, Any]

    @property
    def head_size(self) -> int | None:
        """Of a GPTAlpha, where it is told.

        Raises: CheckpointError: it is no number above 0.
        """
        told = {name: value for name, value in self.values.items() if name == "head_size"}
        return _checked(told, {"head_size": 1}, file=self.file).get("head_size")


def find_switches(path: Path, metadata: Mapping[str, str]) -> Switches:
    """The switches that the file beside a model's tells, or the model's own metadata.

    Raises: CheckpointError: they are no JSON object.
    """
    beside = _beside(path)
    if beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
        return Switches(path, str(beside), _parsed(text, file=str(beside)))
    if SWITCHES_KEY in metadata:
        return Switches(path, str(path), _parsed(metadata[SWITCHES_KEY], file=str(path)))
    return Switches(path, str(path), {})


def with_switches(config: FinchConfig, switches: Switches) -> FinchConfig:
    """The config of a model with its switches; a warning that names those which nothing tells.

    Raises: CheckpointError: they are others than a model of this kind has.
    """
    expected = switches_of(config)
    found = _checked(switches.values, expected, file=switches.file)
    if untold := {name: value for name, value in expected.items() if name not in found}:
        warnings.warn(
            f"{switches.file}: the file does not say how the model was trained: taken as published, "
            f"{json.dumps(untold)}. If it is another, its answers are wrong: write {_beside(switches.model)} with what "
            "it is.",
            DefaultedSwitchesWarning,
            stacklevel=2,
        )
    # `read_config` has cut the heads by it.
    return replace(config, **{_NAMES[name]: value for name, value in found.items() if name != "head_size"})


def _parsed(text: str, *, file: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f'{file}: expected switches as a JSON object, as {{"rope": false}}.')
    return found


def _checked(found: dict[str, Any], expected: Mapping[str, bool | int], *, file: str) -> dict[str, Any]:
    for name, value in found.items():
        if name not in expected:
            theirs = f"the switches {', '.join(expected)}" if expected else "no switches"
            raise CheckpointError(f"{file}: {name!r}: this model has {theirs}. Take it out of the file.")
        wanted = type(expected[name])
        if type(value) is not wanted or (wanted is int and value < 1):
            kind = "true or false" if wanted is bool else "a number above 0"
            raise CheckpointError(f"{file}: {name}: expected {kind}, found {json.dumps(value)[:80]}.")
    return found


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
