"""A folder in the layout of the RWKV-5 and RWKV-6 models on the Hugging Face hub.

The model code of those repositories is not ours to ship: the configuration names where it is, or `options.code` is a
folder it is copied from. Source of the fields: configuration_rwkv6.py and configuration_rwkv5.py of those models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from infctx.checkpoint.layouts.hugging_face import hugging_face_rows
from infctx.checkpoint.layouts.rows import to_layout
from infctx.checkpoint.model_file import TOKENIZER_KEY
from infctx.checkpoint.shards import write_shards
from infctx.data.tokenizer import WorldTokenizer, world_vocabulary_text
from infctx.errors import CheckpointError
from infctx.export.options import ExportOptions, in_dtype, refuse_initial_state
from infctx.model.config import FinchConfig
from infctx.model.init import new_config
from infctx.model.tensors import ModelTensors

# Version -> the model's name in code, and a public repository that holds that code.
_CODE = {
    "6": ("Rwkv6", "rwkv6", "RWKV/v6-Finch-1B6-HF"),
    "5.2": ("Rwkv5", "rwkv5", "RWKV/rwkv-5-world-1b5"),
}
_VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
_TOKENIZER_CODE = "hf_rwkv_tokenizer.py"
# How that tokenizer spells id 0.
_END_OF_TEXT = "<s>"


def prepare_hugging_face(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """The tensors the folder will hold."""
    if source.config.version not in _CODE:
        raise CheckpointError(
            f"{source.origin}: there is no model code for a {source.config.name} in the Hugging Face layout. Write it "
            "as .pth or .safetensors."
        )
    refuse_initial_state(source, format="hf")
    return in_dtype(source, options.dtype, format="hf")


def write_hugging_face(source: ModelTensors, path: Path, options: ExportOptions) -> list[str]:
    """Write configuration, weights and tokenizer into a folder that exists.

    Returns: what a user has to know about it.
    """
    notes = _sizes_note(source.config)
    code_files, where, code_notes = _code(source.config, options.code, path)
    notes += code_notes
    metadata = {"format": "pt"}
    if source.tokenizer is not None:
        metadata[TOKENIZER_KEY] = source.tokenizer
    rows = hugging_face_rows(source.config)
    write_shards(path, to_layout(rows, source.tensors), metadata, shard_bytes=options.shard_bytes)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in source.tensors.values()}
    _write_json(path / "config.json", _config(source.config, where, dtypes.pop() if len(dtypes) == 1 else "float32"))
    _write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    if source.tokenizer == WorldTokenizer.name:
        _write_tokenizer(path, has_code=_TOKENIZER_CODE in code_files)
    else:
        named = source.tokenizer or "not recorded"
        notes.append(f"No tokenizer is written: this layout's is the World tokenizer, and this model's is {named}.")
    return notes


def _config(config: FinchConfig, where: str, dtype: str) -> dict[str, object]:
    name, module, _ = _CODE[config.version]
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{where}configuration_{module}.{name}Config",
            "AutoModelForCausalLM": f"{where}modeling_{module}.{name}ForCausalLM",
        },
        "model_type": module,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "attention_hidden_size": config.dim_att,
        # Older revisions of the code read the head size from here.
        "num_attention_heads": config.head_size,
        "head_size": config.head_size,
        "head_size_divisor": 8,
        "intermediate_size": None if config.dim_ffn == _usual(config).dim_ffn else config.dim_ffn,
        "layer_norm_epsilon": config.layer_norm_eps,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _sizes_note(config: FinchConfig) -> list[str]:
    """The published code takes some sizes from the width, whatever the configuration says."""
    usual = _usual(config)
    names = ("dim_att", "dim_ffn", "lerp_rank", "decay_rank")
    wrong = [name for name in names if getattr(config, name) != getattr(usual, name)]
    if not wrong:
        return []
    listed = ", ".join(f"{name} {getattr(config, name)} (it expects {getattr(usual, name)})" for name in wrong)
    return [
        f"The published model code cannot load this folder: it takes these from the width {config.n_embd}: {listed}."
    ]


def _usual(config: FinchConfig) -> FinchConfig:
    return new_config(
        version=config.version,
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        vocab_size=config.vocab_size,
        head_size=config.head_size,
    )


def _code(config: FinchConfig, folder: Path | None, path: Path) -> tuple[set[str], str, list[str]]:
    """Copy the code files there are; what stands before a module's name in auto_map; what to tell."""
    _, module, repository = _CODE[config.version]
    if folder is None:
        note = f"The model code is not in the folder: config.json names {repository}, from where it is fetched."
        return set(), f"{repository}--", [note]
    wanted = [f"configuration_{module}.py", f"modeling_{module}.py"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"--code {folder}: expected {' and '.join(wanted)}, {' and '.join(missing)} not found.")
    found = {name for name in [*wanted, _TOKENIZER_CODE] if (folder / name).is_file()}
    for name in found:
        shutil.copyfile(folder / name, path / name)
    return found, "", []


def _write_tokenizer(path: Path, *, has_code: bool) -> None:
    (path / _VOCABULARY_FILE).write_text(world_vocabulary_text(), encoding="utf-8")
    where = "" if has_code else f"{_CODE['6'][2]}--"
    module = _TOKENIZER_CODE.removesuffix(".py")
    content = {
        "name_or_path": "rwkv-6-tokenizer",
        "auto_map": {"AutoTokenizer": [f"{where}{module}.Rwkv6Tokenizer", None]},
        "add_prefix_space": False,
        "tokenizer_class": "Rwkv6Tokenizer",
        "use_fast": False,
    }
    _write_json(path / "tokenizer_config.json", content)
    _write_json(path / "added_tokens.json", {_END_OF_TEXT: 0})
    _write_json(path / "special_tokens_map.json", dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
