"""Hugging Face folders, read by the published model code in transformers, and folders that code wrote, read here.

    python -m pytest tests/readers/test_transformers_reader.py --hf-code FOLDER [--hf-python PYTHON]

FOLDER holds configuration_rwkv6.py and modeling_rwkv6.py, the same for rwkv5, and hf_rwkv_tokenizer.py, as far as there
are; they are other people's, found in the models' repositories on the hub and in RWKV-World-HF-Tokenizer on GitHub.
transformers of 4.51 to 4.57 refuses that code; 4.38 to 4.50 and 5.23 run it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import infctx
from infctx.data.tokenizer import tokenizer_by_name
from infctx.model.finch import Finch

MODULES = {"6": "rwkv6", "5.2": "rwkv5"}
# The published code takes the ranks and the width of the channel mix from the number of channels. Its seventh layer is
# the first it scales down at lower precision.
SIZES = {"n_layer": 7, "n_embd": 64, "head_size": 16, "dim_ffn": 224, "lerp_rank": 32, "decay_rank": 64}
TEXTS = ["Hello world", "  a  b\n\n", "def f():\n    return 1 \n", "日本語 é", "User: x\n\nAssistant:", ""]


@pytest.fixture(scope="module")
def code(pytestconfig: pytest.Config) -> Path:
    folder = pytestconfig.getoption("--hf-code")
    if folder is None:
        pytest.skip("needs --hf-code FOLDER, the published model code; see the head of this file")
    return Path(folder).resolve(strict=True)


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("--hf-python") or sys.executable


@pytest.fixture(scope="module", params=MODULES)
def exported(
    request: pytest.FixtureRequest,
    code: Path,
    make_finch: Callable[..., Finch],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Finch, Path]:
    """A model of each version and the folder it was exported to, with the code beside the weights."""
    module = MODULES[request.param]
    if not (code / f"modeling_{module}.py").is_file():
        pytest.skip(f"{code} holds no modeling_{module}.py")
    model = make_finch(request.param, **SIZES)
    folder = tmp_path_factory.mktemp("reader") / module
    infctx.save_model(model, folder, format="hf", dtype=torch.float32, tokenizer="world")
    bring_code(code, folder)
    return model, folder


def bring_code(code: Path, folder: Path) -> None:
    """Put the code into the folder, and take away the repository that auto_map may name before a module."""
    for path in code.glob("*.py"):
        shutil.copy(path, folder)
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["auto_map"] = {kind: without_repository(names) for kind, names in content["auto_map"].items()}
        path.write_text(json.dumps(content), encoding="utf-8")


def without_repository(names: str | list[str | None]) -> str | list[str | None]:
    if isinstance(names, list):
        return [name and name.rpartition("--")[2] for name in names]
    return names.rpartition("--")[2]


@pytest.fixture(scope="module")
def answers(exported: tuple[Finch, Path], python: str, ask: Callable[..., Any]) -> Any:
    return ask(python, "transformers_program.py", exported[1])


def test_transformers_computes_the_same(exported: tuple[Finch, Path], answers: Any) -> None:
    answers.check(exported[0])


def test_what_transformers_wrote_is_read(answers: Any) -> None:
    answers.check_returned(infctx.load_model(answers.returned))


def test_its_tokenizer_gives_the_same_ids(
    exported: tuple[Finch, Path], python: str, run_program: Callable[..., str]
) -> None:
    if not (exported[1] / "hf_rwkv_tokenizer.py").is_file():
        pytest.skip("--hf-code holds no hf_rwkv_tokenizer.py")
    printed = run_program(python, "transformers_program.py", str(exported[1]), "--tokenizer", json.dumps(TEXTS))
    tokenizer = tokenizer_by_name("world")
    assert json.loads(printed.splitlines()[-1]) == [list(tokenizer.encode(text)) for text in TEXTS]
