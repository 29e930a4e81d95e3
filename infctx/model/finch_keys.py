"""Official checkpoint key <-> our parameter name, as data; and what kind of model a set of keys is.

The only place where official names appear. The order of the rows is the order in which official files are written: the
reference runtime tells versions apart by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.config import FinchConfig
from infctx.model.tensors import StoredTensor

_Any = TypeVar("_Any")

PREFIXES = ("_forward_module.", "model.")
# What no tensor of a GPTAlpha tells; that of every published one.
GPTALPHA_HEAD_SIZE = 64

_LAYER_NORMS = [("ln1", "time_mix_norm"), ("ln2", "channel_mix_norm")]
_FINCH_TIME_MIX = [
    ("time_maa_x", "lerp_input"),
    ("time_maa_w", "lerp_decay"),
    ("time_maa_k", "lerp_key"),
    ("time_maa_v", "lerp_value"),
    ("time_maa_r", "lerp_receptance"),
    ("time_maa_g", "lerp_gate"),
    ("time_maa_w1", "lerp_down"),
    ("time_maa_w2", "lerp_up"),
    ("time_decay", "decay_base"),
    ("time_decay_w1", "decay_down"),
    ("time_decay_w2", "decay_up"),
    ("time_faaaa", "bonus"),
]
_EAGLE_TIME_MIX = [
    ("time_mix_k", "mix_key"),
    ("time_mix_v", "mix_value"),
    ("time_mix_r", "mix_receptance"),
    ("time_mix_g", "mix_gate"),
    ("time_decay", "decay_base"),
    ("time_faaaa", "bonus"),
]
_FINCH_C2_TIME_MIX = [
    ("time_maa_x", "lerp_input"),
    ("time_maa_r", "lerp_receptance"),
    ("time_maa_k", "lerp_key"),
    ("time_maa_v", "lerp_value"),
    ("time_maa_w", "lerp_decay"),
    ("time_maa_v2", "lerp_value2"),
    ("time_maa_w1", "lerp_down"),
    ("time_maa_w2", "lerp_up"),
    ("time_decay", "decay_base"),
    ("time_decay_w1", "decay_down"),
    ("time_decay_w2", "decay_up"),
    ("time_value2_w1", "value2_down"),
    ("time_value2_w2", "value2_up"),
    ("time_faaaa", "bonus"),
]
_GOLD_TIME_MIX = [
    ("time_maa_x", "lerp_input"),
    ("time_maa_q", "lerp_query"),
    ("time_maa_k", "lerp_key"),
    ("time_maa_v", "lerp_value"),
    ("time_maa_v_cache", "lerp_cache"),
    ("time_maa_q_w1", "lerp_query_down"),
    ("time_maa_q_w2", "lerp_query_up"),
    ("time_maa_kv_w1", "lerp_cache_down"),
    ("time_maa_kv_w2", "lerp_cache_up"),
    ("time_key_w1", "key_down"),
    ("time_key_w2", "key_up"),
    ("time_value_w1", "value_down"),
    ("time_value_w2", "value_up"),
]
_GPTALPHA_TIME_MIX = [
    ("time_maa_x", "lerp_input"),
    ("time_maa_r", "lerp_receptance"),
    ("time_maa_k", "lerp_key"),
    ("time_maa_v", "lerp_value"),
    ("time_maa_w1", "lerp_down"),
    ("time_maa_w2", "lerp_up"),
]
_NORM_OF_HEADS = [("ln_x.weight", "group_norm.weight"), ("ln_x.bias", "group_norm.bias")]
_MATRICES = [
    *((f"{name}.weight", f"{name}.weight") for name in ("receptance", "key", "value", "output", "gate")),
    *_NORM_OF_HEADS,
]


def _norms(**names: str) -> list[tuple[str, str]]:
    return [(f"{official}.{last}", f"{ours}.{last}") for official, ours in names.items() for last in ("weight", "bias")]


_FINCH_C2_MATRICES = [
    *((f"{name}.weight", f"{name}.weight") for name in ("receptance", "key", "value", "output")),
    *_norms(ln_x="output_norm"),
]
_GOLD_MATRICES = [
    *((f"{name}.weight", f"{name}.weight") for name in ("query", "output")),
    *_norms(ln_q="query_norm", ln_k="key_norm", ln_v="value_norm", ln_x="output_norm"),
]
_GPTALPHA_MATRICES = [
    *((f"{name}.weight", f"{name}.weight") for name in ("query", "key", "value", "output")),
    *_norms(ln_r="receptance_norm", ln_k="key_norm", ln_v="value_norm", ln_x="output_norm"),
]
_FINCH_CHANNEL_MIX = [("time_maa_k", "lerp_key"), ("time_maa_r", "lerp_receptance")]
_EAGLE_CHANNEL_MIX = [("time_mix_k", "mix_key"), ("time_mix_r", "mix_receptance")]
_CHANNEL_MATRICES = [(f"{name}.weight", f"{name}.weight") for name in ("key", "receptance", "value")]
# Of each kind of block: vectors and low-rank pairs of the time mix, its matrices and norms, and the channel mix.
_PARTS = {
    "6": (_FINCH_TIME_MIX, _MATRICES, _FINCH_CHANNEL_MIX),
    "5.2": (_EAGLE_TIME_MIX, _MATRICES, _EAGLE_CHANNEL_MIX),
    "6c2": (_FINCH_C2_TIME_MIX, _FINCH_C2_MATRICES, _FINCH_CHANNEL_MIX),
    "gold": (_GOLD_TIME_MIX, _GOLD_MATRICES, _FINCH_CHANNEL_MIX),
    "gptalpha": (_GPTALPHA_TIME_MIX, _GPTALPHA_MATRICES, _FINCH_CHANNEL_MIX),
}
# In official files a vector of channels has two leading axes of length 1.
_STORED_AS_1_1_C = ("time_maa_", "time_mix_", "time_decay")
# Stored value axis before key axis; our states have the key axis first.
_STORED_TRANSPOSED = "time_state"
_STATE = (_STORED_TRANSPOSED, "initial_state")
# Ours alone: no other program knows it, and official files never have it.
_SHIFT = ("shift_state", "initial_shift")
_STARTS = [_STATE, _SHIFT]


class KeyRow(NamedTuple):
    """One tensor under both names."""

    official: str
    ours: str


def _every(index: int) -> Iterator[tuple[str, str]]:
    """Rows of this part of all kinds of blocks, each once."""
    yield from dict.fromkeys(row for parts in _PARTS.values() for row in parts[index])


# Of all kinds. One of our names has one official name; an official one may be several of ours, by the kind of block.
_BLOCK_ROWS = [
    *(KeyRow(f"{official}.{last}", f"{ours}.{last}") for official, ours in _LAYER_NORMS for last in ("weight", "bias")),
    *(KeyRow(f"att.{official}", f"time_mix.{ours}") for official, ours in [*_every(0), *_STARTS, *_every(1)]),
    *(KeyRow(f"ffn.{official}", f"channel_mix.{ours}") for official, ours in [*_every(2), _SHIFT, *_CHANNEL_MATRICES]),
]
# Around a GoldFinch's cache.
TOKEN_CAT_ROWS = [
    KeyRow("w_kv_cache_a.weight", "token_cat.compress.weight"),
    KeyRow("w_kv_cache_b.weight", "token_cat.decompress.weight"),
]
_OTHER_ROWS = [
    *TOKEN_CAT_ROWS,
    KeyRow("emb.weight", "embedding.weight"),
    *(KeyRow(f"blocks.0.ln0.{last}", f"input_norm.{last}") for last in ("weight", "bias")),
    *(KeyRow(f"ln_out.{last}", f"output_norm.{last}") for last in ("weight", "bias")),
    KeyRow("head.weight", "head.weight"),
]
_IN_A_BLOCK = re.compile(r"(blocks\.(?:0|[1-9][0-9]{0,3})\.)(.+)")
# The matrices of a block that trainers put adapters on.
BLOCK_MATRICES = tuple(
    row.official.removesuffix(".weight")
    for row in _BLOCK_ROWS
    if row.official.endswith(".weight") and not row.official.split(".")[-2].startswith("ln")
)


def key_rows(config: FinchConfig, *, has_initial_state: bool, has_initial_shifts: bool = False) -> Iterator[KeyRow]:
    """Every tensor of a model, in official order."""
    yield KeyRow("emb.weight", "embedding.weight")
    for i in range(config.n_layer):
        for official, ours in _LAYER_NORMS:
            yield from _norm(f"blocks.{i}.{official}", f"blocks.{i}.{ours}")
        if i == 0:
            yield from _norm("blocks.0.ln0", "input_norm")
        time_mix, matrices, channel_mix = _PARTS[config.kind(i)]
        state = [_STATE] if has_initial_state and i < config.n_recurrent else []
        shift = [_SHIFT] if has_initial_shifts else []
        # The first query of GOLD's layers sees one key alone, whatever is before it.
        for official, ours in [*time_mix, *state, *(shift if config.kind(i) != "gold" else []), *matrices]:
            yield KeyRow(f"blocks.{i}.att.{official}", f"blocks.{i}.time_mix.{ours}")
        for official, ours in [*channel_mix, *shift, *_CHANNEL_MATRICES]:
            yield KeyRow(f"blocks.{i}.ffn.{official}", f"blocks.{i}.channel_mix.{ours}")
    yield from _norm("ln_out", "output_norm")
    yield KeyRow("head.weight", "head.weight")
    if "gold" in config.kinds:
        yield from TOKEN_CAT_ROWS


def find_row(name: str, *, is_official: bool) -> KeyRow | None:
    """The row of a tensor's name, official or ours, of any version and layer; None if it is no such name.

    Of an official name that is several of ours, by the kind of the block, this is one: see `find_rows`.
    """
    return next(find_rows(name, is_official=is_official), None)


def find_rows(name: str, *, is_official: bool) -> Iterator[KeyRow]:
    """All rows that a tensor's name could be."""
    block = _IN_A_BLOCK.fullmatch(name)
    for start, rest, rows in (("", name, _OTHER_ROWS), *([(block[1], block[2], _BLOCK_ROWS)] if block else [])):
        for row in rows:
            if rest == (row.official if is_official else row.ours):
                yield KeyRow(start + row.official, start + row.ours)


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to; None for those outside the blocks."""
    block = _IN_A_BLOCK.fullmatch(name)
    return None if block is None else int(block[1].split(".")[1])


def is_time_state(official: str) -> bool:
    """Whether this is the tuned initial state of a layer."""
    return official.endswith(f".{_STORED_TRANSPOSED}")


def is_start(official: str) -> bool:
    """Whether this is one of the tensors that documents begin with."""
    return is_time_state(official) or is_initial_shift(official)


def official_names_of_layer_0() -> list[str]:
    """Everything a file can hold, once for all layers: for messages that name what comes nearest."""
    names = [row.official for row in _OTHER_ROWS] + [f"blocks.0.{row.official}" for row in _BLOCK_ROWS]
    return [name for name in names if not is_initial_shift(name)]


def to_official(row: KeyRow, tensor: Tensor) -> Tensor:
    """Our tensor in the shape official files give it."""
    last = row.official.rsplit(".", 1)[-1]
    if last == _STORED_TRANSPOSED:
        return tensor.transpose(-1, -2)
    if tensor.dim() == 1 and last.startswith(_STORED_AS_1_1_C):
        return tensor[None, None]
    return tensor


def from_official(row: KeyRow, tensor: Tensor, shape: torch.Size, *, file: str) -> Tensor:
    """An official tensor, squeezed ones included, in our shape."""
    squeezed = [n for n in tensor.shape if n != 1]
    if squeezed != [n for n in shape if n != 1]:
        raise CheckpointError(
            f"{file}: tensor {row.official}: expected shape {list(shape)}, found {list(tensor.shape)}. "
            "The sizes are taken from the other tensors; the file is damaged or of another architecture."
        )
    tensor = tensor.reshape(shape)
    return tensor.transpose(-1, -2) if is_time_state(row.official) else tensor


def strip_prefix(tensors: Mapping[str, _Any]) -> dict[str, _Any]:
    """Take away a prefix that some trainers leave on every key."""
    for prefix in PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return dict(tensors)


def read_config(tensors: Mapping[str, StoredTensor], *, file: str, head_size: int | None = None) -> FinchConfig:
    """Version and every size, from keys and shapes.

    Args:
        head_size: of a GPTAlpha, whose tensors do not tell it; None = 64.
    Raises:
        CheckpointError: another architecture, with its name; or a tensor that is missing or has an impossible shape.
    """
    front = _front(tensors, file=file)
    emb = _get(tensors, "emb.weight", 2, file=file)
    layers = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.") and key.split(".")[1].isdigit()}
    if layers != set(range(len(layers))):
        missing = sorted(set(range(max(layers))) - layers)
        raise CheckpointError(f"{file}: blocks {missing[:5]} are missing; the file is incomplete.")
    back, n_attention = _attention_layers(tensors, len(layers), file=file)
    sizes = {"lerp_rank": 0, "decay_rank": 0, "value_rank": 0, "key_value_rank": 0, "cache_rank": 0}
    if front in ("6", "6c2"):
        sizes["lerp_rank"] = _get(tensors, "blocks.0.att.time_maa_w2", 3, file=file).shape[1]
        sizes["decay_rank"] = _get(tensors, "blocks.0.att.time_decay_w1", 2, file=file).shape[1]
    if front == "6c2":
        sizes["value_rank"] = _get(tensors, "blocks.0.att.time_value2_w1", 2, file=file).shape[1]
    if front == "gptalpha":
        sizes["lerp_rank"] = _get(tensors, "blocks.0.att.time_maa_w2", 3, file=file).shape[1]
    if back == "gold":
        last = f"blocks.{len(layers) - 1}.att."
        sizes["key_value_rank"] = _get(tensors, f"{last}time_key_w1", 2, file=file).shape[1]
        sizes["cache_rank"] = _get(tensors, "w_kv_cache_a.weight", 2, file=file).shape[0]
        found, expected = _get(tensors, "w_kv_cache_b.weight", 2, file=file).shape, emb.shape[1] + sizes["cache_rank"]
        if found[1] != expected:
            raise CheckpointError(
                f"{file}: tensor w_kv_cache_b.weight: expected [width of the attention, {expected}], the channels and "
                f"the {sizes['cache_rank']} rows of w_kv_cache_a, found {list(found)}."
            )
    if front == "gptalpha":
        width = _get(tensors, "blocks.0.att.query.weight", 2, file=file).shape[0]
        size = head_size or GPTALPHA_HEAD_SIZE
        if width % size:
            raise CheckpointError(
                f"{file}: tensor blocks.0.att.query.weight: expected rows in heads of {size}"
                f"{'' if head_size else ', as every published model has them'}, found {width} rows. A file of switches "
                'beside the model tells another size, as {"head_size": 32}.'
            )
        heads = (width // size, size)
    else:
        heads = _get(tensors, "blocks.0.att.time_faaaa", None, file=file).shape
        if len(heads) not in (1, 2):
            raise CheckpointError(
                f"{file}: tensor blocks.0.att.time_faaaa: expected [heads, head size], found {list(heads)}."
            )
        if len(heads) == 1:  # squeezed, of one head
            heads = (1, *heads)
    return FinchConfig(
        version={"gold": "goldfinch", "gptalpha": "gptalpha", None: front}[back],
        n_layer=len(layers),
        n_embd=emb.shape[1],
        vocab_size=emb.shape[0],
        head_size=heads[1],
        n_head=heads[0],
        dim_ffn=_get(tensors, "blocks.0.ffn.key.weight", 2, file=file).shape[0],
        n_attention=n_attention,
        **({"front": front} if n_attention and front != "gptalpha" else {}),
        # Of the published models only one of GPTAlpha alone turns queries and keys by their positions.
        uses_rope=front == "gptalpha",
        **sizes,
    )


def has_initial_state(tensors: Mapping[str, object]) -> bool:
    """Whether the file carries a tuned initial state."""
    return "blocks.0.att.time_state" in tensors


def has_initial_shifts(tensors: Mapping[str, object]) -> bool:
    """Whether the file carries tuned vectors for the token before a document's first."""
    return "blocks.0.att.shift_state" in tensors


def is_initial_shift(official: str) -> bool:
    """Whether this is the name of such a vector."""
    return official.endswith(".shift_state")


def start_parameters(tensors: Mapping[str, object]) -> dict[str, bool]:
    """What `key_rows` and a model's constructor want to know of a set of official names."""
    return {
        "has_initial_state": has_initial_state(tensors),
        "has_initial_shifts": has_initial_shifts(tensors),
    }


def _norm(official: str, ours: str) -> Iterator[KeyRow]:
    yield KeyRow(f"{official}.weight", f"{ours}.weight")
    yield KeyRow(f"{official}.bias", f"{ours}.bias")


def _get(tensors: Mapping[str, StoredTensor], key: str, dims: int | None, *, file: str) -> StoredTensor:
    if key not in tensors:
        raise CheckpointError(f"{file}: tensor {key} is missing; the file is incomplete or of another architecture.")
    if dims is not None and len(tensors[key].shape) != dims:
        raise CheckpointError(f"{file}: tensor {key}: expected {dims} axes, found shape {list(tensors[key].shape)}.")
    return tensors[key]


def _attention_layers(tensors: Mapping[str, object], n_layer: int, *, file: str) -> tuple[str | None, int]:
    """What the layers at the back are that attend, and how many there are."""
    marks = {"gold": ("time_maa_q", "time_maa_v_cache", "time_maa_kv_w1", "time_key_w1"), "gptalpha": ("ln_r.weight",)}

    def kind(layer: int) -> str | None:
        found = (kind for kind, names in marks.items() if any(f"blocks.{layer}.att.{n}" in tensors for n in names))
        return next(found, None)

    kinds = [kind(layer) for layer in range(n_layer)]
    first = next((layer for layer, kind in enumerate(kinds) if kind is not None), n_layer)
    back = kinds[first] if first < n_layer else None
    for layer in range(first, n_layer):
        if kinds[layer] != back:
            raise CheckpointError(
                f"{file}: expected attention in all layers from {first} on, as blocks.{first}.att has it ({back}); "
                f"blocks.{layer}.att is {kinds[layer] or 'a recurrence'}. The file is damaged, or another architecture."
            )
    cache = [row.official for row in TOKEN_CAT_ROWS if row.official in tensors]
    if cache and back != "gold":
        raise CheckpointError(
            f"{file}: has {cache[0]}, of a GoldFinch, and no GOLD layer (blocks.*.att.time_maa_q): the layers at the "
            "back are missing or were left out."
        )
    if back == "gold" and first == 0:
        raise CheckpointError(f"{file}: blocks.0.att is GOLD; expected layers with a recurrence in front of it.")
    return back, n_layer - first


def _front(tensors: Mapping[str, StoredTensor], *, file: str) -> str:
    """The kind of the first block."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: this is {what}. infctx reads RWKV-6 (x060, x060c2), RWKV-5.2 (x052), GoldFinch and GPTAlpha."
        )

    keys = set(tensors)
    if any(key.endswith(("att.k_k", "att.x_r")) for key in keys):
        raise refuse("an RWKV-7 model")
    if "blocks.0.att.ln_r.weight" in keys:
        return "gptalpha"
    if "blocks.0.att.query.weight" in keys and "blocks.0.att.time_maa_q" not in keys:
        raise refuse("a model with attention of another kind")
    if "blocks.0.att.time_maa_x" in keys:
        if any(f"blocks.0.att.{name}" in keys for name in ("time_maa_v2", "time_value2_w1")):
            return "6c2"
        if "blocks.0.att.time_maa_q" in keys:
            return "6"  # `_attention_layers` refuses it
        experiments = {
            "time_maa_rkvw_w1": "an x060b or x060c experiment",
            "gate_w1": "an x060a experiment",
        }
        for suffix, what in experiments.items():
            if f"blocks.0.att.{suffix}" in keys:
                raise refuse(what)
        return "6"
    if "blocks.0.att.time_mix_k" in keys:
        if "blocks.0.att.ln_x.weight" not in keys:
            raise refuse("an RWKV-4 model")
        if "blocks.0.att.gate.weight" not in keys:
            raise refuse("an RWKV-5.0 model")
        decay, bonus = tensors.get("blocks.0.att.time_decay"), tensors.get("blocks.0.att.time_faaaa")
        if decay is not None and bonus is not None and decay.num_elements != bonus.num_elements:
            raise refuse("an RWKV-5.1 model")
        if "blocks.0.att.time_first" in keys:
            raise refuse("an early RWKV-5 model (its bonus is stored as a logarithm)")
        return "5.2"
    if any(key.startswith(("model.layers.", "layers.")) for key in keys):
        raise CheckpointError(
            f"{file}: this is another architecture's model in a Hugging Face layout. infctx reads RWKV-6 and RWKV-5.2."
        )
    found = ", ".join(sorted(keys)[:3]) or "no tensors"
    raise CheckpointError(f"{file}: not an RWKV checkpoint: no blocks.0.att.* tensors. Found {found}, …")
