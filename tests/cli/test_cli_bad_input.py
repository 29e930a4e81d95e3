"""Bad input gets a clear error and loses nothing: exit code 2, no traceback, the place named, the disk untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# What is wrong, and the words the message must hold. Sections of the recipe stand on lines 1 to 5.
RECIPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"optimizer": {"lrr": 1}}, ["recipe.yaml, line 4", "optimizer.lrr", "optimizer.lr?"]),
    "key of another section": ({"data": {"chunk_tokens": 8}}, ["line 2", "data.chunk_tokens", "bptt.chunk_tokens"]),
    "unknown section": ({"optimiser": {"lr": 1}}, ["line 6", "optimiser", "optimizer"]),
    "word for a number": ({"run": {"steps": "ten"}}, ["line 5", "run.steps", "ten"]),
    "fraction of a step": ({"run": {"steps": 1.5}}, ["run.steps", "1.5"]),
    "no rows": ({"run": {"rows": 0}}, ["run.rows", "0"]),
    "rate zero": ({"optimizer": {"lr": 0.0}}, ["optimizer.lr"]),
    "list for a number": ({"optimizer": {"lr": [1]}}, ["optimizer.lr"]),
    "text for a section": ({"run": {"steps": {"a": 1}}}, ["run.steps"]),
    "steps and epochs": ({"run": {"epochs": 2}}, ["run.epochs", "run.steps"]),
    "neither": ({"run": {"steps": None}}, ["run.epochs", "run.steps"]),
    "no learning rate": ({"optimizer": {"lr": None}}, ["optimizer.lr"]),
    "stream without an end": ({"data": {"mode": "stream"}, "bptt": {"window": "document"}}, ["bptt.window"]),
    "window of words": ({"bptt": {"window": "all"}}, ["bptt.window", "all", "document"]),
    "no model": ({"model": {"path": "/none/such.pth"}}, ["/none/such.pth"]),
    "folder as model": ({"model": {"path": "/"}}, ["/", "model.safetensors"]),
    "no data": ({"data": {"path": "/none/such.jsonl"}}, ["/none/such.jsonl"]),
    "glob of nothing": ({"data": {"path": "/none/*.jsonl"}}, ["/none/*.jsonl"]),
    "folder as data": ({"data": {"path": "/"}}, ["data.path", "folder"]),
    "no validation": ({"data": {"validation": "/none/held.jsonl"}}, ["/none/held.jsonl"]),
    "two validations": ({"data": {"validation": 0.1, "validation_tail": 0.1}}, ["data.validation_tail"]),
    "template": ({"data": {"template": "chta"}}, ["data.template", "chta", "text"]),
    "template that does not fit": ({"data": {"template": "completion"}}, ["rows.jsonl:1", "prompt"]),
    "tokenizer too big": ({"data": {"tokenizer": "world"}}, ["rows.jsonl:", "257", "world"]),
    "backend": ({"kernel": {"backend": "warp"}}, ["kernel.backend", "warp", "torch"]),
    "two devices": ({"run": {"devices": 2, "strategy": "single"}}, ["run.strategy", "2 devices", "ddp"]),
    "freeze nothing": ({"adapter": {"freeze": ["embeding.*"]}}, ["adapter.freeze", "embeding", "embedding"]),
    "freeze all": ({"adapter": {"freeze": ["*"]}}, ["adapter.freeze"]),
    "target": ({"adapter": {"kind": "lora", "targets": ["recptance"]}}, ["adapter.targets", "receptance"]),
    "train also": ({"adapter": {"kind": "lora", "train_also": ["*.larp_key"]}}, ["adapter.train_also", "lerp_key"]),
    "lora key": ({"adapter": {"rank": 3}}, ["adapter.rank", "adapter.kind"]),
    "file as run folder": ({"run": {"folder": __file__}}, ["run.folder", __file__]),
    "run folder below a file": ({"run": {"folder": f"{__file__}/run"}}, [__file__]),
    "somebody's folder": ({"run": {"folder": str(Path(__file__).parent)}}, ["run.folder", "not a run folder"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_the_tests_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", RECIPES)
def test_bad_recipe(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any, what: str) -> None:
    changes, words = RECIPES[what]
    recipe = make_recipe(**changes)
    before = snapshot(tmp_path)
    for command in ("check", "train"):
        cli(command, recipe, "--json").refused(*words)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr", "optimizer.lr?"]),
        ("lr=1", ["lr", "optimizer.lr"]),
        ("optimizer=1", ["optimizer", "optimizer.key=value"]),
        ("run.steps", ["run.steps", "section.key=value"]),
        ("run.steps=many", ["run.steps", "many"]),
        ("run.steps=99999999999999999999", ["run.steps"]),
        ("run.seed=-1", ["run.seed"]),
        ("optimizer.lr=nan", ["optimizer.lr"]),
        ("optimizer.lr=1e999", ["optimizer.lr"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("data.path=[unclosed", ["data.path"]),
        ("run.folder=", ["run.folder"]),
        ("=", ["section.key=value"]),
    ],
)
def test_bad_override(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any, override: str, words: list[str]
) -> None:
    recipe = make_recipe()
    before = snapshot(tmp_path)
    for command in ("check", "train", "data"):
        cli(command, recipe, override).refused(*words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["missing", "model"]),
        (b"just words", ["line 1"]),
        (b"- a\n- b\n", ["line 1"]),
        (b"model: {path: a\ndata: b", ["line"]),
        (b"model:\n\tpath: a", ["line 2"]),
        (b"model: {path: a}\nmodel: {path: b}\n", ["line 2", "twice"]),
        (b"model: !!python/object/apply:os.system [touch owned]", ["line 1"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (b"\x00\x01\x02", ["line 1"]),
        (b"a: " * 200, ["line 1"]),
        (None, ["no such recipe"]),
        ("folder", ["recipe"]),
    ],
)
def test_bad_recipe_file(
    cli: Any, tmp_path: Path, snapshot: Any, content: bytes | str | None, words: list[str]
) -> None:
    path = tmp_path / "r.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    before = snapshot(tmp_path)
    for command in ("check", "train", "data"):
        cli(command, path).refused("r.yaml", *words)
    assert snapshot(tmp_path) == before


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["bad.jsonl", "no rows"]),
        ("\n \n", ["bad.jsonl"]),
        (GOOD + '{"text": "cut', ["bad.jsonl:2", "JSON", "skip"]),
        (GOOD + GOOD + "words\n", ["bad.jsonl:3"]),
        (GOOD + "\n" + "[1]\n", ["bad.jsonl:3", "array"]),
        (GOOD + '{"txt": "a"}\n', ["bad.jsonl:2", "text", "txt"]),
        (GOOD + '{"text": 5}\n', ["bad.jsonl:2", "text"]),
        (GOOD + '{"text": ""}\n', ["bad.jsonl:2", "empty"]),
        (GOOD + '{"text": null}\n', ["bad.jsonl:2"]),
        (GOOD + '{"text": "\\ud800"}\n', ["bad.jsonl:2", "surrogate"]),
        (GOOD.encode() + b'{"text": "\xff"}\n', ["bad.jsonl:2", "UTF-8"]),
        (GOOD + "[" * 100_000 + "\n", ["bad.jsonl:2"]),
    ],
)
def test_bad_rows(
    cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any, content: str | bytes, words: list[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe = make_recipe(data={"path": str(path)})
    before = snapshot(tmp_path)
    for command in ("check", "train", "data"):
        cli(command, recipe).refused(*words)
    assert snapshot(tmp_path) == before


def test_bad_rows_are_skipped_and_counted(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(GOOD + "words\n\n" + GOOD + '{"txt": 1}\n' + GOOD + '{"text": ""}')
    recipe = make_recipe(data={"path": str(path), "on_bad_row": "skip"})
    account = cli("data", recipe, "--json").ok().json
    assert account["documents"] == 3
    assert [(row["file"], row["line"]) for row in account["rejected_rows"]] == [(str(path), n) for n in (2, 5, 7)]
    assert all(row["reason"] for row in account["rejected_rows"])
    assert "bad.jsonl:5" in cli("data", recipe).ok().out.replace("\n", "")
    assert "3 rows skipped" in cli("train", recipe).ok().err

    path.write_text("words\n[]\n")
    cli("train", recipe, f"run.folder={tmp_path / 'none'}").refused("bad.jsonl:1", "2 rows")
    assert not (tmp_path / "none").exists()


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["blocks.1.ffn.key.weight"]


def _of_other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.1.att.gate.weight"] = torch.zeros(16, 15)


def _of_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.0.ffn.value.weight"] = tensors["blocks.0.ffn.value.weight"].long()


def _with_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.0.att.lora_A"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (_without, "blocks.1.ffn.key.weight"),
        (_of_other_shape, "blocks.1.att.gate.weight"),
        (_of_integers, "blocks.0.ffn.value.weight"),
        (_with_more, "blocks.0.att.lora_A"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_wrong_checkpoint(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path, snapshot: Any,
    change: Callable[[dict[str, torch.Tensor]], None], tensor: str, suffix: str,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    tensors = torch.load(models["pth"], weights_only=True)
    change(tensors)
    path = tmp_path / f"wrong.{suffix}"
    (torch.save if suffix == "pth" else save_file)(tensors, path)
    recipe = make_recipe(model={"path": str(path)})
    _all_refuse(cli, recipe, path, tmp_path, snapshot, [tensor])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.3, 0.999])
def test_truncated_checkpoint(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path, snapshot: Any,
    suffix: str, share: float,
) -> None:  # fmt: skip
    content = models[suffix].read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[: int(len(content) * share)])
    recipe = make_recipe(model={"path": str(path)})
    _all_refuse(cli, recipe, path, tmp_path, snapshot, [])


def _all_refuse(cli: Any, recipe: Path, model: Path, folder: Path, snapshot: Any, words: list[str]) -> None:
    before = snapshot(folder)
    for arguments in (
        ["check", recipe],
        ["train", recipe],
        ["data", recipe],
        ["model", "info", model],
        ["generate", model, "--prompt", "a"],
        ["export", model, "--output", folder / "out.pth"],
    ):
        cli(*arguments).refused(str(model), *words)
        assert snapshot(folder) == before, arguments


def test_vocabulary_smaller_than_an_id(
    cli: Any, make_recipe: Callable[..., Path], make_finch: Any, tmp_path: Path, snapshot: Any
) -> None:
    import infctx

    path, data = tmp_path / "small.pth", tmp_path / "d.jsonl"
    infctx.save_model(make_finch(n_layer=2, n_embd=16, vocab_size=150), path, dtype=torch.float32)
    data.write_text('{"text": "plain"}\n{"text": "caf\u00e9"}\n', encoding="utf-8")
    recipe = make_recipe(model={"path": str(path)}, data={"path": str(data)})
    before = snapshot(tmp_path)
    cli("train", recipe).refused("data.tokenizer", "150", "bytes", "world")
    # é is the bytes C3 A9; the id of a byte is one more.
    cli("train", recipe, "data.tokenizer=bytes").refused("d.jsonl:2", "196", "150")
    cli("data", recipe, "data.tokenizer=bytes").refused("d.jsonl:2", "196", "150")
    cli("generate", path, "--prompt", "caf\u00e9", "--tokenizer", "bytes").refused("150")
    cli("generate", path, "--prompt", "plain").refused("--tokenizer", "150")
    assert snapshot(tmp_path) == before


def test_one_document_has_no_half(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any) -> None:
    (tmp_path / "one.txt").write_text("only one")
    recipe = make_recipe(data={"path": str(tmp_path / "one.txt"), "validation": 0.5})
    before = snapshot(tmp_path)
    cli("train", recipe).refused("data.validation", "validation_tail")
    assert snapshot(tmp_path) == before


NEW = ["model", "new", "--layers", 2, "--channels", 16, "--head-size", 8, "--vocab", 257]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*NEW, "--output", "there.pth"], ["there.pth", "exists", "--force"]),
        ([*NEW, "--output", "none/x.pth"], ["none"]),
        ([*NEW, "--output", "x.pth", "--version", "7"], ["7", "5.2"]),
        ([*NEW, "--output", "x.pth", "--dtype", "int8"], ["--dtype", "int8", "bf16"]),
        ([*NEW, "--output", "x.pth", "--head-size", 7], ["16", "7"]),
        ([*NEW, "--output", "x.pth", "--seed", 2**70], ["seed"]),
        (["export", "MODEL", "--output", "there.pth"], ["there.pth", "exists", "--force"]),
        (["export", "MODEL", "--output", ".", "--force", "--format", "pth"], ["exists", "folder"]),
        (["export", "MODEL", "--output", ".", "--force", "--format", "hf"], ["exists", "no export wrote"]),
        (["export", "MODEL", "--output", "there.pth", "--force", "--format", "hf"], ["there.pth", "pth"]),
        (["export", "MODEL", "--output", "x"], ["x", "--format", ".safetensors"]),
        (["export", "MODEL", "--output", "x.pth", "--dtype", "q8_0"], ["q8_0", "gguf"]),
        (["export", "MODEL", "--output", "x", "--format", "hf", "--code", "."], ["--code", "modeling_rwkv6.py"]),
        (["model", "convert", "none.pth", "--output", "x.pth"], ["none.pth"]),
        (["export", "MODEL", "--output", "none/x.pth"], ["none"]),
        (["export", "MODEL", "--output", "x.pth", "--format", "onnx"], ["onnx", "pth", "safetensors"]),
        (["export", "MODEL", "--output", "x.pth", "--dtype", "int4"], ["int4", "bf16"]),
        (["export", "MODEL", "--output", "x.safetensors", "--format", "pth"], ["x.safetensors", "pth"]),
        (["export", "MODEL", "--output", "x.pth", "--format", "safetensors"], ["x.pth", "safetensors"]),
        (["export", "none.pth", "--output", "x.pth"], ["none.pth"]),
        (["export", ".", "--output", "x.pth"], ["."]),
        (["model", "info", "none.pth"], ["none.pth"]),
        (["model", "info", "there.pth"], ["there.pth"]),
        (["generate", "none.pth", "--prompt", "a"], ["none.pth"]),
        (["generate", "MODEL", "--prompt", "a", "--tokenizer", "neo"], ["neo", "world", "bytes"]),
        (["generate", "MODEL", "--prompt", "世界", "--tokenizer", "world"], ["world"]),
        (["generate", "MODEL", "--prompt", "a", "--temperature", "nan"], ["temperature"]),
        (["generate", "MODEL", "--prompt", "a", "--temperature", "-1"], ["temperature"]),
        (["generate", "MODEL", "--prompt", "a", "--top-p", "1.5"], ["top-p"]),
        (["generate", "MODEL", "--prompt", "a", "--top-p", "nan"], ["top-p"]),
        (["generate", "MODEL", "--prompt", "a", "--max-tokens", "0"], ["max-tokens"]),
        (["generate", "MODEL", "--prompt", "a", "--seed", 2**70], ["seed"]),
        (["generate", "MODEL", "--prompt", "\udcff"], ["surrogate"]),
    ],
    ids=str,
)
def test_bad_arguments(
    cli: Any, models: dict[str, Path], tmp_path: Path, snapshot: Any, arguments: list[Any], words: list[str]
) -> None:
    (tmp_path / "there.pth").write_bytes(b"something of mine")
    before = snapshot(tmp_path)
    cli(*[models["pth"] if argument == "MODEL" else argument for argument in arguments]).refused(*words)
    assert snapshot(tmp_path) == before


def test_a_run_without_a_checkpoint(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    recipe = make_recipe(run={"steps": 1})
    cli("train", recipe).ok()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for arguments in (
        ["export", tmp_path / "run", "--output", "x.pth"],
        ["generate", tmp_path / "run", "--prompt", ""],
    ):
        cli(*arguments).refused(str(tmp_path / "run"), "checkpoint")
    assert not (tmp_path / "x.pth").exists()


def test_a_damaged_recipe_in_a_run_folder(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(run={"steps": 1})
    cli("train", recipe).ok()
    used = tmp_path / "run" / "recipe.yaml"
    used.write_text(used.read_text().replace("steps:", "stepz:"))
    for arguments in (["train", recipe], ["generate", tmp_path / "run", "--prompt", ""]):
        cli(*arguments).refused(str(used), "run.stepz")


def test_an_unwritable_place(cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path]) -> None:
    """Root may write everywhere but here."""
    ended = cli("train", make_recipe(run={"folder": "/proc/infctx_run"}))
    assert "Traceback" not in ended.err
    assert ended.code in (2, 4)
    ended = cli("export", models["pth"], "--output", "/proc/x.pth")
    assert "Traceback" not in ended.err
    assert ended.code in (2, 4)


def test_json_of_a_mistake_is_not_half_an_answer(cli: Any, make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe(run={"rows": 0})
    for command in ("train", "check", "data"):
        cli(command, recipe, "--json").refused("run.rows")
