"""Configs of RWKV-infctx-trainer as recipes, with an account of every key: what it became, or why it did not.

Source: the trainer's own code at its last commits of 2024, trees RWKV-v4neo, RWKV-v5 and RWKV-v6.
"""

import difflib
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infctx.errors import RecipeError
from infctx.recipe.infctx_trainer.data import translate_data
from infctx.recipe.infctx_trainer.draft import Draft, Kind, Outcome, Part, printable, shown
from infctx.recipe.infctx_trainer.keys import PLAIN, TRANSLATED
from infctx.recipe.infctx_trainer.read import checked_config, flat_keys
from infctx.recipe.infctx_trainer.run import translate_model, translate_trainer
from infctx.recipe.load import MAX_RECIPE_BYTES, parse_recipe, read_foreign_yaml, recipe_text, write_recipe_text
from infctx.recipe.problems import MAX_PROBLEMS, keys_of
from infctx.recipe.schema import Recipe

_LINE_CHARACTERS = 118


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """A config as a recipe.

    Attributes:
        text: the recipe, with the account as comments.
        account: the same in lines for people.
        outcomes: of every key, in the order of the config.
        notes, assumed, to_fill_in: see `Draft`.
    """

    text: str
    account: list[str]
    outcomes: list[Outcome]
    notes: list[str]
    assumed: list[str]
    to_fill_in: dict[str, str]

    def of_kind(self, kind: Kind) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == kind]

    def to_json(self) -> dict[str, Any]:
        """The account, for programs."""
        return {
            "translated": [{"key": one.key, "value": one.value, "to": one.text} for one in self.of_kind("translated")],
            "without_counterpart": [
                {"key": one.key, "value": one.value, "reason": one.text} for one in self.of_kind("without_counterpart")
            ],
            "unknown": [{"key": one.key, "value": one.value, "reason": one.text} for one in self.of_kind("unknown")],
            "no_effect": [{"key": one.key, "value": one.value} for one in self.of_kind("no_effect")],
            "assumed": self.assumed,
            "to_fill_in": self.to_fill_in,
            "notes": self.notes,
        }


def translate_config(path: str | os.PathLike[str]) -> Translation:
    """Translate a config, or a datapack, and check that the outcome is a recipe.

    Raises: RecipeError for what is neither, and for values that no recipe can hold.
    """
    path = Path(path)
    config = checked_config(read_foreign_yaml(path), path)
    stem = re.sub(r"[^\w.-]", "_", path.stem) or "config"
    draft = Draft(dict(flat_keys(config)))
    if "dataset" in config:
        _translate_datapack(draft, len(config["dataset"]), stem)
    else:
        translate_trainer(Part(draft, "trainer."), stem=stem)
        translate_model(Part(draft, "model."))
        translate_data(Part(draft, "data."))
    _seed(draft)
    _settle_the_rest(draft)
    outcomes = [draft.outcomes[key] for key in draft.keys]
    account = list(_account(draft, outcomes))
    header = [
        f"Translated from {printable(path.name)}, a config of RWKV-infctx-trainer, by infctx recipe-from-infctx.",
        "Relative paths are as they were: there they began at the trainer's own folder, here where infctx is started.",
    ]
    comments = [line for paragraph in [*header, *account] for line in _comment(paragraph)]
    text = "\n".join([*comments, recipe_text(_short(draft))])
    if len(text.encode("utf-8", "replace")) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: its {len(outcomes):,} keys are more than a recipe can hold.")
    try:
        parse_recipe(text, name="recipe")
    except RecipeError as error:
        problems = re.sub(r"^recipe(, line \d+)?: ", "- ", str(error), flags=re.MULTILINE)
        raise RecipeError(f"{path}: some of its values have no place in a recipe:\n{problems}") from None
    return Translation(
        text=text,
        account=account,
        outcomes=outcomes,
        notes=draft.notes,
        assumed=draft.assumed,
        to_fill_in=draft.to_fill_in,
    )


def write_translation(translation: Translation, output: Path, *, config: Path, force: bool) -> None:
    """Write the recipe, whole or not at all.

    Raises: RecipeError where something is there already and `force` does not say to replace it, or where the folder is
        missing.
    """
    if output.is_dir():
        raise RecipeError(f"{output}: expected the name of a file to write, got a folder.")
    if output.exists() and output.samefile(config):
        raise RecipeError(f"{output}: this is the config itself. Give the recipe another name.")
    if output.exists() and not force:
        raise RecipeError(f"{output}: exists already. Give another name, or replace it with --force.")
    if not output.parent.is_dir():
        raise RecipeError(f"{output}: there is no folder {output.parent}. Make it first.")
    write_recipe_text(translation.text, output)


# Translating


def _translate_datapack(draft: Draft, num_sets: int, stem: str) -> None:
    draft.fill_in("model.path", "FILL-IN.pth", "the model to start from")
    draft.fill_in("optimizer.lr", 1.0e-5, "the learning rate")
    draft.fill_in("run.epochs", 1, "how long the run is, in epochs or steps")
    draft.assume("A datapack says nothing of a run", {"run.folder": f"runs/{stem}"})
    pack = Part(draft, "datapack.")
    mixing = pack.get("mixing_mode")
    if mixing == "shuffle":
        pack.to("mixing_mode", {"data.order": "random"})
    elif mixing == "concat":
        pack.to("mixing_mode", {}, text="data.sets")
        draft.note("With mixing_mode concat one set was trained after the other; here they are dealt side by side.")
    else:
        pack.without("mixing_mode", "That trainer had shuffle and concat only; here sets are dealt by tokens.")
    taken: set[str] = set()
    for number in range(num_sets):
        one_set: dict[str, object] = {}
        own = Part(draft, f"dataset[{number}].")
        label = str(own.get("name") or own.get("dataset_name") or f"dataset_{number}")
        while label in taken:
            label += f"_{number}"
        taken.add(label)
        one = Part(draft, f"dataset[{number}].", "default.", one_set=one_set, label=label)
        one.to("name" if own.has("name") else "dataset_name", {"data.name": label}, text=f"data.sets: name {label}")
        translate_data(one, is_shuffled=mixing == "shuffle")
        draft.sets.append(one_set)
    for key in draft.keys:
        if key.startswith("default.") and all(
            f"dataset[{number}].{key.removeprefix('default.')}" in draft.keys for number in range(num_sets)
        ):
            draft.settle(key, "no_effect")


def _seed(draft: Draft) -> None:
    seed = draft.keys.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63:
        draft.put({"run.seed": seed})
        draft.settle("seed_everything", "translated", f"run.seed: {seed}")
    elif "seed_everything" in draft.keys and seed is not None:
        draft.settle(
            "seed_everything", "without_counterpart", "A run's seed stands in its recipe: run.seed, 0 if not said."
        )


def _settle_the_rest(draft: Draft) -> None:
    """Keys that are never translated, were not as they are, or are not that trainer's."""
    num_unknown = 0
    for key, value in draft.keys.items():
        if key in draft.outcomes:
            continue
        part, _, name = (
            key.rpartition(".")
            if not key.startswith("trainer.callbacks")
            else ("trainer", "", key.removeprefix("trainer."))
        )
        part = "data" if part == "default" or part.startswith("dataset[") else part
        name = re.sub(r"^callbacks\[\d+\]", "callbacks", name)
        known = PLAIN.get(part, {}).get(name)
        if known is not None and (value is None or any(value == default for default in known.defaults)):
            draft.settle(key, "no_effect")
        elif known is not None:
            draft.settle(key, "without_counterpart", known.reason)
        elif name in TRANSLATED.get(part, ()):
            reason = f"Not a value that can be translated: {shown(value)}."
            draft.settle(key, "no_effect" if value is None else "without_counterpart", reason)
        else:
            num_unknown += 1
            names = [*PLAIN.get(part, {}), *TRANSLATED.get(part, ())] if num_unknown <= MAX_PROBLEMS else []
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            draft.settle(key, "unknown", f"That trainer has no such key.{hint}")


# Writing


def _short(draft: Draft) -> dict[str, object]:
    """The sections in our order, without what is the default anyway; what all sets say alike stands above them."""
    if draft.sets:
        shared = dict(draft.sets[0])
        for one in draft.sets[1:]:
            shared = {key: value for key, value in shared.items() if key in one and one[key] == value}
        shared.pop("name", None)
        shared.pop("path", None)
        draft.put({f"data.{key}": value for key, value in shared.items()})
        order = ["name", *keys_of("data")]
        draft.put(
            {
                "data.sets": [
                    {
                        key: one[key]
                        for key in sorted(one, key=order.index)
                        if key not in shared and not _is_default(key, one)
                    }
                    for one in draft.sets
                ]
            }
        )
    sections: dict[str, object] = {}
    for section in Recipe.model_fields:
        said = draft.sections.get(section, {})
        kept = {key: said[key] for key in keys_of(section) if key in said and not _is_default(key, said, section)}
        if kept:
            sections[section] = kept
    return sections


def _is_default(key: str, said: Mapping[str, object], section: str = "data") -> bool:
    annotation: Any = Recipe.model_fields[section].annotation
    field = annotation.model_fields.get(key)
    if field is None or field.is_required():
        return False
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return bool(said[key] == default)


def _account(draft: Draft, outcomes: list[Outcome]) -> Iterator[str]:
    """Paragraphs: what is to be done, what to know, and what became of the keys that are not in the recipe."""
    yield from _listed("To fill in, for the config does not say it:", map(": ".join, draft.to_fill_in.items()))
    yield from _listed("To know:", draft.notes)
    yield from _listed("What that trainer does without being told, and the key that says it here:", draft.assumed)
    for kind, title in (("without_counterpart", "Without a counterpart:"), ("unknown", "Unknown:")):
        found = [one for one in outcomes if one.kind == kind]
        yield from _listed(title, (f"{printable(one.key)}: {shown(one.value)}. {one.text}" for one in found))
    counts = Counter(one.kind for one in outcomes)
    yield ""
    yield (
        f"Keys: {len(outcomes)}. Translated: {counts['translated']}. At that trainer's defaults, or without effect "
        f"there: {counts['no_effect']} (--json lists them). Without a counterpart: {counts['without_counterpart']}. "
        f"Unknown: {counts['unknown']}."
    )


def _listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    found = list(lines)
    if found:
        yield ""
        yield title
        yield from (f"- {line}" for line in found)


def _comment(paragraph: str) -> list[str]:
    if not paragraph:
        return ["#"]
    indent = "#   " if paragraph.startswith("- ") else "# "
    return textwrap.wrap(
        printable(paragraph),
        _LINE_CHARACTERS,
        initial_indent="# ",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
