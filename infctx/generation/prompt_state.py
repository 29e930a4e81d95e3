"""What was read of a text, in a file: a document is read once and asked many times.

The file is safetensors: `wkv` [L, H, N, N], `att_shift` and `ffn_shift` [L, C], `logits` [V] of the token that comes
next, and facts as metadata. Names that begin with "base." hold the place before a conversation that began behind
something else. A digest of all numbers is among the facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infctx.checkpoint.raw_bytes import raw_bytes
from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.errors import CheckpointError
from infctx.generation.reading import Reading, TokenArray
from infctx.model.config import FinchConfig
from infctx.model.state import ModelState

SCHEMA = 1
SCHEMA_KEY = "infctx_prompt_state"
_FACTS_KEY = "facts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Who has read a text: no other model, and no other tokenizer, can go on.

    Attributes:
        fingerprint: of the model's weights.
        tokenizer: its digest.
        dtype: the model's, as "float32"; a state may be used in another, in which it was not read.
    """

    fingerprint: str
    tokenizer: str
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptState:
    """What a state file holds.

    Attributes:
        reading: the place that was read to.
        reader: who did.
        text_tokens: of the last text that was read, so far.
        text_digest: of those tokens and of all that was read before them.
        is_whole: False where reading was stopped before the end of the text.
        before: text_digest of what the text was read behind; "" = it began a document.
        conversation: turns and tokens of a chat; None = there is none.
        base: where that conversation began; None = with a fresh document.
    """

    reading: Reading
    reader: Reader
    text_tokens: int
    text_digest: str
    is_whole: bool = True
    before: str = ""
    conversation: Mapping[str, object] | None = None
    base: Reading | None = None


def digest_of(tokens: TokenArray, before: str = "") -> str:
    """Tells other tokens, and others before them, apart."""
    digest = hashlib.sha256(before.encode())
    digest.update(tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def write_prompt_state(path: Path, found: PromptState) -> None:
    """Write it, whole or not at all; a file of that name is replaced.

    Raises: OSError where the disk is full or the folder is not there.
    """
    tensors = _tensors_of(found.reading, "")
    if found.base is not None:
        tensors |= _tensors_of(found.base, "base.")
    facts = {
        "model": found.reader.fingerprint,
        "tokenizer": found.reader.tokenizer,
        "dtype": found.reader.dtype,
        "tokens": found.reading.num_tokens,
        "base_tokens": None if found.base is None else found.base.num_tokens,
        "text_tokens": found.text_tokens,
        "text_digest": found.text_digest,
        "is_whole": found.is_whole,
        "before": found.before,
        "conversation": None if found.conversation is None else dict(found.conversation),
    }
    text = json.dumps(facts, sort_keys=True)
    metadata = {SCHEMA_KEY: str(SCHEMA), _FACTS_KEY: text, "digest": _digest(tensors, text)}
    write_safetensors(path, tensors, metadata)


def read_prompt_state(path: Path, *, reader: Reader, config: FinchConfig, device: torch.device) -> PromptState:
    """Read a state that this model may go on from.

    Raises: CheckpointError naming the file for one that is not there, is cut off or damaged, was written by another
        infctx, or belongs to another model or tokenizer.
    """
    # Read whole: a mapped file could be replaced under the tensors by --save-state.
    tensors, metadata = read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    facts = _facts(path, tensors, metadata)
    saved = Reader(fingerprint=facts["model"], tokenizer=facts["tokenizer"], dtype=facts["dtype"])
    if saved.fingerprint != reader.fingerprint:
        raise CheckpointError(
            f"{path}: was read by another model: expected weights {reader.fingerprint}, found {saved.fingerprint}. "
            "Use that model, or read the text again with this one (--save-state)."
        )
    if saved.tokenizer != reader.tokenizer:
        raise CheckpointError(
            f"{path}: was read with another tokenizer: expected {reader.tokenizer}, found {saved.tokenizer}. Use that "
            "one (--tokenizer), or read the text again."
        )
    base = facts["base_tokens"]
    return PromptState(
        reading=_reading(path, tensors, "", facts["tokens"], config, device),
        base=None if base is None else _reading(path, tensors, "base.", base, config, device),
        reader=saved,
        text_tokens=facts["text_tokens"],
        text_digest=facts["text_digest"],
        is_whole=facts["is_whole"],
        before=facts["before"],
        conversation=facts["conversation"],
    )


def in_dtype(reading: Reading, *, state: torch.dtype, logits: torch.dtype) -> Reading:
    """The same place for a model whose states and logits have other dtypes."""
    # What is cached of a token has as many bytes as the model computes with, which is how its logits come.
    cache = (part.to(logits) if part.is_floating_point() else part for part in reading.state.cache)
    converted = ModelState(*(part.to(state) for part in reading.state.recurrent), *cache)
    return replace(reading, state=converted, logits=reading.logits.to(logits))


def _facts(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    schema = metadata.get(SCHEMA_KEY)
    if schema is None:
        raise CheckpointError(f"{path}: expected a state that --save-state or /save wrote, found another safetensors.")
    if schema != str(SCHEMA):
        raise CheckpointError(
            f"{path}: was written by another version: this infctx reads schema {SCHEMA}, the file has {schema[:20]}. "
            "Use the infctx that wrote it, or read the text again."
        )
    text = metadata.get(_FACTS_KEY, "")
    if metadata.get("digest") != _digest(tensors, text):
        raise CheckpointError(f"{path}: damaged: its numbers are not those that were written. Read the text again.")
    facts: dict[str, Any] = json.loads(text)
    return facts


def _tensors_of(reading: Reading, prefix: str) -> dict[str, Tensor]:
    named = {f"{prefix}{name}": part[:, 0] for name, part in zip(reading.state.fields, reading.state, strict=True)}
    return named | {f"{prefix}logits": reading.logits}


def _reading(
    path: Path, tensors: Mapping[str, Tensor], prefix: str, num_tokens: int, config: FinchConfig, device: torch.device
) -> Reading:
    shapes = {
        "wkv": (config.n_recurrent, config.n_head, config.head_size, config.head_size),
        "att_shift": (config.n_layer, config.n_embd),
        "ffn_shift": (config.n_layer, config.n_embd),
        "logits": (config.vocab_size,),
    }
    if config.n_attention:
        cached = tensors[f"{prefix}cached_tokens"].shape[-1] if f"{prefix}cached_tokens" in tensors else num_tokens
        shapes |= {"cached_tokens": (1, cached), "cached": (1, cached, config.cache_width)}
    for name, shape in shapes.items():
        found = tuple(tensors[prefix + name].shape) if prefix + name in tensors else None
        if found != shape:
            raise CheckpointError(f"{path}: {prefix}{name}: expected shape {list(shape)}, found {found}.")
    parts = [tensors[prefix + name][:, None].to(device) for name in shapes if name != "logits"]
    return Reading(state=ModelState(*parts), logits=tensors[prefix + "logits"].to(device), num_tokens=num_tokens)


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()
