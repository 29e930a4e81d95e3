"""Export, generate, and a disk that is full."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import infctx

PROMPTS = ["", "abc", "héllo → 世界 🎉"]


@pytest.fixture(scope="module")
def run_folder(forks: Any, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], rows: Path) -> Path:
    """A finished LoRA run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(
        f"model: {{path: '{models['pth']}'}}\ndata: {{path: '{rows}'}}\nadapter: {{kind: lora, rank: 2}}\n"
        "bptt: {chunk_tokens: 8, window: 2}\noptimizer: {lr: 0.05, warmup_steps: 0}\n"
        f"run: {{folder: '{folder / 'run'}', steps: 6, rows: 2}}\n"
    )
    forks.start("train", folder / "recipe.yaml").wait().ok()
    return folder / "run"


def logits_of(path: Path) -> torch.Tensor:
    tokens = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return infctx.load_model(path)(tokens)[0]


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_exports_compute_what_the_source_computes(
    cli: Any, models: dict[str, Path], run_folder: Path, tmp_path: Path, format: str
) -> None:
    base = logits_of(models["pth"])
    found = {}
    for source in (models["pth"], models["safetensors"], run_folder):
        for dtype in ("fp32", "bf16", "fp16"):
            output = tmp_path / f"{source.stem}_{source.suffix[1:]}_{dtype}.{format}"
            result = cli("export", source, "--format", format, "--output", output, "--dtype", dtype, "--json").ok().json
            found[source, dtype] = logits_of(output)
            info = cli("model", "info", output, "--json").ok().json
            assert info["dtypes"] == [{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]]
            found_difference = result["max_logit_difference"]
            if dtype == "fp32":  # Of a run, between attached and merged.
                assert 0 < found_difference < 1e-4 if source == run_folder else found_difference == 0.0
            else:
                assert 0 < found_difference < 0.4
            assert info["tokenizer"] in (None, "bytes")
    for source in (models["pth"], models["safetensors"]):
        assert torch.equal(found[source, "fp32"], base)
        assert 0 < (found[source, "bf16"] - base).abs().max() < 0.4
    assert (found[run_folder, "fp32"] - base).abs().max() > 0.05
    assert (found[run_folder, "bf16"] - found[run_folder, "fp32"]).abs().max() < 0.4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{source.stem}_{source.suffix[1:]}_{dtype}.{format}" for source, dtype in found
    )


def test_the_tokenizer_of_a_run_is_recorded(cli: Any, run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    cli("export", run_folder, "--format", "safetensors", "--output", output).ok()
    assert cli("model", "info", output, "--json").ok().json["tokenizer"] == "bytes"


def test_an_existing_output_needs_force(cli: Any, models: dict[str, Path], tmp_path: Path, snapshot: Any) -> None:
    output = tmp_path / "out.pth"
    cli("export", models["pth"], "--output", output).ok()
    before = snapshot(tmp_path)
    cli("export", models["other"], "--output", output).refused(str(output), "--force")
    assert snapshot(tmp_path) == before
    cli("export", models["other"], "--output", output, "--force", "--dtype", "fp32").ok()
    assert torch.equal(logits_of(output), logits_of(models["other"]))
    # A model may be replaced by itself.
    cli("export", output, "--output", output, "--force", "--dtype", "fp32").ok()
    assert torch.equal(logits_of(output), logits_of(models["other"]))
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate_is_reproducible(
    cli: Any, models: dict[str, Path], run_folder: Path, tmp_path: Path, prompt: str
) -> None:
    def text(source: Path, seed: int, *more: object) -> str:
        command = ["generate", source, "--prompt", prompt, "--max-tokens", 24, "--top-p", 1.0, "--seed", seed]
        answer = cli(*command, *more, "--json").ok().json
        assert answer["prompt"] == prompt
        return str(answer["text"])

    first = text(models["pth"], 1)
    assert first
    assert text(models["pth"], 1) == first
    assert text(models["safetensors"], 1) == first
    assert len({text(models["pth"], seed) for seed in (1, 2, 3)}) > 1
    greedy = text(models["pth"], 1, "--temperature", 0)
    assert text(models["pth"], 2, "--temperature", 0) == greedy
    # The smallest nucleus is the most probable token.
    assert text(models["pth"], 3, "--top-p", 0) == greedy
    assert text(models["pth"], 3, "--temperature", 1e-30) == greedy
    trained = text(run_folder, 1)
    assert text(run_folder, 1) == trained
    output = tmp_path / "merged.pth"
    cli("export", run_folder, "--output", output, "--dtype", "fp32").ok()
    assert text(output, 1) == trained


def test_generate_prints_the_prompt_and_the_text(cli: Any, models: dict[str, Path]) -> None:
    command = ["generate", models["pth"], "--prompt", PROMPTS[2], "--max-tokens", 24, "--seed", 1]
    text = cli(*command, "--json").ok().json["text"]
    assert cli(*command).ok().out == f"{PROMPTS[2]}{text}\n"


def test_a_model_of_infinities_is_the_users(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    tensors = torch.load(models["pth"], weights_only=True)
    tensors["head.weight"].fill_(float("nan"))
    torch.save(tensors, tmp_path / "nan.pth")
    cli("generate", tmp_path / "nan.pth", "--prompt", "").refused("nan.pth")
    exported = cli("export", tmp_path / "nan.pth", "--output", tmp_path / "out.pth", "--json")
    assert "Traceback" not in exported.err
    if exported.code == 0:
        assert "max_logit_difference" in exported.json


def test_an_export_that_cannot_be_proved_leaves_the_old_file(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    tensors = torch.load(models["pth"], weights_only=True)
    tensors["head.weight"].fill_(1e5)
    torch.save({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "large.pth")
    output = tmp_path / "out.pth"
    output.write_text("the old file")
    ended = cli("export", tmp_path / "large.pth", "--output", output, "--dtype", "fp16", "--force")
    ended.refused("not finite")
    assert output.read_text() == "the old file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.pth", "out.pth"]


# A full disk


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_export_onto_a_full_disk(
    forks: Any, models: dict[str, Path], tmp_path: Path, snapshot: Any, format: str
) -> None:
    output = tmp_path / f"out.{format}"
    command = ["export", models["pth"], "--format", format, "--output", output, "--force"]
    for content in (None, b"what was here before"):
        if content is not None:
            output.write_bytes(content)
        before = snapshot(tmp_path)
        forks.start(*command, max_file_bytes=5000).wait().refused(str(output), code=4)
        assert {name: found[0] for name, found in snapshot(tmp_path).items()} == {
            name: found[0] for name, found in before.items()
        }


def test_model_new_onto_a_full_disk(forks: Any, tmp_path: Path) -> None:
    command = ["model", "new", "--layers", 2, "--channels", 16, "--head-size", 8, "--vocab", 257]
    forks.start(*command, "--output", tmp_path / "x.pth", max_file_bytes=5000).wait().refused("x.pth", code=4)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit(
    forks: Any, make_recipe: Callable[..., Path], tmp_path: Path, snapshot: Any
) -> None:
    """The one before stays, is named, and the run continues from it when there is room."""
    recipe = make_recipe(run={"steps": 40, "checkpoint_every": 3})
    folder = tmp_path / "run"
    process = forks.start("train", recipe)
    process.wait_for(lambda: (folder / "checkpoints" / "latest").exists())
    process.signal(signal.SIGKILL)
    process.wait()
    good = (folder / "checkpoints" / "latest").read_text().strip()
    before = snapshot(folder / "checkpoints" / good)
    ended = forks.start("train", recipe, max_file_bytes=20_000).wait()
    ended.refused(good, code=4)
    assert (folder / "checkpoints" / "latest").read_text().strip() == good
    assert snapshot(folder / "checkpoints" / good) == before
    assert not [path.name for path in folder.rglob("*tmp*")]
    forks.start("train", recipe).wait().ok()
    forks.start("train", recipe, f"run.folder={tmp_path / 'whole'}").wait().ok()
    name = "checkpoints/step-000040/trainable.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 3 MB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mount") or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=3m") != 0:
        pytest.skip("cannot mount a small file system here")
    yield folder
    libc.umount2(os.fsencode(folder), 2)


@pytest.mark.parametrize("adapter", [{}, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
def test_a_disk_that_fills_up(
    forks: Any, make_recipe: Callable[..., Path], small_disk: Path, adapter: dict[str, Any], snapshot: Any
) -> None:
    """Whatever file it is that does not fit any more: exit code 4, and everything that was whole stays whole."""
    recipe = make_recipe(adapter=adapter, run={"folder": str(small_disk / "run"), "steps": 60, "checkpoint_every": 3})
    process = forks.start("train", recipe)
    latest = small_disk / "run" / "checkpoints" / "latest"
    process.wait_for(latest.exists)
    process.signal(signal.SIGKILL)
    process.wait()
    good = latest.read_text().strip()
    adapter_before = snapshot(small_disk / "run" / "adapter") if adapter else {}
    # Room for a few KB, then for more and more: each time another file is the one that does not fit.
    filler, log = small_disk / "filler", small_disk / "run" / "run.log"
    codes = []
    for room in (4096, 16384, 36864, 53248):
        begun = log.stat().st_size
        process = forks.start("train", recipe)
        # A run that could not fit is refused at its start: the disk fills up behind it.
        process.wait_for(lambda begun=begun: log.stat().st_size > begun)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        with contextlib.suppress(OSError):
            filler.write_bytes(b"x" * max(0, free - room))
        ended = process.wait()
        filler.unlink()
        codes.append(ended.code)
        if ended.code == 0:
            break
        ended.refused(code=4)
        assert latest.read_text().strip() >= good
        if adapter_before:
            names = {path.name for path in (small_disk / "run" / "adapter").iterdir()}
            assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    assert 4 in codes
    forks.start("train", recipe).wait().ok()


def test_an_adapter_that_does_not_fit(
    forks: Any, make_recipe: Callable[..., Path], small_disk: Path, tmp_path: Path
) -> None:
    """A first checkpoint fits and the adapter beside it does not, somewhere on the way to enough room."""
    import shutil

    codes = []
    for kilobytes in range(48, 200, 8):
        shutil.rmtree(small_disk / "run", ignore_errors=True)
        (small_disk / "filler").unlink(missing_ok=True)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "filler").write_bytes(b"x" * (free - 1024 * kilobytes))
        recipe = make_recipe(adapter={"kind": "lora", "rank": 2}, run={"folder": str(small_disk / "run"), "steps": 1})
        ended = forks.start("train", recipe).wait()
        assert "Traceback" not in ended.err, ended.err
        codes.append(ended.code)
        if ended.code == 0:
            break
    # Refused while not even the plan has room, then out of it on the way.
    assert re.fullmatch(r"2*4+0", "".join(map(str, codes))), codes


def test_a_merge_that_is_not_what_was_trained_is_not_written(
    cli: Any, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infctx.adapters.peft_adapters import PeftAdapter

    right = PeftAdapter.merged_parameter
    monkeypatch.setattr(PeftAdapter, "merged_parameter", lambda self, name: right(self, name) * 1.01)
    ended = cli("export", run_folder, "--output", tmp_path / "x.pth")
    ended.refused(str(run_folder), "merged", "adapter attached", "Nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_an_export_reads_the_base_from_its_file_one_tensor_at_a_time(run_folder: Path) -> None:
    """What no adapter changed stays in its file; what one changed is merged when it is read, and each time anew."""
    from infctx.trained import open_for_export

    opened = open_for_export(run_folder)
    merged = opened.source.tensors["blocks.1.att.key.weight"]
    first, second = merged.read(), merged.read()
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    untouched = opened.source.tensors["emb.weight"]
    first, second = untouched.read(), untouched.read()
    assert first.data_ptr() != second.data_ptr()
    assert opened.logits is not None


def test_last_weights_are_of_runs_that_have_others(
    cli: Any, run_folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    for source in (run_folder, models["pth"]):
        ended = cli("export", source, "--output", tmp_path / "x.pth", "--last-weights")
        ended.refused("--last-weights", str(source), "averages")
