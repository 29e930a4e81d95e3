"""Memory and speed of `infctx model convert` on checkpoints of released sizes, with random weights in bf16.

    python benchmarks/conversion.py [--size 1b6 7b 14b] [--formats safetensors gguf] [--folder DIR] [--output FILE]

A checkpoint is made tensor by tensor, then converted by the command in a process of its own, which writes it, reads it
back and compares logits with the source. anonymous_mb is the peak of memory that the process made itself (RssAnon); the
peak of all its resident memory, resident_mb (VmHWM), also has the pages of mapped files, which the system takes back
when somebody needs them. With --at-once, a script that loads all tensors and saves them again is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from infctx.bench.machine import commit, machine_facts, versions
from infctx.checkpoint.weights import write_pth
from infctx.model import finch_keys
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.tensors import StoredTensor

SIZES = {"tiny": (4, 512), "0b4": (24, 1024), "1b6": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "14b": (61, 4096)}
AT_ONCE = "import sys, torch; x = torch.load(sys.argv[1]); torch.save({k: v.half() for k, v in x.items()}, sys.argv[2])"


def make_checkpoint(path: Path, *, n_layer: int, n_embd: int) -> int:
    """Write a random Finch whose logits are finite; returns its number of parameters."""
    config = new_config(version="6", n_layer=n_layer, n_embd=n_embd, vocab_size=65536)
    with torch.device("meta"):
        model = Finch(config)
    tensors = {}
    for row in finch_keys.key_rows(config, has_initial_state=False):
        shape = tuple(finch_keys.to_official(row, model.get_parameter(row.ours)).shape)
        tensors[row.official] = StoredTensor(
            shape, torch.bfloat16, lambda row=row, shape=shape: values(row.ours, shape)
        )
    write_pth(path, tensors)
    return sum(tensor.num_elements for tensor in tensors.values())


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if "norm" in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
    scale = shape[-1] ** -0.5 if name.endswith("weight") else 0.1
    # Drawn once and repeated: what the numbers are does not matter, that no tensor is all alike does.
    num_elements = torch.Size(shape).numel()
    some = torch.randn(min(num_elements, 1_000_003)) * scale
    return some.bfloat16().repeat(-(-num_elements // len(some)))[:num_elements].view(shape)


def watch(command: list[str]) -> tuple[str, dict[str, float]]:
    """Run a command; its output, seconds, and peaks of memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        facts = dict(line.split(":", 1) for line in status.splitlines())
        anonymous = max(anonymous, int(facts.get("RssAnon", "0").split()[0]))
        resident = max(resident, int(facts.get("VmHWM", "0").split()[0]))
        time.sleep(0.02)
    output, _ = process.communicate()
    assert process.returncode == 0, command
    seconds = time.perf_counter() - began
    return output, {
        "total_seconds": round(seconds, 1),
        "anonymous_mb": round(anonymous / 1024),
        "resident_mb": round(resident / 1024),
    }


def measure(size: str, formats: list[str], folder: Path, *, at_once: bool) -> list[dict[str, Any]]:
    n_layer, n_embd = SIZES[size]
    source = folder / f"random_{size}.pth"
    parameters = make_checkpoint(source, n_layer=n_layer, n_embd=n_embd)
    rows = []
    for format in formats:
        output = folder / f"converted_{size}.{format}"
        command = [sys.executable, "-m", "infctx", "model", "convert", str(source), "--output", str(output), "--json"]
        dtype = ["--dtype", "q8_0"] if format == "q8_0" else []
        text, facts = watch([*command, "--format", "gguf" if dtype else format, *dtype])
        answer = json.loads(text)
        speed = answer["bytes"] / 1e6 / answer["seconds"]["writing"]
        row = {"size": size, "parameters": parameters, "format": format, **facts, "writing_mb_per_s": round(speed)}
        rows.append({**row, **{key: answer[key] for key in ("bytes", "seconds", "max_logit_difference")}})
        print(rows[-1], file=sys.stderr)
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    if at_once:
        _, facts = watch([sys.executable, "-c", AT_ONCE, str(source), str(folder / "at_once.pth")])
        rows.append({"size": size, "format": "torch.load and torch.save of everything", **facts})
        print(rows[-1], file=sys.stderr)
        (folder / "at_once.pth").unlink()
    source.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--formats", nargs="+", default=["safetensors"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--at-once", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rows = [
            row for size in options.size for row in measure(size, options.formats, Path(name), at_once=options.at_once)
        ]
    facts = {"machine": machine_facts(torch.device("cpu")), "versions": versions(), "commit": commit(), "rows": rows}
    if options.output is not None:
        options.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
