"""From YAML and overrides to a recipe, hostile YAML included, and back to YAML."""

import json
import os
from pathlib import Path

import pytest
import yaml

from infctx.errors import RecipeError
from infctx.recipe.load import MAX_RECIPE_BYTES, load_recipe, recipe_differences, recipe_json_schema, write_recipe
from infctx.recipe.run_section import WandbSection

MINIMAL = """\
model: {path: m.pth}
data: {path: docs.jsonl}
optimizer:
  lr: 1e-5
run:
  folder: runs/x
  steps: 10
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def complaint(path: Path, text: str | bytes | None = None, overrides: tuple[str, ...] = ()) -> str:
    """The message a recipe is refused with, without the folder."""
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}{os.sep}", "")


def test_minimal(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.optimizer.lr == 1e-5
    assert recipe.run.folder == "runs/x"
    assert load_recipe(str(recipe_file)) == recipe


@pytest.mark.parametrize(("text", "lr"), [("1e-5", 1e-5), ("2.0e-5", 2e-5), ("1", 1.0), (".5", 0.5), ("'3e-4'", 3e-4)])
def test_numbers(recipe_file: Path, text: str, lr: float) -> None:
    recipe_file.write_text(MINIMAL.replace("1e-5", text))
    assert load_recipe(recipe_file).optimizer.lr == lr
    assert load_recipe(recipe_file, [f"optimizer.lr={text}"]).optimizer.lr == lr


def test_empty_section_is_no_keys(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL + "kernel:\nadapter: # all defaults\n")
    assert load_recipe(recipe_file).kernel.backend == "auto"


def test_byte_order_mark_and_windows_lines(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(recipe_file).run.steps == 10


@pytest.mark.parametrize(
    ("folder", "read"), [("2024-01-01", "2024-01-01"), ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("0x10", "0x10")]
)
def test_text_that_yaml_1_1_reads_as_something_else(recipe_file: Path, folder: str, read: str) -> None:
    recipe_file.write_text(MINIMAL.replace("runs/x", folder))
    assert load_recipe(recipe_file).run.folder == read


def test_leading_zero_is_not_octal(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL + "  seed: 010\n")
    assert load_recipe(recipe_file).run.seed == 10


# What is wrong, and where


def test_unknown_key_names_line_and_nearest(recipe_file: Path) -> None:
    message = complaint(recipe_file, MINIMAL + "bptt:\n  windw: 4\n")
    assert message == "recipe.yaml, line 9: bptt.windw: unknown key. Did you mean bptt.window?"


@pytest.mark.parametrize(
    ("extra", "meant"),
    [
        ("  lr: 1e-4\n", "optimizer.lr"),
        ("  validation: 0.1\n", "data.validation"),
        ("  warmup_step: 5\n", "optimizer.warmup_steps"),
        ("  accumulat: 5\n", "run.accumulate"),
        ("optimiser: {lr: 1}\n", "optimizer"),
        ("epochs: 3\n", "run.epochs"),
        ("lr: 1\n", "optimizer.lr"),
        ("window: 1\n", "bptt.window"),
    ],
)
def test_nearest_key_over_all_sections(recipe_file: Path, extra: str, meant: str) -> None:
    assert complaint(recipe_file, MINIMAL + extra).endswith(f"unknown key. Did you mean {meant}?")


def test_unknown_key_without_a_near_one_lists_what_there_is(recipe_file: Path) -> None:
    assert "bptt has chunk_tokens, window, activations, boundaries, thin_boundaries." in complaint(
        recipe_file, MINIMAL + "bptt: {zzz: 1}\n"
    )
    assert "A recipe has model, data, adapter" in complaint(recipe_file, MINIMAL + "zzz: 1\n")


def test_all_problems_at_once_in_the_order_of_the_file(recipe_file: Path) -> None:
    message = complaint(
        recipe_file,
        """\
model: {pth: m.pth}
data:
  path: [a, 1]
  template: chatt
bptt:
  window: 0
  chunk_tokens: "many"
optimizer: {lr: true, betas: [0.9]}
run:
  folder: runs/x
  steps: 1.5
""",
    )
    assert message.splitlines() == [
        "recipe.yaml, line 1: model.path: missing. "
        "Model file: an official .pth, or .safetensors as this project writes it.",
        "recipe.yaml, line 1: model.pth: unknown key. Did you mean model.path?",
        "recipe.yaml, line 3: data.path[1]: expected text, got 1.",
        "recipe.yaml, line 4: data.template: expected text, completion, "
        "instruct, question or chat or a section with keys of its own, got 'chatt'.",
        "recipe.yaml, line 6: bptt.window: expected a number of at least 1 or document, got 0.",
        "recipe.yaml, line 7: bptt.chunk_tokens: expected a whole number, got 'many'.",
        "recipe.yaml, line 8: optimizer.lr: expected a number, got true.",
        "recipe.yaml, line 8: optimizer.betas: expected more values, got [0.9]. "
        "Adam's averaging factors of the gradient and of its square, each in [0, 1).",
        "recipe.yaml, line 11: run.steps: expected a whole number, got 1.5.",
    ]


def test_missing_sections(recipe_file: Path) -> None:
    message = complaint(recipe_file, "")
    assert [line.split(".")[1] for line in message.splitlines()] == [
        "yaml: model: missing",
        "yaml: data: missing",
        "yaml: optimizer: missing",
        "yaml: run: missing",
    ]


def test_cross_checks_name_the_line_of_the_key(recipe_file: Path) -> None:
    text = MINIMAL + "adapter:\n  freeze: []\n  kind: lora\nbptt: {window: 2}\n"
    assert complaint(recipe_file, text).startswith("recipe.yaml, line 9: adapter.freeze: means nothing with")
    text = MINIMAL + "bptt:\n  window: document\n"
    message = complaint(recipe_file, text.replace("docs.jsonl", "docs.jsonl, mode: stream"))
    assert message.startswith("recipe.yaml, line 2: data.mode: stream and bptt.window document exclude each other")
    assert complaint(recipe_file, MINIMAL + "  epochs: 2\n").startswith("recipe.yaml, line 8: run.epochs: cannot stand")
    assert complaint(recipe_file, MINIMAL.replace("  steps: 10\n", "")).startswith(
        "recipe.yaml, line 5: run.steps: missing: a run needs exactly one of"
    )


def test_section_of_the_wrong_kind(recipe_file: Path) -> None:
    assert (
        complaint(recipe_file, MINIMAL + "bptt: 4\n")
        == "recipe.yaml, line 8: bptt: expected a section with keys of its own, got 4."
    )
    assert complaint(recipe_file, MINIMAL + "bptt: 4\n", ("bptt.window=3",)).endswith("got 4.")


def test_absent_and_unreadable_files(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none.yaml") == "none.yaml: no such recipe file."
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert "folder.yaml: expected a readable recipe file" in complaint(folder)


# Hostile YAML


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("model: {path: a}\nmodel: {path: b}\n", 2, "model: set twice, first in line 1"),
        ("run:\n  steps: 1\n  seed: 1\n  steps: 2\n", 4, "run.steps: set twice, first in line 2"),
        ("model: !!python/object/apply:os.system [exit]\n", 1, "tags (!name) are not used"),
        ("model:\n  path: !!str a\n", 2, "tags (!name) are not used"),
        ("model: &a [x]\nrun: *a\n", 1, "anchors (&name) and aliases (*name) are not used"),
        ("data:\n  path: *jsonl\n", 2, "must stand in quotes"),
        ("data:\n  path: *.jsonl\n", 2, "must stand in quotes"),
        ("data:\n  path: {stdlib}/*.py\n", 2, "must stand in quotes"),
        ("run: {steps: 1\n", 2, "expected a plain YAML recipe"),
        ("run:\n\tsteps: 1\n", 2, "expected a plain YAML recipe"),
        ("run: a: b\n", 1, "mapping values are not allowed"),
        ("? [a, b]\n: 1\n", 1, "expected a name before the colon"),
        ("- model\n", 1, "expected sections"),
        ("just words\n", 1, "expected sections"),
        ("---\nmodel: {}\n---\nmodel: {}\n", 3, "single document"),
        ("run:\n  folder: \x00\n", 2, "got '\\x00'"),
        ("run:\n  steps: " + "9" * 5000 + "\n", 2, "too many digits"),
        ("[" * 20_000, 1, "levels deep"),
        ("- " * 3_000, 1, "levels deep"),
        ("{a: " * 3_000, 1, "levels deep"),
    ],
)
def test_hostile_yaml_is_refused_with_its_line(recipe_file: Path, text: str, line: int, says: str) -> None:
    message = complaint(recipe_file, text)
    assert message.startswith(f"recipe.yaml, line {line}: ")
    assert says in message
    assert len(message.splitlines()) == 1


def test_alias_bomb_is_not_built(recipe_file: Path) -> None:
    levels = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert "anchors" in complaint(recipe_file, "\n".join(levels))


def test_merge_key_is_an_unknown_key(recipe_file: Path) -> None:
    assert "<<: unknown key" in complaint(recipe_file, MINIMAL + "<<: {seed: 1}\n")


def test_too_big_and_not_utf8(recipe_file: Path) -> None:
    assert "got a file of more than 1,000,000 bytes" in complaint(recipe_file, b"#" * (MAX_RECIPE_BYTES + 1))
    assert (
        complaint(recipe_file, b"run:\n  folder: \xff\n") == "recipe.yaml, line 2: expected UTF-8 text, got byte 0xff."
    )


def test_a_file_full_of_mistakes_is_told_briefly(recipe_file: Path) -> None:
    message = complaint(recipe_file, MINIMAL + "".join(f"unknown_{i}: 1\n" for i in range(5_000)))
    assert len(message.splitlines()) == 31
    assert message.endswith("recipe.yaml: 4970 more problems.")


@pytest.mark.parametrize("number", ["1e999", ".nan", ".inf", "-.inf", "1" + "0" * 400])
def test_numbers_that_are_none(recipe_file: Path, number: str) -> None:
    assert "line 4: optimizer.lr: expected a" in complaint(recipe_file, MINIMAL.replace("1e-5", number))


# Overrides


def test_overrides(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "optimizer.lr=2e-4",
            "bptt.window=16",
            "optimizer.clip=null",
            "optimizer.betas=[0.8, 9e-1]",
            "adapter.kind=lora",
            "data.exclude=['*.bak', b]",
            "run.steps=5",
            "run.steps=7",
        ],
    )
    assert recipe.optimizer.lr == 2e-4
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.optimizer.clip is None
    assert recipe.bptt.window == 16
    assert recipe.adapter.kind == "lora"
    assert recipe.data.exclude == ["*.bak", "b"]
    assert recipe.run.steps == 7, "the later one wins"


@pytest.mark.parametrize(
    "text", ["{stdlib}/*.py", "*.jsonl", "a#b", "a: b", "C:\\docs\\*.txt", "a=b", "!x", "&y", "- z", "| w", "'quoted'"]
)
def test_text_overrides_need_no_yaml_quotes(recipe_file: Path, text: str) -> None:
    assert load_recipe(recipe_file, [f"data.path={text}"]).data.path == text.strip("'")


@pytest.mark.parametrize("in_file", ["", "wandb: {project: books}", "wandb:"])
def test_a_key_of_an_inner_section(recipe_file: Path, in_file: str) -> None:
    recipe_file.write_text(MINIMAL + f"  {in_file}\n")
    recipe = load_recipe(recipe_file, ["run.loggers=[wandb]", "run.wandb.offline=true", "run.wandb.name=a"])
    assert recipe.run.wandb.offline
    assert recipe.run.wandb.name == "a"
    assert recipe.run.wandb.project == ("books" if "books" in in_file else WandbSection().project)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lr", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("", "expected section.key=value"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key. Did you mean optimizer.lr?"),
        ("run.lr=1", "run.lr: unknown key. Did you mean optimizer.lr?"),
        ("optimiser.lr=1", "Did you mean optimizer.lr?"),
        ("optimizer.lr.x=1", "unknown key. Did you mean optimizer.lr?"),
        (
            "run.wandb.offlin=true",
            "run.wandb.offlin: unknown key. Expected run.wandb with one of project, entity, name",
        ),
        ("run.wandb.offline.x=true", "unknown key. Expected run.wandb with one of"),
        ("run.wandb.offline=maybe", "run.wandb.offline: expected true or false, got 'maybe'"),
        ("run=3", "run is a section"),
        ("run.steps=many", "run.steps: expected a whole number, got 'many'"),
        ("run.steps=true", "run.steps: expected a whole number, got true"),
        ("run.folder=", "run.folder: expected text, got nothing"),
        ("data.exclude=[a, b", "data.exclude: expected a plain value, or a list"),
        ("data.exclude=[*a]", "aliases"),
        ("run.steps=" + "9" * 5000, "run.steps: expected a plain value"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas[1]: expected a number below 1, got 1.5"),
    ],
)
def test_bad_overrides_are_named(recipe_file: Path, override: str, says: str) -> None:
    message = complaint(recipe_file, overrides=(override,))
    assert message.startswith(f"override {override}: ")
    assert says in message


def test_bad_overrides_and_bad_file_are_told_together(recipe_file: Path) -> None:
    message = complaint(recipe_file, MINIMAL + "  seeed: 1\n", ("nothing", "run.rows=0"))
    assert len(message.splitlines()) == 3


def test_an_override_mends_the_file(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL.replace("  lr: 1e-5\n", ""))
    assert "optimizer.lr: missing" in complaint(recipe_file)
    assert load_recipe(recipe_file, ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3


# Writing


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("bptt.window=4", "optimizer.schedule=cosine", "adapter.kind=lora", "data.validation=0.01"),
        ("optimizer.clip=null", "data.path={stdlib}/*.py", "data.exclude=['1e5', 'null', 'a: b', 'ö é', '*']"),
        ("model.path='1e5'", "run.folder='010'", "data.path=['true', '~', '2024-01-01']"),
    ],
)
def test_written_recipe_reads_back_resolved(recipe_file: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = load_recipe(recipe_file, overrides)
    written = tmp_path / "resolved.yaml"
    write_recipe(recipe, written)
    again = load_recipe(written)
    assert again == recipe.resolved()
    assert recipe_differences(again, recipe) == []
    plain = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert plain["data"]["path"] == again.data.path, "other YAML readers must see the same text"
    assert plain["optimizer"]["lr"] == again.optimizer.lr
    assert list(plain) == ["model", "data", "adapter", "bptt", "optimizer", "kernel", "run"]


def test_the_same_name_elsewhere_comes_before_one_alike_here(recipe_file: Path) -> None:
    message = complaint(recipe_file, MINIMAL.replace("lr: 1e-5", "lr: 1e-5\n  epochs: 3"))
    assert message == "recipe.yaml, line 5: optimizer.epochs: unknown key. Did you mean run.epochs?"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_writing_is_whole_or_not_at_all(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    recipe = load_recipe(recipe_file)
    target = tmp_path / "run" / "recipe.yaml"
    target.parent.mkdir()
    target.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="No space"):
        write_recipe(recipe, target)
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["recipe.yaml"]


def test_differences_name_key_and_both_values(recipe_file: Path) -> None:
    old = load_recipe(recipe_file, ["optimizer.lr=0.001"]).resolved()
    new = load_recipe(recipe_file, ["optimizer.lr=0.002", "optimizer.schedule=cosine", "data.validation=0.5"])
    assert recipe_differences(old, new) == [
        "data.validation: unset in the run folder, 0.5 now",
        "optimizer.lr: 0.001 in the run folder, 0.002 now",
        "optimizer.schedule: constant in the run folder, cosine now",
        "optimizer.lr_final: unset in the run folder, 0.0002 now",
    ]


def test_json_schema_is_plain_json_and_closed() -> None:
    schema = json.loads(json.dumps(recipe_json_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "data", "optimizer", "run"}
    assert schema["$defs"]["OptimizerSection"]["properties"]["lr"]["description"]
    # JsonValue stands for what is handed to another program as it is.
    sections = {name: section for name, section in schema["$defs"].items() if name != "JsonValue"}
    assert all(section["additionalProperties"] is False for section in sections.values())
