"""A model exported here, read and written back by a program in a Python of its own, and what that program computed."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infctx.model.finch import Finch

# Logits have standard deviation about 1; both sides compute in float32, in another order.
TOLERANCE = 1e-4
# Some tokens of a random model make much of rounding: two ways to compute them in float32 are then at most this many
# times as far apart as ours is from float64 (2.8e-4 was seen, with two threads).
NOISE = 4.0
# One token takes other code there than several. 17 and 40 are no multiples of anything.
LENGTHS = (1, 17, 40)
# A state is carried from the end of the second sequence into the third.
CARRIED, CONTINUED = 17, 40


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a program computed with the folder it was given.

    sequences: length -> int64 [B, T].
    found: its tensors: logits_LENGTH, wkv, att_shift, ffn_shift, continued (from that state), returned (of the next).
    returned: the folder it wrote, with other weights.
    """

    sequences: dict[int, Tensor]
    found: dict[str, Tensor]
    returned: Path

    def check(self, model: Finch, *, wkv_scale: float = 1.0) -> None:
        """Logits of every length, the state, and the logits of a sequence that starts from it, equal `model`'s.

        wkv_scale: what the recurrent state is multiplied by there.
        """
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            for length, tokens in self.sequences.items():
                self._same_logits(f"logits_{length}", model(tokens)[0], exact(tokens)[0])
            state, exact_state = (one(self.sequences[CARRIED])[1] for one in (model, exact))
            tokens = self.sequences[CONTINUED]
            self._same_logits("continued", model(tokens, state)[0], exact(tokens, exact_state)[0])
        for name, ours, right in zip(state.fields, state, exact_state, strict=True):
            scale = wkv_scale if name == "wkv" else 1.0
            # States reach 100: the difference counts beside the largest value.
            bound = max(1e-5 * float(ours.abs().max()), NOISE * float((ours - right).abs().max())) * scale
            torch.testing.assert_close(
                self.found[name], scale * ours, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
            )

    def check_returned(self, model: Finch) -> None:
        """The logits of the weights it wrote, by its program, equal those of `model`, read from its folder."""
        assert not torch.allclose(self.found["returned"], self.found[f"logits_{CONTINUED}"], rtol=0, atol=0.01)
        with torch.no_grad():
            tokens = self.sequences[CONTINUED]
            self._same_logits("returned", model(tokens)[0], copy.deepcopy(model).double()(tokens)[0])

    def _same_logits(self, name: str, ours: Tensor, exact: Tensor) -> None:
        assert 0.3 < float(ours.std()) < 3
        bound = max(TOLERANCE, NOISE * float((ours - exact).abs().max()))
        assert bound < 2e-3
        torch.testing.assert_close(self.found[name], ours, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="session")
def sequences() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {length: torch.randint(50, (2, length), generator=generator) for length in LENGTHS}


@pytest.fixture(scope="session")
def ask(sequences: dict[int, Tensor]) -> Callable[..., Answers]:
    """Run a program of this folder over an exported folder.

    The program gets the folder, a file of sequences, a file for its answers and a folder to write the model back to.
    """

    def ask_program(python: str, program: str, folder: Path) -> Answers:
        questions, answers = folder.with_suffix(".questions"), folder.with_suffix(".answers")
        returned = folder.with_suffix(".returned")
        save_file({f"tokens_{length}": tokens for length, tokens in sequences.items()}, questions)
        _run(python, program, *map(str, (folder, questions, answers, returned)))
        return Answers(sequences=sequences, found=load_file(answers), returned=returned)

    return ask_program


@pytest.fixture(scope="session")
def run_program() -> Callable[..., str]:
    return _run


def _run(python: str, program: str, *arguments: str) -> str:
    """Run a program of this folder; returns what it printed. A program that fails fails the test, with its words."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {
        # Nothing is fetched, and nothing is left in the user's cache: code of a model is copied there to be run.
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(Path(arguments[0]).parent / "hf_home"),
        # The same on every machine: Triton's kernels in its interpreter, and never on a GPU.
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    path = Path(__file__).with_name(program)
    done = subprocess.run(
        [python, str(path), *arguments], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    if done.returncode:
        pytest.fail(f"{python} {path.name} ended with {done.returncode}:\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    return done.stdout
