"""A recipe in the making, and what became of each key of the config that it is made from."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infctx.recipe.data_section import SetSection
from infctx.recipe.fields import number_from_text

Kind = Literal["translated", "without_counterpart", "no_effect", "unknown"]
_RANK: dict[Kind, int] = {"unknown": 0, "no_effect": 1, "without_counterpart": 2, "translated": 3}

LARGEST_COUNT = 2_000_000_000
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a key. text: the recipe keys it was translated to, or the reason why it was not."""

    key: str
    value: object
    kind: Kind
    text: str = ""


class Draft:
    """A recipe in the making.

    Attributes:
        keys: the config's, by their dotted names, in the order of the file.
        sections: of the recipe; of `data.sets`, each set is a mapping in `sets`.
        notes: what to know beside the keys.
        assumed: what the other trainer does without being told, and what says it here.
        to_fill_in: recipe keys that the config gives no value for, and what belongs there.
    """

    def __init__(self, keys: Mapping[str, object]) -> None:
        self.keys = dict(keys)
        self.sections: dict[str, dict[str, object]] = {}
        self.sets: list[dict[str, object]] = []
        self.outcomes: dict[str, Outcome] = {}
        self.notes: list[str] = []
        self.assumed: list[str] = []
        self.to_fill_in: dict[str, str] = {}

    def settle(self, key: str, kind: Kind, text: str = "") -> None:
        """Say what became of a key; where the sets of a datapack differ, that one translates it counts most."""
        known = self.outcomes.get(key)
        if known is None or _RANK[kind] > _RANK[known.kind]:
            self.outcomes[key] = Outcome(key=key, value=self.keys[key], kind=kind, text=text)

    def put(self, ours: Mapping[str, object]) -> None:
        """Set keys of the recipe, as {"run.steps": 10}."""
        for key, value in ours.items():
            section, name = key.split(".")
            self.sections.setdefault(section, {})[name] = value

    def said(self, key: str) -> Any:
        """What the recipe says so far."""
        section, name = key.split(".")
        return self.sections.get(section, {}).get(name)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def assume(self, there: str, ours: Mapping[str, object]) -> None:
        """Set keys that stand for what the other trainer does without being told."""
        self.put(ours)
        self.remember_assumed(there, ours)

    def remember_assumed(self, there: str, ours: Mapping[str, object]) -> None:
        """Say what keys were set for, where nothing in the config says it."""
        line = f"{there}: {in_words(ours)}"
        if line not in self.assumed:
            self.assumed.append(line)

    def fill_in(self, key: str, value: object, why: str) -> None:
        """Set a key to a stand-in that the reader of the recipe has to replace."""
        self.put({key: value})
        self.to_fill_in[key] = why


class Part:
    """A part of a config, by the bare names of its keys: trainer, model, data, or one set of a datapack.

    Args:
        prefixes: of the part's keys; what an earlier one has hides what a later one has.
        one_set: takes the recipe keys that belong to a set, instead of the data section.
        label: of the set, in what is said of it.
    """

    def __init__(self, draft: Draft, *prefixes: str, one_set: dict[str, object] | None = None, label: str = "") -> None:
        self.draft = draft
        self.label = label
        self._one_set = one_set
        self._default_prefix = prefixes[-1]
        self._keys: dict[str, str] = {}
        for prefix in reversed(prefixes):
            self._keys |= {key.removeprefix(prefix): key for key in draft.keys if key.startswith(prefix)}

    def names(self, prefix: str = "") -> list[str]:
        """The names that are there."""
        return [name for name in self._keys if name.startswith(prefix)]

    def has(self, name: str) -> bool:
        """Whether it is there with a value."""
        return self.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where it is missing or null."""
        value = self.draft.keys[self._keys[name]] if name in self._keys else None
        return default if value is None else value

    def to(self, name: str, ours: Mapping[str, object], *, there: object = None, text: str | None = None) -> None:
        """Translate a key.

        Args:
            ours: recipe keys and their values.
            there: the other trainer's own value; where it is given and the key is missing, it is taken as assumed.
            text: what to say instead of `ours`.
        """
        refused = self.put(ours)
        key = self._keys.get(name)
        if key is None:
            if there is not None:
                self.draft.remember_assumed(f"{self._default_prefix}{name} is {shown(there)}", ours)
        elif refused:
            self.draft.settle(key, "without_counterpart", f"{refused} is one for all sets, and an earlier set decides.")
        else:
            self.draft.settle(key, "translated", in_words(ours) if text is None else text)

    def assume(self, there: str, ours: Mapping[str, object]) -> None:
        """See `Draft.assume`."""
        self.put(ours)
        self.draft.remember_assumed(there, ours)

    def fill_in_path(self, why: str) -> None:
        """Set a stand-in for the files."""
        name = re.sub(r"[^\w.-]", "_", self.label)
        self.put({"data.path": f"FILL-IN{name and '-' + name}.jsonl"})
        self.draft.to_fill_in["data.path" if self._one_set is None else f"data.sets, {self.label}, path"] = why

    def without(self, name: str, reason: str) -> None:
        """Say why a key is not translated, if it is there with a value."""
        if self.has(name):
            self.draft.settle(self._keys[name], "without_counterpart", reason)

    def no_effect(self, *names: str) -> None:
        """Say of keys that they changed nothing there either."""
        for name in names:
            if name in self._keys:
                self.draft.settle(self._keys[name], "no_effect")

    def put(self, ours: Mapping[str, object]) -> str | None:
        """Set keys of the recipe; gives the first that an earlier set of a datapack has said otherwise."""
        for key, value in ours.items():
            section, name = key.split(".")
            if self._one_set is not None and section == "data" and name in SetSection.model_fields:
                self._one_set[name] = value
            elif self._one_set is not None and self.draft.said(key) not in (None, value):
                return key
            else:
                self.draft.put({key: value})
        return None


# Values


def count(value: object, *, most: int = LARGEST_COUNT) -> int | None:
    """A whole number of at least 1, or None. YAML 1.1 readers hand `1e5` over as text."""
    number = real(value)
    return int(number) if number is not None and number.is_integer() and 1 <= number <= most else None


def real(value: object) -> float | None:
    """A finite number, or None."""
    value = number_from_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def plain(value: object) -> object:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def shown(value: object) -> str:
    """A value in one line, cut where it is long."""
    text = printable(json.dumps(plain(value), ensure_ascii=False))
    text = text[1:-1] if isinstance(value, str) and value else text
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def printable(text: str) -> str:
    """Text without anything that could end a comment or confuse a terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def in_words(ours: Mapping[str, object]) -> str:
    """Recipe keys with their values; without those that take more than a few words."""
    return ", ".join(key if isinstance(value, dict) else f"{key}: {shown(value)}" for key, value in ours.items())
