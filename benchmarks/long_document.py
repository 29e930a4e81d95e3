"""Exact gradient of one long document: time, tokens a second and peak memory against its length.

    python benchmarks/long_document.py [--tokens 65536 262144 1048576] [--output FILE]

Every length runs in a process of its own, over random bytes and the small model of datasets/byte_finch, all its
weights trained. The peak is that of the process's resident memory; "grown" is what it grew beyond a first document
of 16 chunks.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / "datasets" / "byte_finch" / "model.safetensors"
CHUNK_TOKENS = 1024


def measure(num_tokens: int) -> dict[str, float]:
    """Run in this process."""
    import torch

    import infctx

    model = infctx.load_model(MODEL).train()

    def run(length: int) -> float:
        tokens = torch.randint(1, 257, (1, length))
        began = time.perf_counter()
        infctx.backward_through_chunks(model, tokens, chunk_tokens=CHUNK_TOKENS)
        return time.perf_counter() - began

    run(16 * CHUNK_TOKENS)
    before = peak_megabytes()
    seconds = run(num_tokens)
    state = model.fresh_state(1)
    num_boundaries = -(-num_tokens // CHUNK_TOKENS)
    return {
        "tokens": num_tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(num_tokens / seconds),
        "peak_mb": round(peak_megabytes()),
        "grown_mb": round(peak_megabytes() - before, 1),
        "boundaries_mb": round(sum(t.numel() * t.element_size() for t in state) * num_boundaries / 2**20, 1),
        "tokens_mb": round(num_tokens * 24 / 2**20, 1),
    }


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 262_144, 1_048_576])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    import torch

    rows = []
    for num_tokens in arguments.tokens:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(num_tokens)], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    if arguments.output is not None:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        arguments.output.write_text(
            json.dumps({**machine, "chunk_tokens": CHUNK_TOKENS, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
