"""Compile the recurrence's kernels for GPUs that are not here, with the sizes of a launch; print what each needs.

Usage: python tests/kernels/cross_compile.py all
       python tests/kernels/cross_compile.py 64:bf16:raw:starts:90 ...
       that is head size, dtype (fp32, bf16, fp16), decay (raw, log), starts (starts, stateless: without a start state,
       none), architecture (80, 90); behind it names of kernels, else all.
One JSON line per kernel. Not under TRITON_INTERPRET: there is nothing to compile then.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infctx_kernels.wkv6 import triton_backward, triton_forward
from infctx_kernels.wkv6.triton_blocks import BLOCK_TOKENS
from infctx_kernels.wkv6.triton_op import (
    CHECKPOINT_TOKENS,
    COMPILER_OPTIONS,
    KEY_PARTS,
    SPAN_TOKENS,
    STATE_WARPS,
    choose_tiles,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the inputs' dtype are only these; the bonus and the start state are compiled with it too.
PER_TOKEN = (
    *("receptance", "key", "value", "decay", "bonus", "start_state", "output"),
    *("d_output", "d_value", "d_receptance", "d_key", "d_decay"),
)
SIZES = ("num_tokens", "num_segments", "segment_blocks", "rows_and_heads", "heads")


def compile_kernels(
    head_size: int, dtype: str, decay: str, starts: str, architecture: int, only: set[str]
) -> Iterator[dict[str, Any]]:
    """Compile and measure every kernel, or only some, by their names."""
    has_starts = starts != "none"
    tiles = choose_tiles(
        head_size=head_size, dtype=DTYPES[dtype], has_starts=has_starts, compute_capability=architecture // 10
    )
    constants = {
        "HEAD_SIZE": head_size,
        "VALUE_TILE": tiles.values,
        "KEY_TILE": tiles.keys,
        "CHECKPOINT_BLOCKS": CHECKPOINT_TOKENS // BLOCK_TOKENS.value,
        "SPAN_BLOCKS": SPAN_TOKENS // BLOCK_TOKENS.value,
        "CHANNELS": tiles.channels,
        "LEVELS": tiles.levels,
        "DECAY_IS_RAW": decay == "raw",
        "HAS_STARTS": has_starts,
        "HAS_START_STATE": starts == "starts",
        "SAVES_CHECKPOINTS": True,
        "PRECISION": tiles.precision,
    }
    runs = [
        (triton_forward.segment_states_kernel, STATE_WARPS, {}),
        (triton_forward.outputs_kernel, tiles.walk_warps, {}),
        (triton_backward.segment_state_gradients_kernel, STATE_WARPS, {}),
        (triton_backward.value_gradients_kernel, tiles.walk_warps, {}),
    ]
    runs += [(triton_backward.key_gradients_kernel, tiles.key_warps, parts) for parts in KEY_PARTS[tiles.splits_keys]]
    runs.append((triton_forward.scan_kernel, STATE_WARPS, {"KEY_TILE": 16, "REVERSE": False}))
    for kernel, num_warps, own_constants in runs:
        if only and kernel.__name__ not in only:
            continue
        of_kernel = {name: value for name, value in (constants | own_constants).items() if name in kernel.arg_names}
        signature = {}
        for name in kernel.arg_names:
            pointer = f"*{dtype}" if name in PER_TOKEN else "*u8" if name == "starts" else "*fp32"
            signature[name] = "constexpr" if name in of_kernel else "i32" if name in SIZES else pointer
        # As at a launch: what torch allocated is aligned to 16 bytes.
        aligned = [i for i, name in enumerate(signature) if signature[name].startswith("*")]
        source = ASTSource(
            kernel, signature, constexprs=of_kernel, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
        )
        options = {"num_warps": num_warps, **COMPILER_OPTIONS}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        yield {
            "kernel": kernel.__name__,
            "run": own_constants,
            "head_size": head_size,
            "dtype": dtype,
            "decay": decay,
            "starts": starts,
            "architecture": architecture,
            **_usage(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
        }


def _usage(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return {"registers": int(numbers["REG"]), "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"])}


def main(wanted: list[str]) -> None:
    if wanted == ["all"]:
        every = itertools.product(
            ["64", "16", "32", "128"], DTYPES, ["raw", "log"], ["starts", "stateless", "none"], ["90", "80"]
        )
        wanted = [":".join(spec) for spec in every]
    for spec in wanted:
        head_size, dtype, decay, starts, architecture, *only = spec.split(":")
        for result in compile_kernels(int(head_size), dtype, decay, starts, int(architecture), set(only)):
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
