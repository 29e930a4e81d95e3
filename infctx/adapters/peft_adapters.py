"""LoRA through peft, by name on the model's matrices; raw parameters are unfrozen beside it and saved beside it."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from infctx.adapters.patterns import matching_parameters, nearest_names
from infctx.adapters.quantized_base import dequantize_, refuse_quantized
from infctx.errors import RecipeError
from infctx.model.bitsandbytes_linear import without_its_advice

TRAINED_PARAMETERS = "trained_parameters.safetensors"
ADAPTER_README = f"""# A LoRA adapter of an RWKV model, in peft's layout

It belongs to the base model that `model.path` names in the `recipe.yaml` beside this folder, and to no other:

    model = peft.PeftModel.from_pretrained(infctx.load_model(BASE), THIS_FOLDER)

Parameters trained beside it, if any, are in `{TRAINED_PARAMETERS}`. `infctx export` merges everything into one file.
"""


class PeftAdapter:
    """A model with an adapter of peft in it: `model` is still what it was, its matrices are wrapped."""

    has_files = True

    def __init__(self, peft_model: nn.Module, trained_parameters: set[str]) -> None:
        self._peft_model = peft_model
        self._trained_parameters = trained_parameters

    def save(self, folder: Path) -> None:
        """Write peft's own layout into a folder that exists, and the raw parameters, if any, beside it."""
        try:
            self._save_with_peft(folder)
        except SafetensorError as error:
            # The library has an error of its own for every failure of the disk.
            number = errno.ENOSPC if "No space" in str(error) else errno.EIO
            raise OSError(number, os.strerror(number), str(folder)) from error

    def _save_with_peft(self, folder: Path) -> None:
        with warnings.catch_warnings():
            # peft looks for the base model's config on a hub to see whether the vocabulary was resized.
            warnings.simplefilter("ignore")
            self._peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        model = self._peft_model.get_base_model()
        raw = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if name in self._trained_parameters
        }
        if raw:
            save_file(raw, folder / TRAINED_PARAMETERS, metadata={"format": "pt"})
        (folder / "README.md").write_text(ADAPTER_README)
        config = folder / "adapter_config.json"
        # peft writes sets in hash order; sorted, the same adapter gives the same file.
        content = json.loads(config.read_text())
        content["target_modules"] = sorted(content["target_modules"])
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def merge_(self) -> None:
        """Fold the adapter into the weights and take it out of the model, in place.

        Quantised matrices become plain ones first: what the adapter is added to is what it was trained on.
        """
        dequantize_(self._peft_model.get_base_model())
        self._peft_model.merge_and_unload(safe_merge=True)


def attach_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str],
    train_also: Sequence[str] = (),
) -> PeftAdapter:
    """Freeze the model and put a LoRA of delta W = B A · alpha / rank on the target matrices; B starts as zeros.

    Args:
        targets: last part or parts of the matrices' names, as "key" or "channel_mix.key".
        train_also: glob patterns of parameters that are trained as they are.
    Raises:
        RecipeError: a target matches no matrix, or a pattern no parameter; names the nearest. A pattern matches a
            matrix that is stored quantised.
    """
    _check_targets(model, targets)
    trained = matching_parameters(model, train_also, key="adapter.train_also")
    raw_parameters = {name: parameter for name, parameter in model.named_parameters() if name in trained}
    refuse_quantized(raw_parameters.items(), key="adapter.train_also")
    # peft imports bitsandbytes where it is installed.
    with without_its_advice():
        import peft

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    peft_model = peft.get_peft_model(model, config)
    for parameter in raw_parameters.values():
        parameter.requires_grad_(True)
    identities = {id(parameter) for parameter in raw_parameters.values()}
    names_now = {name for name, parameter in model.named_parameters() if id(parameter) in identities}
    return PeftAdapter(peft_model, names_now)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    matrices = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            raise RecipeError(f"adapter.targets: {target!r} matches no matrix. {nearest_names(target, matrices)}")
    if not targets:
        raise RecipeError("adapter.targets: expected at least one matrix name, got an empty list.")
