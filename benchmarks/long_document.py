"""One real document of more than a million tokens: time and memory against its length, and its loss by position.

    python benchmarks/long_document.py [--tokens 65536 262144 1048576] [--tune] [--output FILE]

The document is that of recipes/million_tokens.yaml, in bytes; the model is datasets/byte_finch, trained in full.

Lengths: the exact gradient of a prefix of each length, each in a process of its own. The peak is that of the process's
resident memory; "grown" is what it grew beyond a first prefix of 16 chunks, and "allowed" is 1.15 times the boundary
states + 24 bytes a token + 16 MB.

--tune: trains the recipe and gives the loss of every sixteenth of the document before and after.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "million_tokens.yaml"
CHUNK_TOKENS = 1024
POSITIONS = 16


def measure(num_tokens: int) -> dict[str, float]:
    """The exact gradient of the document's beginning, in this process."""
    import torch

    import infctx

    document, model = open_document()
    assert len(document) >= num_tokens, f"{document.origin} has {len(document)} tokens"

    def run(length: int) -> float:
        tokens = torch.tensor(document.tokens[:length].astype("int64"))[None]
        began = time.perf_counter()
        infctx.backward_through_chunks(model, tokens, chunk_tokens=CHUNK_TOKENS)
        return time.perf_counter() - began

    first = run(16 * CHUNK_TOKENS)
    before = peak_megabytes()
    seconds = run(num_tokens)
    state = model.fresh_state(1)
    num_boundaries = -(-num_tokens // CHUNK_TOKENS)
    boundaries = sum(tensor.numel() * tensor.element_size() for tensor in state) * num_boundaries / 2**20
    return {
        "tokens": num_tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(num_tokens / seconds),
        "tokens_per_second_of_the_first_16_chunks": round(16 * CHUNK_TOKENS / first),
        "peak_mb": round(peak_megabytes()),
        "grown_mb": round(peak_megabytes() - before, 1),
        "boundaries_mb": round(boundaries, 1),
        "allowed_mb": round(1.15 * boundaries + num_tokens * 24 / 2**20 + 16, 1),
    }


def tune(folder: Path) -> dict[str, object]:
    """Train the recipe in this process."""
    from infctx.assemble import run_recipe
    from infctx.recipe.load import load_recipe
    from infctx.trained import open_trained
    from infctx.training.metrics import read_metrics
    from infctx.training.progress import make_progress

    document, model = open_document()
    recipe = load_recipe(RECIPE, [f"run.folder={folder}"])
    before = loss_by_position(model, document)
    result = run_recipe(recipe, make_progress())
    after = loss_by_position(open_trained(folder).model, document)
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] > 0]
    return {
        "document": Path(document.origin).name,
        "tokens": len(document),
        "steps": result["steps"],
        "loss_of_each_step": [round(line["loss"], 4) for line in steps],
        "seconds_of_a_step": round(statistics.median(line["seconds"] for line in steps), 1),
        "tokens_per_second": round(statistics.median(line["tokens_per_second"] for line in steps)),
        "peak_mb": round(max(line["peak_host_bytes"] for line in steps) / 2**20),
        "recompute_difference": max(line["recompute_difference"] for line in steps),
        "loss_by_position_before": before,
        "loss_by_position_after": after,
    }


def open_document():
    """The document and the model of the recipe."""
    import os

    import infctx
    from infctx.checkpoint.model_file import read_model_file
    from infctx.recipe.load import load_recipe
    from infctx.run_data import open_data

    os.chdir(ROOT)
    recipe = load_recipe(RECIPE)
    (document,) = open_data(recipe, model_file=read_model_file(recipe.model.path, dtype=None)).training
    return document, infctx.load_model(recipe.model.path).train()


def loss_by_position(model, document) -> list[float]:
    """Mean loss of each sixteenth of the document, read from its beginning with the state carried on."""
    from infctx.data.chunking import chunk_rows, join_pieces
    from infctx.training.bptt import ChunkObjective, forward_through_chunks

    chunks = chunk_rows([join_pieces([(document, 0)], num_tokens=len(document))], chunk_tokens=CHUNK_TOKENS).chunks
    objective, state = ChunkObjective(model), model.fresh_state(1).detach()
    sums, weights = [0.0] * POSITIONS, [0.0] * POSITIONS
    for chunk in chunks:
        loss_sum, state = forward_through_chunks(objective, [chunk], state)
        position = chunk.index * POSITIONS // len(chunks)
        sums[position] += float(loss_sum)
        weights[position] += float(chunk.loss_weight.sum())
    return [round(loss / weight, 4) for loss, weight in zip(sums, weights, strict=True)]


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 262_144, 1_048_576])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/million_tokens"), help="run folder of --tune")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    import torch

    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    found: dict[str, object] = {**machine, "chunk_tokens": CHUNK_TOKENS, "rows": []}
    if arguments.tune:
        found["tuned"] = tune(arguments.folder.absolute())
        print(found["tuned"], flush=True)
    rows = []
    for num_tokens in arguments.tokens:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(num_tokens)], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    found["rows"] = rows
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
