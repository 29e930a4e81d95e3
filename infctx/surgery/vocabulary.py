"""A larger or smaller vocabulary: rows of the embedding and of the head, and nothing else of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.data.tokenizer import TOKENIZER_OF_VOCAB_SIZE, Tokenizer
from infctx.errors import CheckpointError, DataError
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.fresh import generator_for

EMBEDDING, HEAD = "emb.weight", "head.weight"
# Rows that are added up at once, in float64.
_BLOCK_ROWS = 4096


class AddedTokens(NamedTuple):
    """ids: of each new text. replaced: how many rows of the old vocabulary these took."""

    model: ModelTensors
    ids: dict[str, int]
    replaced: int


def resize_vocabulary(
    source: ModelTensors, size: int, *, drops_rows: bool = False, noise: float = 0.1, seed: int = 0
) -> ModelTensors:
    """A model of another vocabulary size; the rows of the ids that stay are bit for bit what they were.

    New rows of the embedding are the mean of all old ones and random noise. New rows of the head are the mean of the
    old ones: the logit of a new token is then the mean of the old logits, and since the exponential is convex, k new
    tokens take at most k / (V + k) of the probability from V old ones, in every context, without being impossible.

    Args:
        size: of the new vocabulary, at least 1.
        drops_rows: allow a smaller one; the rows from `size` on are lost.
        noise: of the new rows of the embedding, in standard deviations of each channel over the old rows.
        seed: of the noise.
    Raises:
        CheckpointError: rows would be lost without drops_rows, or an argument is out of range.
    """
    old = source.config.vocab_size
    if size < 1 or not 0 <= noise < float("inf"):
        raise CheckpointError(f"vocabulary size {size}, noise {noise}: expected at least 1, and at least 0.")
    if size < old and not drops_rows:
        raise CheckpointError(
            f"{source.origin}: a vocabulary of {size:,} ids would drop the last {old - size:,} of {old:,} rows. "
            "Say that they are to be dropped, or give a larger size."
        )

    def embedding_rows(weight: Tensor) -> Tensor:
        mean, deviation = _mean_and_deviation(weight)
        drawn = torch.randn(size - old, weight.shape[1], generator=generator_for(seed, EMBEDDING), dtype=torch.float64)
        return mean + noise * deviation * drawn

    def head_rows(weight: Tensor) -> Tensor:
        return _mean_and_deviation(weight)[0].expand(size - old, -1)

    # The new size no longer tells it.
    source = dataclasses.replace(source, tokenizer=source.tokenizer or TOKENIZER_OF_VOCAB_SIZE.get(old))
    if size <= old:
        return _with_rows(source, size, {name: lambda weight: weight[:size] for name in (EMBEDDING, HEAD)})
    return _with_rows(
        source,
        size,
        {
            EMBEDDING: lambda weight: _placed(weight, embedding_rows(weight), first_id=old),
            HEAD: lambda weight: _placed(weight, head_rows(weight), first_id=old),
        },
    )


def add_tokens(
    source: ModelTensors, texts: Sequence[str], *, tokenizer: Tokenizer, first_id: int | None = None
) -> AddedTokens:
    """A model with an id for each of the texts, one after the other.

    A new row of the embedding is the mean of the rows of the tokens that the text is made of today, and likewise a new
    row of the head. All other rows are bit for bit what they were.

    Args:
        texts: each of two tokens or more today.
        tokenizer: the one of the model.
        first_id: of the first text; None = behind the last row. Smaller, it takes rows that are there and that the
            tokenizer does not use, as 65530 to 65535 of World models.
    Raises:
        CheckpointError: first_id belongs to the tokenizer, or would leave a gap. DataError: a text that is empty, given
            twice, one token already, or of tokens that the model does not have.
    """
    old = source.config.vocab_size
    first = old if first_id is None else first_id
    if not min(tokenizer.vocab_size, old) <= first <= old:
        raise CheckpointError(
            f"{source.origin}: first new id {first}: expected {min(tokenizer.vocab_size, old)} (the first that the "
            f"tokenizer {tokenizer.name} does not use) to {old} (behind the last row)."
        )
    pieces = [_pieces(text, texts[:place], tokenizer, old) for place, text in enumerate(texts)]
    if not pieces:
        raise DataError("no texts to add: expected one at least.")

    def with_means(weight: Tensor) -> Tensor:
        rows = torch.stack([weight[ids].double().mean(0) for ids in pieces])
        return _placed(weight, rows, first_id=first)

    size = max(old, first + len(texts))
    model = _with_rows(
        dataclasses.replace(source, tokenizer=tokenizer.name), size, {EMBEDDING: with_means, HEAD: with_means}
    )
    ids = {text: first + place for place, text in enumerate(texts)}
    return AddedTokens(model, ids, replaced=min(old, first + len(texts)) - first)


def vocabulary_text(lines: Sequence[str], ids: Mapping[str, int]) -> str:
    """A vocabulary in the form of World's own file, with new tokens behind its lines.

    Args:
        lines: of World's file: an id, a Python literal and the number of bytes.
        ids: of the new texts.
    """
    new = [f"{number} {text!r} {len(text.encode())}" for text, number in sorted(ids.items(), key=lambda item: item[1])]
    return "\n".join([*lines, *new]) + "\n"


def _pieces(text: str, before: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of a text that is to become a token."""
    if text in before:
        raise DataError(f"token {text!r}: given twice.")
    ids = tokenizer.encode(text).tolist()
    if len(ids) < 2:
        found = f"it is the token {ids[0]} already" if ids else "it is empty"
        raise DataError(
            f"token {text!r}: expected a text of several tokens of {tokenizer.name}, {found}. Leave it out."
        )
    if max(ids) >= vocab_size:
        raise DataError(
            f"token {text!r}: its id {max(ids)} of {tokenizer.name} is beyond the model's {vocab_size:,} rows. "
            "Give the tokenizer of the model."
        )
    return [int(number) for number in ids]


def _with_rows(source: ModelTensors, size: int, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> ModelTensors:
    def changed(name: str, change: Callable[[Tensor], Tensor]) -> StoredTensor:
        stored = source.tensors[name]
        return StoredTensor((size, *stored.shape[1:]), stored.dtype, lambda: change(stored.read()))

    tensors = {**source.tensors, **{name: changed(name, change) for name, change in changes.items()}}
    return dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=size), tensors=tensors)


def _placed(weight: Tensor, rows: Tensor, *, first_id: int) -> Tensor:
    """The matrix with these rows from first_id on, longer where they reach beyond its end."""
    behind = weight[first_id + len(rows) :]
    return torch.cat([weight[:first_id], rows.to(weight.dtype), behind])


def _mean_and_deviation(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column, float64 [C], without a float64 copy of the whole."""
    mean = sum(rows.double().sum(0) for rows in weight.split(_BLOCK_ROWS)) / len(weight)
    square = sum((rows.double() - mean).square().sum(0) for rows in weight.split(_BLOCK_ROWS)) / len(weight)
    return mean, square.sqrt()
