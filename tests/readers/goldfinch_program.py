"""Run by test_goldfinch_modules.py in a Python of its own: the published model, on weights and tokens it is given.

python goldfinch_program.py FOLDER CODE SETTINGS

FOLDER holds model.pth and tokens.safetensors. Left there: what is computed, as answers.safetensors; a state dict that
the code has filled by itself, as fresh.pth; the weights as the code would save them, as returned.pth. SETTINGS are the
config's as JSON.
"""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F


def recurrence(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """What their CUDA kernel computes, a token at a time; their state has the value axis first, and is overwritten."""
    shape = (*r.shape[:2], *u.shape)
    r, k, v, decay = (x.view(shape) for x in (r, k, v, torch.exp(-torch.exp(w))))
    now, out = state.detach().clone().transpose(2, 3), []
    for t in range(shape[1]):
        pair = k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], now + u[:, :, None] * pair))
        now = decay[:, t, :, :, None] * now + pair
    with torch.no_grad():
        state.copy_(now.transpose(2, 3))
    return torch.stack(out, 1).flatten(2)


def import_model(code: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Their model and configs, without what needs a GPU or another trainer."""
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_FLOAT_MODE": "fp32", "RWKV_MODEL_TYPE": ""}
    for name, values in (
        ("lightning", {"Trainer": object}),
        ("src.logger", {"print0": lambda *words, **options: None}),
        ("cuda", {}),
        ("cuda.rwkv6_cuda", {"RUN_CUDA_RWKV6": recurrence}),
    ):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    sys.path.insert(0, str(code))
    # It would import DeepSpeed, where that is.
    importlib.util.find_spec = lambda name: None
    import configs
    from src import model

    return model, configs


def answer(folder: Path, code: Path, settings: dict) -> None:
    published, configs = import_model(code)
    if settings.pop("has_rope"):
        settings["rope"] = configs.RoPE_Config()
    config = configs.TrainerCLI_Config(
        train=configs.Train_Config(accelerator="cpu"), model=configs.FinchC2_Config(**settings)
    )
    model = published.Transformer(config)
    torch.save(dict(model.generate_init_weight()), folder / "fresh.pth")
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    found = {}
    # Token by token as for inference, in float32.
    with torch.no_grad():
        model.eval()
        state, steps = None, []
        for t in range(tokens.shape[1]):
            logits, state = model(tokens[:, t : t + 1], state)
            steps.append(logits)
        found["steps"] = torch.cat(steps, 1)
    # For training nothing is rounded to float32, but for what their rotary positions turn.
    model = model.double().train()
    for i, block in enumerate(model.blocks):
        block.att.register_forward_hook(lambda _, __, out, i=i: found.update({f"time_mix.{i}": out[0].detach()}))
        block.register_forward_hook(lambda _, __, out, i=i: found.update({f"block.{i}": out[0].detach()}))
    logits, _ = model(tokens)
    found["logits"] = logits.detach()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        found[f"gradient.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    torch.save(model.state_dict(), folder / "returned.pth")
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "answers.safetensors")


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
