"""The recurrence's kernels compile for the GPUs they are meant for, and fit into registers and shared memory.

Compiling needs no GPU; spilled registers would not be seen in any result. `cross_compile.py all` prints every case.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "cross_compile.py"
# Of an A100 a program can use 163 KB, of a consumer GPU of the same generation 99 KB.
MOST_SHARED_BYTES = 99 * 1024
# What is compiled, and the most bytes of a thread's registers that may lie in memory. Three tf32 products for one of
# float32 take more registers than there are; training runs in half precision.
CASES = {"64:bf16:raw:none:90": 0, "64:bf16:raw:starts:80": 0, "64:fp32:raw:starts:80": 512}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("case", "most_spilled_bytes"), CASES.items())
def test_the_kernels_compile_and_fit(case: str, most_spilled_bytes: int, tmp_path: Path) -> None:
    # The tests' own process has imported Triton as an interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 6
    for result in results:
        assert result["spilled"] <= most_spilled_bytes, result
        assert result["shared"] <= MOST_SHARED_BYTES, result
