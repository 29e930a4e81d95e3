"""The layout of the RWKV-5 and RWKV-6 models on the Hugging Face hub, whose model code lies beside the weights.

The numbers are those of the official file; only names differ. Source: the conversion scripts of those models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from infctx.checkpoint.layouts.rows import LayoutRow, one_to_one
from infctx.model.config import FinchConfig
from infctx.model.finch_keys import key_rows
from infctx.model.tensors import StoredTensor

LAYOUT = "Hugging Face"
_PREFIX = "rwkv."
_PARTS = (("att.", "attention."), ("ffn.", "feed_forward."))
# Eagle's mixes are spelt out there, Finch's are not.
_EAGLE_WORDS = {
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
    "time_mix_g": "time_mix_gate",
}


def is_hugging_face(names: Mapping[str, StoredTensor]) -> bool:
    """Whether these are the names of this layout."""
    return any(name.startswith(f"{_PREFIX}blocks.") for name in names)


def hugging_face_rows(config: FinchConfig) -> list[LayoutRow]:
    """Every tensor of a model, in official order."""
    return list(_rows(config))


def hugging_face_version(names: Mapping[str, StoredTensor]) -> tuple[str, int]:
    """Version and number of layers, from the names."""
    layers = {name.split(".")[2] for name in names if name.startswith(f"{_PREFIX}blocks.") and name.count(".") > 2}
    is_eagle = any(name.endswith("attention.time_mix_key") for name in names)
    return ("5.2" if is_eagle else "6"), len(layers)


def _rows(config: FinchConfig) -> Iterator[LayoutRow]:
    for row in key_rows(config, has_initial_state=False):
        yield one_to_one(_theirs(row.official, is_eagle=config.version == "5.2"), row.official)


def _theirs(official: str, *, is_eagle: bool) -> str:
    if official.startswith("emb."):
        return official.replace("emb.", f"{_PREFIX}embeddings.", 1)
    if official.startswith("blocks.0.ln0."):
        return official.replace("blocks.0.ln0.", f"{_PREFIX}blocks.0.pre_ln.", 1)
    if official.startswith("head."):
        return official
    for short, long in _PARTS:
        official = official.replace(f".{short}", f".{long}", 1)
    start, _, last = official.rpartition(".")
    return f"{_PREFIX}{start}.{_EAGLE_WORDS.get(last, last) if is_eagle else last}"
