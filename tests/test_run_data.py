"""The data section of a recipe: where paths point, what a long preparation says, which rows are sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infctx import run_data
from infctx.recipe.data_section import DataSection, SourceSection
from infctx.recipe.load import load_recipe, recipe_differences, write_recipe
from infctx.run_data import data_from_anywhere, sampled_rows, set_spec


def section(**keys: Any) -> DataSection:
    return DataSection.model_validate(keys)


def test_paths_mean_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    located = data_from_anywhere(section(path=["a/*.txt", "/b.txt", "s3://c/*.jsonl", "{stdlib}/x.py", "~/d.txt"]))
    assert located.path == [
        f"{tmp_path}/a/*.txt",
        "/b.txt",
        "s3://c/*.jsonl",
        "{stdlib}/x.py",
        str(Path.home() / "d.txt"),
    ]
    sets = [{"path": "org/name", "format": "huggingface"}, {"name": "s", "path": "saved", "format": "huggingface"}]
    mixed = data_from_anywhere(section(sets=sets, validation="held.txt", tokenizer="t.json", cache="kept"))
    assert [one.path for one in mixed.sets or []] == ["org/name", f"{tmp_path}/saved"]
    assert mixed.validation == f"{tmp_path}/held.txt"
    assert (mixed.tokenizer, mixed.cache) == (f"{tmp_path}/t.json", f"{tmp_path}/kept")
    assert data_from_anywhere(section(path="a")).cache == "auto"


def test_a_set_takes_from_its_section_what_it_does_not_say() -> None:
    data = section(
        template="chat",
        train_turns="last",
        weights={"user": 0.5},
        on_bad_row="skip",
        max_tokens=50,
        on_long="split",
        sets=[
            {"path": "a/chats.jsonl"},
            {"path": "b/*.txt", "template": "text", "max_tokens": None, "on_long": "stop"},
            {"path": "c", "name": "other", "on_bad_row": "stop"},
        ],
    )
    (first, chats), (second, texts), (third, other) = data.sources()
    assert (first, second, third) == ("chats", "b", "other")
    assert (chats.template, chats.train_turns, chats.weights, chats.max_tokens) == ("chat", "last", {"user": 0.5}, 50)
    # A template of its own comes without the keys of the other one.
    assert (texts.template, texts.train_turns, texts.weights, texts.max_tokens) == ("text", "all", {}, None)
    assert (texts.on_bad_row, other.on_bad_row, other.template) == ("skip", "stop", "chat")


def test_a_long_preparation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run_data.time, "monotonic", lambda: now[0])
    said: list[str] = []
    preparation = run_data._Preparation(said.append)
    for seconds, done in ((0, 0), (2, 1), (6, 3), (7, 4), (12, 8), (13, 10)):
        now[0] = 100.0 + seconds
        preparation.tell(done * 10**9, 10 * 10**9)
    assert said == [
        "preparing data: 3.00 of 10.00 GB, 500 MB/s",
        "preparing data: 8.00 of 10.00 GB, 667 MB/s",
    ]


def test_rows_are_sampled_with_what_their_template_makes_of_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\nnot json\n{"body": "b"}\n')
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(500)))
    found = list(sampled_rows(section(path=str(tmp_path / "rows.jsonl"))))
    assert [(row.fields, row.rendered is None, row.problem is None) for row in found] == [
        ({"text": "a"}, False, True),
        ({"body": "b"}, True, False),
    ]
    assert len(list(sampled_rows(section(path=str(tmp_path / "many.jsonl"))))) == run_data.SAMPLED_ROWS


CHANGED: dict[str, Any] = {
    "path": "b.jsonl",
    "exclude": ["c"],
    "format": "csv",
    "split": "test",
    "subset": "de",
    "template": "instruct",
    "fields": {"output": "answer"},
    "roles": {"narrator": "system"},
    "train_turns": "last",
    "weights": {"assistant": 2.0},
    "weight_field": "quality",
    "weight": 0.5,
    "min_tokens": 3,
    "max_tokens": 9,
    "on_long": "cut",
    "on_bad_row": "skip",
    "on_empty_row": "skip",
    "on_duplicate": "skip",
    "rechunk_tokens": 7,
}


def test_every_key_of_a_source_reaches_the_reader() -> None:
    assert set(CHANGED) == set(SourceSection.model_fields)
    usual: dict[str, Any] = {"path": "a.jsonl", "max_tokens": 8}
    seen = {}
    for key, value in CHANGED.items():
        keys = usual | {key: value}
        if key in ("roles", "train_turns", "weights"):
            keys["template"] = "chat"
        elif key == "fields":
            keys["template"] = "instruct"
        seen[key] = set_spec(*section(**keys).sources()[0])
    plain = {name: set_spec(*section(**usual, template=name).sources()[0]) for name in ("text", "chat", "instruct")}
    for key, spec in seen.items():
        kind = {"roles": "chat", "train_turns": "chat", "weights": "chat", "fields": "instruct"}.get(key, "text")
        assert (spec, spec.template.key()) != (plain[kind], plain[kind].template.key()), f"data.{key} changes nothing"


def test_sets_survive_the_run_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: m.pth}\n"
        "data:\n"
        "  template: chat\n"
        "  max_tokens: 50\n"
        "  sets:\n"
        "    - {path: a.jsonl, share: 1}\n"
        "    - {path: b.txt, share: 2, template: {pieces: [{text: '{x}', train: true}]}, max_tokens: 9}\n"
        "optimizer: {lr: 1e-4}\n"
        "run: {folder: r, steps: 1}\n"
    )
    begun = load_recipe(recipe)
    write_recipe(begun, tmp_path / "written.yaml")
    again = load_recipe(tmp_path / "written.yaml")
    assert again.data.sources() == begun.data.sources()
    assert [one.max_tokens for _, one in again.data.sources()] == [50, 9]
    assert recipe_differences(again, begun) == []
