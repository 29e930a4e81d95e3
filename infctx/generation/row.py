"""One text that is being written, from a place that has been read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infctx.data.tokenizer import END_OF_TEXT, Tokenizer
from infctx.errors import InfctxError
from infctx.generation.reading import Reading, TokenArray
from infctx.generation.sampling import Sampler, SamplingOptions
from infctx.generation.text_stream import TextStream
from infctx.model.finch import Finch
from infctx.model.single_token import SingleTokenStep
from infctx.model.state import ModelState, join_rows

Ended = Literal["end_of_text", "stop", "length", "interrupted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """What writes: a model with its tokenizer.

    Attributes:
        step: of the same model.
    """

    model: Finch
    step: SingleTokenStep
    tokenizer: Tokenizer

    @property
    def usable_ids(self) -> int:
        """Ids from here on are rows of the vocabulary without a token, or tokens without a row."""
        return min(self.tokenizer.vocab_size, self.model.config.vocab_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is asked of a text.

    Attributes:
        stops: texts that end it and are not part of it; end of text always does.
        max_tokens: drawn at most; 0 = none.
    """

    sampling: SamplingOptions
    seed: int
    max_tokens: int
    stops: Sequence[str] = ()


class Row:
    """A text as it grows, one drawn token at a time.

    Attributes:
        tokens: drawn so far, without the end of text.
        ended: why there will be no more; None = there may be.
    """

    def __init__(self, voice: Voice, wish: Wish) -> None:
        self.tokens: list[int] = []
        self.ended: Ended | None = "length" if wish.max_tokens == 0 else None
        self._max_tokens = wish.max_tokens
        self._sampler = Sampler(wish.sampling, seed=wish.seed, usable_ids=voice.usable_ids)
        self._stream = TextStream(voice.tokenizer, wish.stops)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What has come of it."""
        return "".join(self._pieces)

    def take(self, logits: Tensor) -> str:
        """Draw the next token of logits [V]; gives the text that is certain with it."""
        assert self.ended is None
        token = self._sampler.draw(logits)
        if token == END_OF_TEXT:
            return self.finish("end_of_text")
        self.tokens.append(token)
        piece = self._stream.push(token)
        self._pieces.append(piece)
        if self._stream.is_stopped:
            self.ended = "stop"
        elif len(self.tokens) == self._max_tokens:
            piece += self.finish("length")
        return piece

    def finish(self, ended: Ended) -> str:
        """End it here; gives the text that was held back."""
        self.ended = ended
        self._pieces.append(self._stream.finish())
        return self._pieces[-1]


def check_ids(tokens: TokenArray, voice: Voice) -> None:
    """Raise InfctxError for a token that the model has no row for."""
    size = voice.model.config.vocab_size
    if len(tokens) and int(tokens.max()) >= size:
        raise InfctxError(
            f"--tokenizer {voice.tokenizer.name}: id {int(tokens.max())} is beyond the model's vocabulary of {size:,} "
            "ids."
        )


def write_text(voice: Voice, row: Row, reading: Reading) -> Iterator[str]:
    """Continue what was read until the row has ended; yields each piece of text as it comes, which may be empty."""
    state = copied([reading.state])
    logits = reading.logits[None]
    device = logits.device
    while row.ended is None:
        yield row.take(logits[0])
        if row.ended is None:
            logits, state = voice.step.advance_(torch.tensor(row.tokens[-1:], device=device), state)


def copied(states: Sequence[ModelState]) -> ModelState:
    """The rows of several states in one, which may be changed."""
    # Outside of inference mode such a tensor could not be changed if it was made inside.
    with torch.inference_mode():
        return ModelState(*(part.clone() for part in join_rows(states)))
