"""llama.cpp reads what is exported as GGUF: the same logits, the same tokens.

Run with `--llama-python PYTHON`, a Python in which `pip install llama-cpp-python` has been done (it builds llama.cpp,
for minutes).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infctx.checkpoint.model_file import load_model, tensors_of
from infctx.data.tokenizer import tokenizer_by_name
from infctx.export.gguf import write_gguf
from infctx.model.finch import Finch

SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
BATCHES = [25, 5, 1]
TEXT = (
    'Plain words, 3.14 and a "quote"\'s end\n\nUser: hé — ñandú 中文字 🙂‍↔️ \u202e\ttabs\r\n'
    "def f(x):\n        return {'a': x ** 2}  \\n \\x41 //\n\n\n\nAssistant: <s>, </s>, [PAD]"
)
# llama.cpp takes the name of id 0 for the token, wherever no longer token covers it, as in " <s>".
TEXTS = [TEXT, "<s>"]
TURNS = [["system", " Be brief. "], ["user", "Hi\n"], ["assistant", "Hello"], ["user", "Why?"]]


@pytest.fixture
def ask(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], torch.Tensor]]:
    python = request.config.getoption("--llama-python")
    if python is None:
        pytest.skip("needs --llama-python")

    def run(path: Path, **asked: object) -> tuple[dict[str, Any], torch.Tensor]:
        question, logits = tmp_path / "asked.json", tmp_path / "logits.npy"
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = [str(python), str(SCRIPT), str(path), str(question), str(logits)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={})
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout), torch.from_numpy(np.load(logits))

    return run


def tokens_for(model: Finch) -> list[int]:
    return torch.randint(
        1, model.config.vocab_size, (sum(BATCHES),), generator=torch.Generator().manual_seed(3)
    ).tolist()


@torch.no_grad()
def logits_of(model: Finch, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0][0]


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 4, "n_embd": 128, "head_size": 64, "dim_ffn": 448, "lerp_rank": 32, "decay_rank": 64},
        {"n_layer": 3, "n_embd": 256, "head_size": 64, "dim_ffn": 896, "lerp_rank": 64, "decay_rank": 128},
        {"n_layer": 2, "n_embd": 64, "head_size": 32, "dim_ffn": 101, "lerp_rank": 5, "decay_rank": 7},
    ],
)
def test_the_same_logits_and_tokens(make_finch: Callable[..., Finch], tmp_path: Path, ask, sizes) -> None:
    model = make_finch(vocab_size=65536, **sizes)
    write_gguf(tensors_of(model, tokenizer="world"), tmp_path / "m.gguf", dtype=torch.float32)
    tokens = tokens_for(model)
    answer, found = ask(tmp_path / "m.gguf", tokens=tokens, batches=BATCHES, texts=TEXTS, turns=TURNS)
    expected = logits_of(model, tokens)
    assert 0.5 < float(expected.std()) < 2
    print(f"float32 {sizes['n_embd']}: largest difference {float((found - expected).abs().max()):.2e}")
    assert float((found - expected).abs().max()) <= 1e-4

    world = tokenizer_by_name("world")
    assert answer["ids"] == [world.encode(TEXT).tolist(), [0]]
    assert bytes.fromhex(answer["bytes"][0]) == TEXT.encode()
    assert answer["chat"] == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Why?\n\nAssistant:"
    assert (answer["eos"], answer["eot"], answer["ends"]) == (0, 261, [0, 261])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.25), (torch.float16, 0.05), ("q8_0", 0.5)])
def test_smaller_types_stay_near(make_finch: Callable[..., Finch], tmp_path: Path, ask, dtype, bound: float) -> None:
    """llama.cpp rounds the activations of each product, too; the same file read here is what it is compared with."""
    model = make_finch(n_layer=4, n_embd=128, vocab_size=65536, head_size=64, dim_ffn=448, lerp_rank=32, decay_rank=64)
    write_gguf(tensors_of(model, tokenizer="world"), tmp_path / "m.gguf", dtype=dtype)
    tokens = tokens_for(model)
    _, found = ask(tmp_path / "m.gguf", tokens=tokens, batches=BATCHES)
    of_file = float((found - logits_of(load_model(tmp_path / "m.gguf"), tokens)).abs().max())
    of_model = float((found - logits_of(model, tokens)).abs().max())
    print(f"{dtype}: largest difference {of_file:.2e} from the file read here, {of_model:.2e} from the model")
    assert of_file <= bound


def test_a_vocabulary_of_bytes(make_finch: Callable[..., Finch], tmp_path: Path, ask) -> None:
    model = make_finch(vocab_size=257, n_embd=64, head_size=32)
    write_gguf(tensors_of(model, tokenizer="bytes"), tmp_path / "m.gguf", dtype=torch.float32)
    tokens = tokens_for(model)
    answer, found = ask(tmp_path / "m.gguf", tokens=tokens, batches=BATCHES, texts=TEXTS, turns=TURNS)
    assert float((found - logits_of(model, tokens)).abs().max()) <= 1e-4
    assert answer["vocab_size"] == 257
    before, after = (tokenizer_by_name("bytes").encode(part).tolist() for part in TEXT.split("<s>"))
    assert answer["ids"] == [[*before, 0, *after], [0]]
    assert bytes.fromhex(answer["bytes"][0]) == TEXT.replace("<s>", "").encode()
    assert answer["ends"] == [0]


def test_without_a_vocabulary(make_finch: Callable[..., Finch], tmp_path: Path, ask) -> None:
    model = make_finch(vocab_size=300, n_embd=64, head_size=32)
    write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype=torch.float32)
    tokens = tokens_for(model)
    answer, found = ask(tmp_path / "m.gguf", tokens=tokens, batches=BATCHES)
    assert answer == {"vocab_size": 300}
    assert float((found - logits_of(model, tokens)).abs().max()) <= 1e-4
