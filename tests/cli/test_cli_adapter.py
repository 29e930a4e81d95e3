"""infctx adapter import, export and info; infctx export with an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import infctx
from infctx.checkpoint.weights import read_tensors, write_pth

TOKENS = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(4))


def logits_of(path: Path) -> Tensor:
    with torch.no_grad():
        return infctx.load_model(path)(TOKENS)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Path]:
    """A LoRA, the second file of a PiSSA, a DiSHA of either form and a state, for the model "pth"."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    base = read_tensors(models["pth"])[0]
    matrices = [name.removesuffix(".weight") for name in base if ".att.key.w" in name or ".ffn.value.w" in name]

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    kinds: dict[str, dict[str, Tensor]] = {name: {} for name in ("lora", "start", "disha", "bat", "state")}
    for name in matrices:
        rows, columns = base[f"{name}.weight"].shape
        for kind, prefix in (("lora", ""), ("start", "init_")):
            kinds[kind][f"{name}.{prefix}lora_A"] = values(4, columns)
            kinds[kind][f"{name}.{prefix}lora_B"] = values(rows, 4)
        kinds["disha"][f"{name}.disha"] = values(4, rows)
        kinds["bat"][f"{name}.disha"] = values(columns // 4, 4, 4)
    for i in range(2):
        kinds["state"][f"blocks.{i}.att.time_state"] = values(2, 8, 8)
    for kind, tensors in kinds.items():
        write_pth(folder / f"{kind}.pth", tensors)
    return {kind: folder / f"{kind}.pth" for kind in kinds}


@pytest.mark.parametrize("kind", ["lora", "pissa", "disha", "state"])
def test_a_file_becomes_a_folder_and_a_file_again(
    cli: Any, models: dict[str, Path], files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    file = files.get(kind, files["lora"])
    told = {"lora": ["--alpha", 8], "pissa": ["--init", files["start"]]}.get(kind, [])
    folder, back = tmp_path / "folder", tmp_path / "back.pth"
    made = cli("adapter", "import", file, "--base", models["pth"], "--output", folder, *told, "--json").ok().json
    assert made == cli("adapter", "info", folder, "--json").ok().json
    assert made["kind"] == {"pissa": "lora"}.get(kind, kind)
    assert made["alpha"] == {"lora": 8.0, "pissa": 8.0}.get(kind)
    assert made["ranks"] == {"pissa": [8], "state": []}.get(kind, [4])
    assert made["matrices"] == (0 if kind == "state" else 4)
    written = cli("adapter", "export", folder, "--output", back, "--dtype", "fp32", "--json").ok().json
    assert written["path"] == str(back)
    assert {key: value for key, value in written.items() if key not in ("path", "note")} == json.loads(
        Path(written["note"]).read_text()
    )
    exported = {}
    for name, adapter, more in (("file", file, told), ("folder", folder, []), ("back", back, [])):
        output = tmp_path / f"{name}-merged.pth"
        command = [
            "export",
            models["pth"],
            "--adapter",
            adapter,
            *more,
            "--output",
            output,
            "--dtype",
            "fp32",
            "--json",
        ]
        assert cli(*command).ok().json["max_logit_difference"] == 0.0
        exported[name] = logits_of(output)
        torch.testing.assert_close(exported[name], exported["file"], rtol=0, atol=1e-5)
    assert float((exported["file"] - logits_of(models["pth"])).abs().max()) > 0.05


def test_info_of_a_file(cli: Any, files: dict[str, Path]) -> None:
    facts = cli("adapter", "info", files["lora"], "--json").ok().json
    assert facts == {
        "path": str(files["lora"]),
        "kind": "lora",
        "ranks": [4],
        "alpha": None,
        "matrices": 4,
        "parts": ["att.key", "ffn.value"],
        "trained_beside": [],
        "parameters": 2 * 4 * (16 + 16 + 32 + 16),
        "dtypes": ["float32"],
        "base_fingerprint": None,
    }
    ended = cli("adapter", "info", files["lora"]).ok()
    assert "unknown" in ended.out
    assert "PiSSA" in ended.err
    state = cli("adapter", "info", files["state"], "--json").ok().json
    assert state["trained_beside"] == ["blocks.0.att.time_state", "blocks.1.att.time_state"]
    cli("adapter", "info", files["start"]).refused("--init")


def test_a_run_s_adapter_becomes_a_file_that_merges_to_the_run_s_model(
    cli: Any, make_recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        adapter={"kind": "lora", "rank": 2, "alpha": 6, "train_also": ["*.bonus"]}, optimizer={"lr": 0.05}
    )
    run = tmp_path / "run"
    cli("train", recipe).ok()
    cli("export", run, "--output", tmp_path / "of_run.pth", "--dtype", "fp32").ok()
    written = cli("adapter", "export", run, "--output", tmp_path / "lora.pth", "--json").ok().json
    assert (written["kind"], written["alpha"], written["ranks"]) == ("lora", 6.0, [2])
    command = ["export", models["pth"], "--adapter", tmp_path / "lora.pth", "--output", tmp_path / "merged.pth"]
    cli(*command, "--dtype", "fp32").ok()
    expected, found = read_tensors(tmp_path / "of_run.pth")[0], read_tensors(tmp_path / "merged.pth")[0]
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(found["blocks.0.att.time_faaaa"], read_tensors(models["pth"])[0]["blocks.0.att.time_faaaa"])
    facts = cli("adapter", "info", run, "--json").ok().json
    assert "blocks.1.att.time_faaaa" in facts["trained_beside"]


def test_what_is_refused(
    cli: Any, models: dict[str, Path], files: dict[str, Path], tmp_path: Path, snapshot: Any
) -> None:
    base, output = ["--base", models["pth"]], ["--output", tmp_path / "folder"]
    before = snapshot(tmp_path)
    cli("adapter", "import", files["lora"], *base, *output).refused("--alpha", "alpha / rank")
    cli("adapter", "import", files["disha"], *base, *output, "--alpha", 8).refused("--alpha 8 means nothing")
    cli("adapter", "import", files["bat"], *base, *output).refused("each row of tiles", "infctx export MODEL --adapter")
    cli("adapter", "import", files["lora"], "--alpha", 8, "--init", files["start"], *base, *output).refused("PiSSA")
    cli("adapter", "import", models["pth"], *base, *output).refused("A whole model is no adapter")
    cli("adapter", "import", tmp_path / "none.pth", *base, *output).refused("none.pth")
    cli("adapter", "import", files["state"], *base, "--output", tmp_path / "a" / "b").refused("does not exist")
    cli("adapter", "export", tmp_path, "--output", tmp_path / "x.pth").refused("expected an adapter")
    cli("adapter", "export", files["state"], "--output", tmp_path / "x.bin").refused("ends in .pth")
    cli("adapter", "export", files["state"], "--output", tmp_path / "x.pth", "--dtype", "int8").refused("--dtype int8")
    merged = ["--output", tmp_path / "merged.pth"]
    cli("export", models["pth"], *merged, "--alpha", 8).refused("--adapter")
    cli("export", models["pth"], "--adapter", files["lora"], *merged).refused("--alpha")
    assert snapshot(tmp_path) == before


def test_existing_outputs_need_force(
    cli: Any, models: dict[str, Path], files: dict[str, Path], tmp_path: Path, snapshot: Any
) -> None:
    folder, file = tmp_path / "folder", tmp_path / "x.pth"
    make = ["adapter", "import", files["state"], "--base", models["pth"], "--output", folder]
    write = ["adapter", "export", folder, "--output", file]
    cli(*make).ok()
    cli(*write).ok()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.json", "x.pth"]
    before = snapshot(tmp_path)
    cli(*make).refused(str(folder), "--force")
    cli(*write).refused(str(file), "--force")
    assert snapshot(tmp_path) == before
    cli(*make, "--force").ok()
    cli(*write, "--force").ok()
    # A folder of something else is not replaced, whatever is said.
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    cli(*make[:-1], other, "--force").refused("no adapter")
    assert (other / "thesis.tex").exists()


def test_a_run_is_no_base(cli: Any, make_recipe: Callable[..., Path], files: dict[str, Path], tmp_path: Path) -> None:
    cli("train", make_recipe(run={"steps": 1})).ok()
    merged = ["--output", tmp_path / "merged.pth"]
    cli("export", tmp_path / "run", "--adapter", files["state"], *merged).refused("is a run")
    # This one trains all weights.
    cli("adapter", "export", tmp_path / "run", "--output", tmp_path / "x.pth").refused("no adapter/ folder")


def test_a_full_disk(forks: Any, models: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    command = [
        "adapter",
        "import",
        files["lora"],
        "--alpha",
        8,
        "--base",
        models["pth"],
        "--output",
        tmp_path / "folder",
    ]
    forks.start(*command, max_file_bytes=3000).wait().refused(str(tmp_path), code=4)
    assert list(tmp_path.iterdir()) == []
    forks.start(
        "adapter", "export", files["disha"], "--output", tmp_path / "x.pth", max_file_bytes=1500
    ).wait().refused(str(tmp_path), code=4)
    assert list(tmp_path.iterdir()) == []
