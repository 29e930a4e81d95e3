"""Run by test_fla_reader.py in a Python of its own: reads a folder with flash-linear-attention, with its own kernels.

    python fla_program.py FOLDER SEQUENCES ANSWERS RETURNED

Triton's interpreter runs its kernels, so no GPU is needed; that the autotuner measures nothing is all that is changed.
"""

import sys
import warnings
from pathlib import Path

import torch
import triton.runtime.autotuner
from safetensors.torch import load_file, save_file


def take_the_first(self: object, *args: object, config: object, **meta: object) -> list[float]:
    """The autotuner times its candidates, which needs a GPU."""
    return [0.0, 0.0, 0.0]


triton.runtime.autotuner.Autotuner._bench = take_the_first
# It warns that its RWKV may have defects; this is to find out.
warnings.simplefilter("ignore")

import fla  # noqa: E402, F401 - registers its models with transformers
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402


def load(folder: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        sys.exit(f"{folder}: not every tensor found its place: {wrong}")
    if not type(model).__module__.startswith("fla."):
        sys.exit(f"{folder}: read as {type(model)}")
    return model.eval()


def answer(folder: Path, sequences: Path, answers: Path, returned: Path) -> None:
    model, given, found = load(folder), load_file(sequences), {}
    with torch.no_grad():
        for name, tokens in given.items():
            found[name.replace("tokens", "logits")] = model(tokens, use_cache=False).logits
        cache = model(given["tokens_17"], use_cache=True).past_key_values
        states = [cache[i] for i in range(len(model.model.layers))]
        for ours, theirs in (("wkv", "recurrent_state"), ("att_shift", "conv_state"), ("ffn_shift", "ffn_state")):
            found[ours] = torch.stack([state[theirs] for state in states])
        found["continued"] = model(given["tokens_40"], past_key_values=cache, use_cache=True).logits
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        found["returned"] = model(given["tokens_40"], use_cache=False).logits
    model.save_pretrained(returned)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answers)


if __name__ == "__main__":
    answer(*map(Path, sys.argv[1:5]))
