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
# Most of the head size that models have, then some of each other size, dtype and form of the decay; in groups, since a
# process takes as long to begin as to compile one.
CASES = {
    "bf16": ["64:bf16:raw:none:90", "64:bf16:raw:starts:90", "64:bf16:raw:starts:80", "64:bf16:log:none:90"],
    "fp32": ["64:fp32:raw:none:90", "64:fp32:raw:starts:90", "64:fp32:raw:none:80", "64:fp32:log:starts:80"],
    "sizes": ["16:bf16:raw:starts:90", "32:bf16:raw:starts:80", "128:bf16:raw:starts:90", "32:bf16:raw:none:90"],
    "others": ["64:fp16:raw:starts:90", "32:fp32:raw:starts:90"],
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("group", CASES)
def test_the_kernels_compile_and_fit(group: str, tmp_path: Path) -> None:
    # The tests' own process has imported Triton as an interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *CASES[group]], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    forms = ("head_size", "dtype", "decay", "starts", "architecture")
    found = {(result["kernel"], *(result[form] for form in forms)) for result in results}
    assert len(found) == 6 * len(CASES[group])
    for result in results:
        assert result["spilled"] == 0, result
        assert result["shared"] <= MOST_SHARED_BYTES, result
