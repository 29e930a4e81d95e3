"""A quantised base beside one of floats: bytes, memory of a training step, time, and what the rounding does.

    python benchmarks/quantized_base.py [--layers 2] [--tokens 1024] [--chunk 512] [--rounds 3] [--output FILE]

Memory and time: layers of the 1.6B model's sizes with random weights and a small vocabulary, LoRA of rank 16 on every
matrix of the blocks, one exact gradient of a document and AdamW's update. The memory of each kind is that of a process
of its own, which reads the model from a bf16 file as `infctx train` does; the times, of the processor, are medians of
rounds in which every kind runs once, in one process.
Errors: of the byte model in datasets/ on a real text, none of which is random, against its float32 self.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import infctx
from infctx.adapters.peft_adapters import attach_lora
from infctx.adapters.quantized_base import quantize_, stored_bytes
from infctx.bench.machine import machine_facts, versions
from infctx.checkpoint.model_file import read_model_file
from infctx.data.chunking import RowSlice, chunk_rows
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx.training.fabric_run import FabricEngine
from infctx.training.host_memory import HeapTrimmer
from infctx.training.precision import apply_precision_

ROOT = Path(__file__).parents[1]
SIDES = [(kind, precision) for precision in ("fp32", "bf16") for kind in ("none", "int8", "nf4", "bnb-int8")]
TARGETS = ["receptance", "key", "value", "gate", "output"]
TEXT_TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", nargs=3, metavar=("FILE", "KIND", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(json.dumps(memory_of(*arguments.memory_of, tokens=arguments.tokens, chunk=arguments.chunk)))
        return
    result: dict[str, Any] = {
        "setting": {key: value for key, value in vars(arguments).items() if key not in ("output", "memory_of")},
        "machine": machine_facts(torch.device("cpu")),
        "versions": versions(),
        "errors": [show(errors_of(kind)) for kind in ("int8", "nf4", "bnb-int8")],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        write_model(file, layers=arguments.layers)
        again = ["--tokens", str(arguments.tokens), "--chunk", str(arguments.chunk), "--memory-of", str(file)]
        result["memory"] = []
        for side in SIDES:
            command = [sys.executable, __file__, *again, *side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result["memory"].append(show(json.loads(done.stdout.splitlines()[-1])))
        result["time"] = time_sides(file, tokens=arguments.tokens, chunk=arguments.chunk, rounds=arguments.rounds)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row and give it back."""
    print(json.dumps(row), flush=True)
    return row


def write_model(file: Path, *, layers: int) -> None:
    """The 1.6B model's layers, 2,048 channels, over 4,096 ids; every matrix random, in bf16."""
    config = new_config(version="6", n_layer=layers, n_embd=2048, vocab_size=4096, dim_ffn=7168)
    model = Finch(config)
    initialise_(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2 and "embedding" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    infctx.save_model(model, file, format="safetensors", dtype=torch.bfloat16)


def make_step(
    file: Path | str, kind: str, precision: str, *, tokens: int, chunk: int
) -> tuple[Finch, Callable[[], None]]:
    """A model as a run has it: read as stored, quantised, with LoRA, cast, wrapped; and what trains a step of it."""
    engine = FabricEngine(devices=1, strategy="single", precision=precision)
    model = read_model_file(file, dtype=None).model
    if kind != "none":
        quantize_(model, kind)
    torch.manual_seed(0)
    attach_lora(model, rank=16, alpha=32, targets=TARGETS)
    apply_precision_(model, engine.precision)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    objective, optimizer = engine.setup(ChunkObjective(model), optimizer)
    ids = torch.randint(1, 4096, (tokens + 1,), generator=torch.Generator().manual_seed(2)).numpy()
    row = RowSlice(
        tokens=ids[:-1], targets=ids[1:], weights=torch.ones(tokens).numpy(), starts=(torch.arange(tokens) == 0).numpy()
    )
    sequence = chunk_rows([row], chunk_tokens=chunk)

    # As in a run, where it trims by the clock: what loading left in the heap would count as the step's.
    trimmer = HeapTrimmer(engine.device, clock=functools.partial(next, itertools.count(step=60)))
    trimmer.tick()

    def step() -> None:
        state = ModelState.zeros(model.config, 1, dtype=torch.float32, device=engine.device)
        backward_through_windows(
            objective,
            sequence.chunks,
            state,
            window="document",
            weight_total=sequence.weight_total,
            backward=engine.backward,
        )
        optimizer.step()
        optimizer.zero_grad()
        trimmer.tick()

    return model, step


class PeakMemory:
    """Largest memory of this process while it is open. private: without pages of files, which the system can drop."""

    def __enter__(self) -> PeakMemory:
        self.private, self.resident, self._is_open = 0, 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._is_open:
            self.private = max(self.private, memory("RssAnon"))
            self.resident = max(self.resident, memory("VmRSS"))
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._thread.join()


def memory(field: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def memory_of(file: str, kind: str, precision: str, *, tokens: int, chunk: int) -> dict[str, Any]:
    """What loading and two steps take, in MB; the imports of this process, measured first, are taken off."""
    attach_lora(Finch(new_config(version="6", n_layer=2, n_embd=64, vocab_size=9)), rank=1, alpha=1, targets=["key"])
    private, resident = memory("RssAnon"), memory("VmRSS")
    with PeakMemory() as loading:
        model, step = make_step(file, kind, precision, tokens=tokens, chunk=chunk)
    with PeakMemory() as training:
        step()
        step()
    blocks = stored_bytes(model.blocks) - sum(p.nbytes for p in model.blocks.parameters() if p.requires_grad)
    return {
        "kind": kind,
        "precision": precision,
        "blocks_mb": round(blocks / 1e6, 1),
        "loading_private_mb": round((loading.private - private) / 1e6),
        "loading_resident_mb": round((loading.resident - resident) / 1e6),
        "step_resident_mb": round((training.resident - resident) / 1e6),
    }


def time_sides(file: Path, *, tokens: int, chunk: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of the processor for a step, every side once a round after one that is not counted."""
    steps = {side: make_step(file, *side, tokens=tokens, chunk=chunk)[1] for side in SIDES}
    seconds: dict[tuple[str, str], list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds + 1):
        for side, step in steps.items():
            began = time.process_time()
            step()
            seconds[side].append(time.process_time() - began)
    rows = []
    for side, (_, *counted) in seconds.items():
        floats = seconds["none", side[1]][1:]
        ratios = [mine / theirs for mine, theirs in zip(counted, floats, strict=True)]
        row = {"kind": side[0], "precision": side[1], "seconds": round(statistics.median(counted), 2)}
        row |= {"ratio": round(statistics.median(ratios), 2)}
        rows.append(show(row | {"lowest": round(min(ratios), 2), "highest": round(max(ratios), 2)}))
    return rows


def errors_of(kind: str) -> dict[str, Any]:
    """Weights, logits, loss and predicted distribution of the byte model, quantised, on the end of its own data."""
    file = ROOT / "datasets" / "byte_finch" / "model.safetensors"
    text = Path(pydoc_data.topics.__file__).read_bytes()[-TEXT_TOKENS:]
    tokens = torch.tensor([list(text)]) + 1
    original, quantized = infctx.load_model(file), infctx.load_model(file)
    error = quantize_(quantized, kind)
    with torch.no_grad():
        expected, found = original(tokens)[0][0], quantized(tokens)[0][0]
    losses = [float(F.cross_entropy(logits[:-1], tokens[0, 1:])) for logits in (expected, found)]
    divergence = F.kl_div(found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean")
    return {
        "kind": kind,
        "weight_error": round(error, 4),
        "logit_rms_error": round(float((found - expected).pow(2).mean().sqrt()), 4),
        "logit_std": round(float(expected.std()), 2),
        "largest_logit_error": round(float((found - expected).abs().max()), 3),
        "loss": round(losses[1], 4),
        "loss_of_floats": round(losses[0], 4),
        "divergence_nats": float(f"{float(divergence):.2g}"),
    }


if __name__ == "__main__":
    main()
