"""Run by test_transformers_reader.py in a Python of its own: reads a folder with the model code that lies in it.

python transformers_program.py FOLDER SEQUENCES ANSWERS RETURNED
python transformers_program.py FOLDER --tokenizer TEXTS_AS_JSON
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def load(folder: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    # Without an error, what is missing would be random numbers.
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        sys.exit(f"{folder}: not every tensor found its place: {wrong}")
    return model.eval()


def answer(folder: Path, sequences: Path, answers: Path, returned: Path) -> None:
    model, given, found = load(folder), load_file(sequences), {}
    with torch.no_grad():
        for name, tokens in given.items():
            found[name.replace("tokens", "logits")] = model(tokens).logits
        state = model(given["tokens_17"]).state
        # Layers are the last axis there, and a state that is passed on is overwritten.
        found["att_shift"], found["wkv"], found["ffn_shift"] = (x.movedim(-1, 0).clone() for x in state)
        found["continued"] = model(given["tokens_40"], state=state).logits
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        found["returned"] = model(given["tokens_40"]).logits
    returned.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, returned / "model.safetensors"
    )
    shutil.copy(folder / "config.json", returned)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answers)


def tokenize(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    print(json.dumps([tokenizer(text)["input_ids"] for text in json.loads(sys.argv[3])]))


if __name__ == "__main__":
    if sys.argv[2] == "--tokenizer":
        tokenize(Path(sys.argv[1]))
    else:
        answer(*map(Path, sys.argv[1:5]))
