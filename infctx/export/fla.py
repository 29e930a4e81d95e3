"""A folder that flash-linear-attention's RWKV6ForCausalLM loads. Source of the fields: its RWKV6Config."""

from __future__ import annotations

import json
from pathlib import Path

from infctx.checkpoint.layouts.fla import VALUE_SCALE, VALUE_SCALE_KEY, fla_rows
from infctx.checkpoint.layouts.rows import to_layout
from infctx.checkpoint.model_file import TOKENIZER_KEY
from infctx.checkpoint.shards import write_shards
from infctx.export.as_finch import as_finch
from infctx.export.options import ExportOptions, in_dtype, refuse_initial_state
from infctx.model.tensors import ModelTensors

_NORM_NOTE = (
    "The values are stored divided by 8: with that, the one epsilon that flash-linear-attention gives to all norms is "
    "right for the group norms too. Leave g_norm.eps as it is loaded."
)


def prepare_fla(source: ModelTensors, options: ExportOptions) -> ModelTensors:
    """The tensors the folder will hold; an Eagle becomes the Finch that computes the same."""
    refuse_initial_state(source, format="fla")
    return in_dtype(as_finch(source), options.dtype, format="fla")


def write_fla(source: ModelTensors, path: Path, options: ExportOptions) -> list[str]:
    """Write configuration and weights into a folder that exists.

    Returns: what a user has to know about it.
    """
    config = source.config
    metadata = {"format": "pt", VALUE_SCALE_KEY: str(VALUE_SCALE)}
    if source.tokenizer is not None:
        metadata[TOKENIZER_KEY] = source.tokenizer
    write_shards(
        path,
        to_layout(fla_rows(config, value_scale=VALUE_SCALE), source.tensors),
        metadata,
        shard_bytes=options.shard_bytes,
    )
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in source.tensors.values()}
    content = {
        "architectures": ["RWKV6ForCausalLM"],
        "model_type": "rwkv6",
        "attn_mode": "chunk",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_heads": config.n_head,
        "expand_k": config.dim_att / config.n_embd,
        "expand_v": config.dim_att / config.n_embd,
        "intermediate_size": config.dim_ffn,
        "hidden_act": "sqrelu",
        "proj_low_rank_dim": config.lerp_rank,
        "gate_low_rank_dim": config.decay_rank,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": config.layer_norm_eps,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
    }
    (path / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [_NORM_NOTE]
