"""Peak memory of the gradient of one document against its length: exact in chunks, and in one piece.

    python benchmarks/memory_against_length.py [--output benchmarks/results/memory_against_length_cpu.json]

The document and the model are those of benchmarks/long_document.py, every measurement is a process of its own, and the
peak is that of the process's resident memory. Both gradients are of the same prefix; "in one piece" is plain
backpropagation with all activations kept, as one chunk of the prefix's length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from long_document import CHUNK_TOKENS, open_document, peak_megabytes

IN_CHUNKS = [4_096, 16_384, 65_536, 262_144, 1_048_576]
IN_ONE_PIECE = [2_048, 4_096, 8_192, 16_384, 32_768]


def measure(num_tokens: int, *, chunk_tokens: int) -> dict[str, float]:
    """The gradient of the document's beginning, in this process."""
    import torch

    import infctx

    document, model = open_document()
    tokens = torch.tensor(document.tokens[:num_tokens].astype("int64"))[None]
    # Import and first use of everything, before what is to be measured.
    infctx.backward_through_chunks(model, tokens[:, :256], chunk_tokens=128)
    before = peak_megabytes()
    infctx.backward_through_chunks(model, tokens, chunk_tokens=chunk_tokens)
    return {"tokens": num_tokens, "peak_mb": round(peak_megabytes()), "before_mb": round(before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one[0], chunk_tokens=arguments.one[1])))
        return
    import torch

    found: dict[str, object] = {"torch": torch.__version__, "chunk_tokens": CHUNK_TOKENS}
    for name, lengths in (("in_chunks", IN_CHUNKS), ("in_one_piece", IN_ONE_PIECE)):
        rows = []
        for num_tokens in lengths:
            chunk_tokens = CHUNK_TOKENS if name == "in_chunks" else num_tokens
            one = ["--one", str(num_tokens), str(chunk_tokens)]
            done = subprocess.run([sys.executable, __file__, *one], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(name, rows[-1], flush=True)
        found[name] = rows
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
