"""What an adapter folder holds beside peft's own files, and how its files are written and read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infctx.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
TRAINED_PARAMETERS = "trained_parameters.safetensors"
FACTS_FILE = "infctx.json"
FACTS_SCHEMA = 1
# Kinds of init_lora_weights that change the base when they are attached: a folder with one holds the rest only, and
# peft would compute the change again, not to the same bits.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
README = f"""# An adapter of an RWKV model

It belongs to the base model that `model.path` names in the `recipe.yaml` beside this folder, and to no other;
`{FACTS_FILE}` has that model's fingerprint.

Where there is an `{PEFT_CONFIG}`, it is in peft's layout:

    model = peft.PeftModel.from_pretrained(infctx.load_model(BASE), THIS_FOLDER)

Parameters trained as they are, if any, are in `{TRAINED_PARAMETERS}`: initial states have the key axis before the value
axis. `infctx export` merges everything into one file.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFacts:
    """What infctx.json says.

    kind: as in a recipe. rank, alpha, ranks: as in a recipe; ranks by the full names of the matrices whose rank is
    another; None and empty where the kind has none. base_fingerprint: of the model file; None where nobody knew.
    """

    kind: str
    base_fingerprint: str | None
    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)


def write_facts(folder: Path, facts: AdapterFacts) -> None:
    """Write infctx.json."""
    content = {"schema": FACTS_SCHEMA, **asdict(facts)}
    (folder / FACTS_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> AdapterFacts | None:
    """What infctx.json says; None where there is none, as in folders of other programs.

    Raises:
        CheckpointError: it cannot be read, or a newer infctx wrote it.
    """
    content = _read_json(folder / FACTS_FILE)
    if content is None:
        return None
    schema = content.pop("schema", None)
    if schema != FACTS_SCHEMA or not isinstance(content.get("kind"), str):
        raise CheckpointError(
            f"{folder / FACTS_FILE}: expected schema {FACTS_SCHEMA} and a kind, found schema {schema!r}. "
            "Use the infctx that wrote it."
        )
    known = {name: value for name, value in content.items() if name in AdapterFacts.__slots__}
    return AdapterFacts(**{"base_fingerprint": None, **known})


def read_peft_config(folder: Path) -> dict[str, object] | None:
    """What adapter_config.json says; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _read_json(folder / PEFT_CONFIG)


def write_readme(folder: Path) -> None:
    """Say in the folder what it is."""
    (folder / "README.md").write_text(README, encoding="utf-8")


def write_trained(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write parameters that are trained as they are, under their names without an adapter."""
    write_tensors(folder / TRAINED_PARAMETERS, parameters)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library has an error of its own for every failure of the disk.
        number = errno.ENOSPC if "No space" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}. Check the path.") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {str(error)[:160]!r}. Fetch the file again.") from error


def _read_json(path: Path) -> dict[str, object] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {str(error)[:160]!r}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content
