"""Texts that hide a key among other text and ask for it at their end."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infctx.data.tokenizer import Tokenizer

# As in datasets/recall, whose models this form is for.
_KEYS = "ABCDEFGH"
_LETTERS = _KEYS + string.ascii_lowercase[:24]

_SENTENCES = (
    " The road follows the river for a while and then turns north.",
    " A small boat was tied to the wall, and nobody seemed to own it.",
    " In the morning the market fills with people from the villages.",
    " They had painted the door green, but the rain took most of it.",
    " The library closes early in winter, because the rooms are cold.",
    " Two dogs slept under the table while the guests were talking.",
    " She wrote a letter every week and kept a copy of each of them.",
    " From the hill you can see the old bridge and both of its towers.",
    " The baker opens at five, and the bread is sold before seven.",
    " Nobody remembers who planted the trees behind the school.",
    " The train was late again, so we walked along the harbour.",
    " His grandfather repaired clocks in a workshop near the square.",
    " When the snow melts, the lower fields are under water for days.",
    " The map on the wall was older than the house itself.",
    " It is said that the well has never been dry, even in hot years.",
    " Children were flying kites on the beach until it became dark.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallForm:
    """What the texts are made of.

    Attributes:
        name: "marker": letters, a mark before the key, a question mark; "sentence": plain English.
        filler: pieces, drawn evenly.
        needle, answer: with {value} where the value goes.
        question: the end of every text.
        draw: a value.
        chance: of guessing a value.
        margin_tokens: of filler before the needle at depth 0, and between needle and question at depth 1.
        lengths: tokens of a text, where nobody says.
    """

    name: str
    filler: tuple[str, ...]
    needle: str
    question: str
    answer: str
    draw: Callable[[random.Random], str]
    chance: float
    margin_tokens: int
    lengths: tuple[int, ...]

    def draw_filler(self, source: random.Random, tokenizer: Tokenizer, *, num_tokens: int) -> npt.NDArray[np.int64]:
        """So many tokens of filler; of the same source a longer one begins with a shorter one."""
        ids: list[int] = []
        pieces = [tokenizer.encode(piece).tolist() for piece in self.filler]
        while len(ids) < num_tokens:
            ids += source.choice(pieces)
        return np.array(ids[:num_tokens], dtype=np.int64)


def _five_digits(source: random.Random) -> str:
    return str(source.randrange(10_000, 100_000))


RECALL_FORMS = {
    "marker": RecallForm(
        name="marker",
        filler=tuple(_LETTERS),
        needle=">{value}",
        question="?",
        answer="{value}",
        draw=lambda source: source.choice(_KEYS),
        chance=1 / len(_KEYS),
        margin_tokens=3,
        lengths=(32, 64, 128, 256, 512, 1024),
    ),
    "sentence": RecallForm(
        name="sentence",
        filler=_SENTENCES,
        needle="\nThe secret number is {value}. Remember it.\n",
        question="\nWhat is the secret number? The secret number is",
        answer=" {value}",
        draw=_five_digits,
        chance=1e-5,
        margin_tokens=8,
        lengths=(256, 1024, 4096, 16384),
    ),
}
