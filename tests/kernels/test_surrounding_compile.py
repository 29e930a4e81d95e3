"""The operators around the recurrence: their kernels compile for the GPUs they are meant for, and who runs.

Compiling needs no GPU. Spilled registers or too much shared memory would not be seen in any result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infctx_kernels import dispatch, surrounding
from infctx_kernels.cpu import library
from infctx_kernels.dispatch import BackendError
from infctx_kernels.surrounding import SurroundingBackend, choose_surrounding, tokens_per_program

# Of an A100 a program can use 163 KB, of a consumer GPU of the same generation 99 KB.
MOST_SHARED_BYTES = 99 * 1024

# Runs without the interpreter, in which the process of the tests has imported triton.
COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
results = []
for module, name, pointers, integers, constants, warps in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module(f"infctx_kernels.{module}.triton_op"), name)
    signature = {}
    for argument in kernel.arg_names:
        kind = "constexpr" if argument in constants else integers.get(argument)
        signature[argument] = kind or pointers.get(argument, pointers["others"])
    # As at a launch: pointers that torch allocated, and numbers of channels, are multiples of 16.
    multiples = [
        index
        for index, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in ("channels", "size", "num_ids", "num_elements")
    ]
    for architecture in (80, 90):
        compiled = triton.compile(
            ASTSource(
                kernel,
                signature,
                constexprs=constants,
                attrs={(index,): [["tt.divisibility", 16]] for index in multiples},
            ),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": warps, "enable_fp_fusion": True},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage.stdout)}
        vectors = re.findall(r"ld\\.global\\S*\\.v[24]\\.b32", compiled.asm["ptx"])
        results.append([module, name, architecture, numbers, compiled.metadata.shared, len(vectors)])
print(json.dumps(results))
"""

COUNTS = ("row_tokens", "all_tokens", "channels", "tokens_here", "num_tokens", "heads", "size", "num_ids")
INTEGERS = dict.fromkeys(COUNTS, "i32") | {"eps": "fp32", "l2_wrap": "fp32", "num_elements": "i64"}
MIX_POINTERS = {"others": "*bf16", "carried": "*fp32", "grad_carried": "*fp32", "weights": "*fp32", "starts": "*u8"}
MIX = {"NUM_MIXES": 5, "HAS_DYNAMIC": True, "HAS_STARTS": True, "BLOCK_C": 1024}
TWO_MIXES = {"NUM_MIXES": 2, "HAS_DYNAMIC": False, "HAS_STARTS": False, "BLOCK_C": 512}
NORM_POINTERS = {"others": "*bf16", "weight": "*fp32", "bias": "*fp32", "partials": "*fp32"}
NORM = {"BLOCK_H": 16, "BLOCK_N": 64}
ROW_POINTERS = {"others": "*fp32", "logits": "*bf16", "targets": "*i64"}
# module, kernel, pointers, integers, constants, warps: the largest that a launch asks for
KERNELS = [
    ("shifted_mix", "forward_kernel", MIX_POINTERS, INTEGERS, MIX, 4),
    (
        "shifted_mix",
        "backward_kernel",
        MIX_POINTERS | {"partials": "*fp32"},
        INTEGERS,
        MIX | {"WANTS_DYNAMIC": True, "WANTS_WEIGHTS": True, "BLOCK_C": 512},
        4,
    ),
    (
        "shifted_mix",
        "backward_kernel",
        MIX_POINTERS | {"partials": "*fp32"},
        INTEGERS,
        TWO_MIXES | {"WANTS_DYNAMIC": False, "WANTS_WEIGHTS": True},
        4,
    ),
    ("group_norm_gate", "forward_kernel", NORM_POINTERS, INTEGERS, NORM, 4),
    ("group_norm_gate", "backward_kernel", NORM_POINTERS, INTEGERS, NORM | {"WANTS_WEIGHTS": True}, 4),
    ("channel_mix", "squared_relu_kernel", {"others": "*bf16"}, INTEGERS, {"BLOCK": 1024}, 4),
    ("channel_mix", "squared_relu_backward_kernel", {"others": "*bf16"}, INTEGERS, {"BLOCK": 1024}, 4),
    ("channel_mix", "sigmoid_gate_kernel", {"others": "*bf16"}, INTEGERS, {"BLOCK": 1024}, 4),
    ("channel_mix", "sigmoid_gate_backward_kernel", {"others": "*bf16"}, INTEGERS, {"BLOCK": 1024}, 4),
    (
        "cross_entropy",
        "row_kernel",
        ROW_POINTERS,
        INTEGERS,
        {"HAS_L2": True, "WANTS_GRADIENT": True, "BLOCK_V": 4096},
        8,
    ),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_compile_without_spills(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(KERNELS)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 2 * len(KERNELS)
    for module, name, architecture, numbers, shared_bytes, num_vector_loads in results:
        what = f"{module}.{name} for sm_{architecture}: {numbers}, {shared_bytes} bytes shared"
        print(what, num_vector_loads)
        assert numbers["STACK"] == numbers["LOCAL"] == 0, what
        assert shared_bytes < MOST_SHARED_BYTES, what
        # Loads of 8 or 16 bytes a thread; the loss of them would halve the speed unnoticed.
        assert num_vector_loads > 0, what


def test_triton_runs_by_itself_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(library, "why_not", lambda: "no C++ compiler found")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_surrounding(None, device=cuda, dtypes=(torch.bfloat16,)) == SurroundingBackend.TRITON
    assert choose_surrounding(None, device=cuda, dtypes=(torch.bfloat16, torch.float64)) == SurroundingBackend.TORCH
    # Here the interpreter could, thousands of times slower.
    assert choose_surrounding(None, device=cpu, dtypes=(torch.float32,)) == SurroundingBackend.TORCH
    assert choose_surrounding("reference", device=cuda, dtypes=(torch.float32,)) == SurroundingBackend.REFERENCE


def test_a_refusal_says_why_and_what_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_triton_interprets", lambda: False)
    with pytest.raises(BackendError, match=r"'triton' cannot run on cpu: it needs a CUDA device.*Usable"):
        choose_surrounding("triton", device=cpu, dtypes=(torch.float32,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_surrounding(None, device=cuda, dtypes=(torch.float32,)) == SurroundingBackend.TORCH
    with pytest.raises(BackendError, match=r"it needs compute capability 8\.0, the device has 7\.5"):
        choose_surrounding("triton", device=cuda, dtypes=(torch.float32,))
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert choose_surrounding(None, device=cuda, dtypes=(torch.float32,)) == SurroundingBackend.TORCH
    with pytest.raises(BackendError, match=r"triton is not installed \(pip install triton\).* Usable here: torch,"):
        choose_surrounding("triton", device=cuda, dtypes=(torch.float32,))
    with pytest.raises(BackendError, match=r"'warp' does not exist\. Usable on cpu: (cpp, )?torch, reference\."):
        choose_surrounding("warp", device=cpu, dtypes=(torch.float32,))


def test_tokens_of_a_program() -> None:
    assert tokens_per_program(1, column_blocks=1) == surrounding.FEWEST_TOKENS
    # One row of 4096 tokens and two column blocks: as many programs as fill a GPU.
    assert tokens_per_program(4096, column_blocks=2) == 8
    assert tokens_per_program(32768, column_blocks=1) == 32
    assert tokens_per_program(10**6, column_blocks=4) == surrounding.MOST_TOKENS
