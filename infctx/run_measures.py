"""What a report compares, of a model as it is: loss by position on held-out documents, and a little text."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.tokenizer import END_OF_TEXT, TokenIds, Tokenizer
from infctx.errors import CheckpointError
from infctx.evaluation.by_position import PositionLosses, measure_by_position
from infctx.evaluation.intervals import differences_with_intervals
from infctx.model.finch import Finch
from infctx.model.state import join_rows
from infctx.training.bptt import in_compute_dtype
from infctx.training.step_place import random_state, set_random_state

# One document may be this part of what is read, so that there are others; the longest of all one half.
LARGEST_PART = 8
READ_AT_ONCE = 2048
# A state that is set back less often than this many times in the longest document tells little.
FEWEST_RESETS = 4
SHORTEST_RESET = 16
SAMPLES = 3
PROMPT_BYTES = 160
MOST_PROMPT_TOKENS = 512
ORDER_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The documents that are read, in an order of their own; is_cut: not all of them to their end."""

    documents: list[Document]
    places: list[int]
    is_cut: bool

    @property
    def num_tokens(self) -> int:
        """Of all of them."""
        return sum(map(len, self.documents))


def choose_documents(documents: DocumentSet, *, most_tokens: int) -> Chosen:
    """Documents of so many tokens at most: the longest, for positions far out, then others by chance, always the same.

    Where they do not all fit, the longest is cut to half of the tokens and every other one to an eighth.
    """
    lengths = documents.lengths
    fits = documents.num_tokens <= most_tokens
    longest = int(lengths.argmax())
    others = np.random.default_rng(ORDER_SEED).permutation(len(documents)).tolist()
    order = [longest, *(place for place in others if place != longest)]
    # With one document alone, all is for it.
    parts = 1 if len(documents) == 1 else 2
    left, is_cut = most_tokens, False
    chosen, places = [], []
    for place in order:
        most = left if fits else min(left, most_tokens // (parts if place == longest else LARGEST_PART))
        if most < 2:
            break
        document = _beginning(documents[place], most)
        if document.num_trained_tokens:
            chosen.append(document)
            places.append(place)
            left -= len(document)
            is_cut |= len(document) < int(lengths[place])
    return Chosen(documents=chosen, places=places, is_cut=is_cut)


def _beginning(document: Document, most: int) -> Document:
    if len(document) <= most:
        return document
    return replace(document, tokens=document.tokens[:most], weights=document.weights[:most])


def reset_length(documents: Sequence[Document], *, chunk_tokens: int) -> int | None:
    """After how many tokens a state is set back: those of a chunk, or fewer where documents are short; a power of 2.

    Returns: None where the documents are too short for any.
    """
    most = min(chunk_tokens, max(map(len, documents), default=0) // FEWEST_RESETS)
    return None if most < SHORTEST_RESET else 1 << (most.bit_length() - 1)


def measure_losses(
    model: Finch, documents: Sequence[Document], *, rows: int, reset_tokens: int | None
) -> tuple[dict[str, Any], float]:
    """Loss by position, with the state carried and, with reset_tokens, set back too; as JSON, and the seconds it took.

    Returns:
        carried, reset: see `PositionLosses.to_json`. gain: how much lower the carried loss is beyond the first
        reset, of which the reset one is no part; None without.
    """
    began = time.monotonic()
    settings: dict[str, Any] = {"chunk_tokens": READ_AT_ONCE, "rows": rows}
    carried = measure_by_position(model, documents, **settings)
    found: dict[str, Any] = {"carried": carried.to_json(), "reset": None, "gain": None}
    if reset_tokens is not None:
        reset = measure_by_position(model, documents, reset_tokens=reset_tokens, **settings)
        found |= {"reset": reset.to_json(), "gain": gain_beyond(reset_tokens, carried, reset)}
    return found, time.monotonic() - began


def gain_beyond(position: int, carried: PositionLosses, reset: PositionLosses) -> dict[str, Any] | None:
    """By how much the carried loss is below the other from a position on, with its paired 95 % interval.

    Args: position: where a bucket begins.
    Returns: None where no token that far out has a weight.
    """
    beyond = [number for number, edge in enumerate(carried.edges[:-1]) if edge >= position]
    sums = [
        array[:, beyond].sum(axis=1, keepdims=True)
        for array in (carried.document_losses, reset.document_losses, carried.document_weights)
    ]
    gain, interval = differences_with_intervals(*sums)[0]
    if gain is None:
        return None
    return {
        "beyond": position,
        "gain": gain,
        "interval": None if interval is None else list(interval),
        "documents": int(np.count_nonzero(sums[2])),
        "tokens": float(sums[2].sum()),
    }


@contextmanager
def as_it_is(model: Finch, device: torch.device) -> Iterator[None]:
    """Within the block the model is in evaluation mode; behind it, it and all random numbers are as before."""
    before, was_training = random_state(device), model.training
    model.eval()
    try:
        with torch.no_grad(), in_compute_dtype(model, device):
            yield
    finally:
        model.train(was_training)
        set_random_state(before, device)


def write_samples(
    model: Finch,
    chosen: Chosen,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Continue the beginnings of some documents, always with the most probable token.

    Of a document that begins with text which is not trained, a question or an instruction, that is the beginning.

    Args:
        max_tokens: of each text.
        should_stop: asked before every token; what there is by then is given.
    Returns:
        Of each: place among the documents, origin, prompt, whether only its end is the prompt, the text, and how the
        document itself goes on.
    """
    prompts = []
    for place, document in zip(chosen.places, chosen.documents, strict=True):
        length = _prompt_length(document, tokenizer)
        if 0 < length < len(document) and len(prompts) < SAMPLES:
            prompts.append((place, document, length, max(0, length - MOST_PROMPT_TOKENS)))
    if not prompts:
        return []
    ids = [document.tokens[first:length] for _, document, length, first in prompts]
    written = continue_greedily(
        model, ids, max_tokens=max_tokens, usable_ids=tokenizer.vocab_size, should_stop=should_stop
    )
    return [
        {
            "place": place,
            "origin": os.path.basename(document.origin),
            "is_cut": first > 0,
            "prompt": text_of(document.tokens[first:length], tokenizer),
            "text": text_of(np.array(new, dtype=np.int64), tokenizer),
            "document": text_of(document.tokens[length : length + max_tokens], tokenizer),
        }
        for (place, document, length, first), new in zip(prompts, written, strict=True)
    ]


def _prompt_length(document: Document, tokenizer: Tokenizer) -> int:
    """Tokens up to the first that is trained; where all are, some of the beginning, up to the end of a word."""
    first_trained = int(np.argmax(document.weights > 0))
    if first_trained > 1:
        return first_trained
    beginning = document.tokens[: min(len(document) * 2 // 3, PROMPT_BYTES)]
    known = beginning[beginning < tokenizer.vocab_size]
    if len(known) < len(beginning):
        return 0
    ends = np.cumsum(tokenizer.byte_lengths(beginning))
    length = int(np.searchsorted(ends, PROMPT_BYTES, "right"))
    for shorter in range(length, length // 2, -1):
        following = tokenizer.decode_bytes(document.tokens[shorter : shorter + 1]) if shorter < len(document) else b""
        if following[:1].isspace():
            return shorter
    return length


def text_of(ids: TokenIds, tokenizer: Tokenizer) -> str:
    """The text of some ids; without ids that have none, and without a character that is not complete."""
    with_text = ids[(ids < tokenizer.vocab_size) & (ids != END_OF_TEXT)]
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(tokenizer.decode_bytes(with_text))


def continue_greedily(
    model: Finch,
    prompts: Sequence[TokenIds],
    *,
    max_tokens: int,
    usable_ids: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The most probable token after another, of several prompts side by side; each ends at an end of text.

    Args:
        prompts: ids, at least one each.
        usable_ids: ids from here on are rows of the vocabulary that no token has.
    Raises:
        CheckpointError: the logits are not finite.
    """
    device = model.embedding.weight.device
    hidden, states = [], []
    for prompt in prompts:
        tokens = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
        outputs, state = model.forward_hidden(tokens)
        hidden.append(outputs[:, -1:])
        states.append(state)
    last = torch.cat(hidden)
    state = join_rows(states)
    written: list[list[int]] = [[] for _ in prompts]
    is_done = [False] * len(prompts)
    for _ in range(max_tokens):
        ids = _most_probable(model.head(last)[:, -1], usable_ids)
        for row, token in enumerate(ids.tolist()):
            is_done[row] |= token == END_OF_TEXT
            if not is_done[row]:
                written[row].append(token)
        if all(is_done) or should_stop():
            break
        last, state = model.forward_hidden(ids[:, None], state)
    return written


def _most_probable(logits: Tensor, usable_ids: int) -> Tensor:
    logits = logits[:, :usable_ids].float()
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("the model's logits are not finite: its weights are damaged, or its training diverged.")
    return logits.argmax(dim=-1)
