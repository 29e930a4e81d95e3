"""Compile the recurrence's kernels for GPUs that are not here, with the sizes of a launch; print what each needs.

Usage: python tests/kernels/cross_compile.py all
       python tests/kernels/cross_compile.py 64:bf16:raw:starts:90 ...
       that is head size, dtype (fp32, bf16, fp16), decay (raw, log), starts (starts, none), architecture (80, 90).
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
from infctx_kernels.wkv6.triton_op import CHECKPOINT_TOKENS, COMPILER_OPTIONS, SPAN_TOKENS, choose_tiles

KERNELS = (
    triton_forward.segment_states_kernel,
    triton_forward.scan_kernel,
    triton_forward.outputs_kernel,
    triton_backward.segment_state_gradients_kernel,
    triton_backward.value_gradients_kernel,
    triton_backward.key_gradients_kernel,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the inputs' dtype are only these; the bonus and the start state are compiled with it too.
PER_TOKEN = (
    *("receptance", "key", "value", "decay", "bonus", "start_state", "output"),
    *("d_output", "d_value", "d_receptance", "d_key", "d_decay"),
)
SIZES = ("num_tokens", "num_segments", "segment_blocks", "rows_and_heads", "heads")


def compile_kernels(head_size: int, dtype: str, decay: str, starts: str, architecture: int) -> Iterator[dict[str, Any]]:
    tiles = choose_tiles(
        head_size=head_size,
        dtype=DTYPES[dtype],
        compute_capability=architecture // 10,
    )
    constants = {
        "HEAD_SIZE": head_size,
        "VALUE_TILE": tiles.values,
        "CHECKPOINT_BLOCKS": CHECKPOINT_TOKENS // BLOCK_TOKENS.value,
        "SPAN_BLOCKS": SPAN_TOKENS // BLOCK_TOKENS.value,
        "LEVELS": tiles.levels,
        "DECAY_IS_RAW": decay == "raw",
        "HAS_STARTS": starts == "starts",
        "HAS_START_STATE": starts == "starts",
        "SAVES_CHECKPOINTS": True,
        "REVERSE": False,
        "PRECISION": tiles.precision,
    }
    for kernel in KERNELS:
        of_kernel = constants | {"KEY_TILE": 16 if kernel is triton_forward.scan_kernel else tiles.keys}
        of_kernel = {name: value for name, value in of_kernel.items() if name in kernel.arg_names}
        signature = {}
        for name in kernel.arg_names:
            pointer = f"*{dtype}" if name in PER_TOKEN else "*u8" if name == "starts" else "*fp32"
            signature[name] = "constexpr" if name in of_kernel else "i32" if name in SIZES else pointer
        # As at a launch: what torch allocated is aligned to 16 bytes.
        aligned = [i for i, name in enumerate(signature) if signature[name].startswith("*")]
        source = ASTSource(
            kernel, signature, constexprs=of_kernel, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=COMPILER_OPTIONS)
        yield {
            "kernel": kernel.__name__,
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
        sizes = itertools.product(["64"], DTYPES, ["raw", "log"], ["starts", "none"], ["80", "90"])
        others = itertools.product(["16", "32", "128"], ["bf16", "fp32"], ["raw"], ["starts"], ["80", "90"])
        wanted = [":".join(spec) for spec in [*sizes, *others]]
    for spec in wanted:
        head_size, dtype, decay, starts, architecture = spec.split(":")
        for result in compile_kernels(int(head_size), dtype, decay, starts, int(architecture)):
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
