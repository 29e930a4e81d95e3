"""A conversation: turns, and the places in it that were read to, so that nothing is read twice.

Before each answer the whole conversation is rendered and tokenised as training does it, and read on from the furthest
place whose tokens it begins with. The tokens are then those of training wherever a turn or an answer ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from infctx.errors import InfctxError
from infctx.generation.dialogue import Dialogue, Turn
from infctx.generation.prompt_state import PromptState, Reader, digest_of, in_dtype, write_prompt_state
from infctx.generation.reading import Reading, TokenArray, read_tokens
from infctx.generation.row import Row, Voice, Wish, check_ids, copied


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a conversation was read to. tokens: of the conversation; reading: None = a fresh document."""

    tokens: TokenArray
    reading: Reading | None


LARGEST_SEED = 2**63 - 1

_FRESH = Place(tokens=np.zeros(0, dtype=np.int32), reading=None)


class ChatSession:
    """A conversation with a model.

    Args:
        wish: of every answer, each of which has a seed of its own; without stops it has those of the dialogue.
        system: what the model is told first.

    Attributes:
        turns: so far.
        wish: may be changed between answers.
        row: of the last answer. tokens_read: for it.
    """

    def __init__(self, voice: Voice, dialogue: Dialogue, wish: Wish, *, system: str = "") -> None:
        self.voice, self.dialogue, self.wish = voice, dialogue, wish
        self.turns: list[Turn] = []
        self.row: Row | None = None
        self.tokens_read = 0
        self.system = ""
        self.set_system(system)
        self._num_answers = 0
        self._base = _FRESH
        # One for each turn, at the beginning of its answer; and one beside them, at the end of the last answer.
        self._places: list[Place] = []
        self._after: Place | None = None

    def set_system(self, text: str) -> None:
        """Tell the model something else first. Raises InfctxError where the template has no place for it."""
        if text and not self.dialogue.has_system:
            raise InfctxError("A system text: the template this model was trained with has no place for one.")
        self.system = text

    def answer(self, user: str) -> Iterator[str]:
        """Answer the next thing a person says, piece by piece; the turn is there when the last piece is.

        Raises: DataError for a text that is empty or no UTF-8. LogitsError for logits that are not finite.
        """
        place = self._read(self._tokens(self.turns, user))
        assert place.reading is not None
        # Each answer has draws of its own, also one that is asked for again.
        seed = (self.wish.seed + self._num_answers) % LARGEST_SEED
        row = Row(self.voice, replace(self.wish, seed=seed, stops=self.wish.stops or self.dialogue.stops))
        self.row, self._after = row, None
        self._num_answers += 1
        state, logits = copied([place.reading.state]), place.reading.logits[None]
        is_told = False
        try:
            while row.ended is None:
                piece = row.take(logits[0])
                # The space between the colon and the answer belongs to the template.
                piece = piece if is_told else piece.lstrip()
                is_told = is_told or bool(piece)
                yield piece
                if row.ended is None:
                    logits, state = self.voice.step.advance_(torch.tensor(row.tokens[-1:], device=logits.device), state)
        except (KeyboardInterrupt, GeneratorExit):
            row.ended = row.ended or "interrupted"
            raise
        finally:
            if row.ended is not None:
                # Bytes that are no character were no part of any training text, and are not told to the model again.
                self.turns.append(Turn(user, row.text.replace("\ufffd", "").strip()))
                self._places.append(place)
        # The token that ended it was drawn and not read; end of text is not among the tokens.
        read = row.tokens if row.ended == "end_of_text" else row.tokens[:-1]
        tokens = np.concatenate([place.tokens, np.array(read, dtype=np.int32)])
        num_tokens = place.reading.num_tokens + len(read)
        self._after = Place(tokens=tokens, reading=Reading(state=state, logits=logits[0], num_tokens=num_tokens))

    def undo(self) -> Turn:
        """Forget the last turn. Raises InfctxError where there is none."""
        if not self.turns:
            raise InfctxError("There is no turn to take back.")
        # The same thing may be said again.
        self._after = self._places.pop()
        return self.turns.pop()

    def reset(self) -> None:
        """Forget all turns; the system text, and what was loaded to begin with, stay."""
        self.turns, self._places, self._after = [], [], None

    def begin_behind(self, found: PromptState) -> None:
        """Go on from a state: a text that was read, or a conversation with its turns."""
        voice = self.voice
        dtypes = {"state": voice.model.state_dtype, "logits": voice.model.head.weight.dtype}
        reading = in_dtype(found.reading, **dtypes)
        self.reset()
        if found.conversation is None:
            self._base = Place(tokens=_FRESH.tokens, reading=reading)
            return
        facts = cast("dict[str, Any]", found.conversation)
        self._base = _FRESH if found.base is None else replace(_FRESH, reading=in_dtype(found.base, **dtypes))
        self.set_system(facts["system"])
        self.turns = [Turn(user, answer) for user, answer in facts["turns"]]
        place = Place(tokens=np.array(facts["tokens"], dtype=np.int32), reading=reading)
        # The places before were not kept: with turns taken back, the conversation is read again, to the same tokens.
        self._places = [self._base] * (len(self.turns) - 1) + [place]

    def save(self, path: Path, reader: Reader) -> None:
        """Write the conversation with its furthest place. Raises InfctxError where nothing was said yet."""
        if not self.turns:
            raise InfctxError("Nothing has been said yet: there is nothing to save.")
        place = self._read(self._tokens(self.turns[:-1], self.turns[-1].user))
        assert place.reading is not None
        conversation = {"system": self.system, "turns": [list(turn) for turn in self.turns]}
        write_prompt_state(
            path,
            PromptState(
                reading=place.reading,
                reader=reader,
                text_tokens=len(place.tokens),
                text_digest=digest_of(place.tokens),
                conversation=conversation | {"tokens": place.tokens.tolist()},
                base=self._base.reading,
            ),
        )

    def _tokens(self, turns: list[Turn], user: str) -> TokenArray:
        history = turns if self.dialogue.has_history else []
        tokens = self.voice.tokenizer.encode(self.dialogue.prompt(history, user, system=self.system))
        check_ids(tokens, self.voice)
        return tokens

    def _read(self, tokens: TokenArray) -> Place:
        """Read on to the end of these tokens from the furthest place that they begin with."""
        places = [self._base, *self._places, *([] if self._after is None else [self._after])]
        fitting = [place for place in places if np.array_equal(tokens[: len(place.tokens)], place.tokens)]
        start = max(fitting, key=lambda place: len(place.tokens))
        rest = tokens[len(start.tokens) :]
        self.tokens_read = len(rest)
        if not len(rest):
            return start
        return Place(tokens=tokens, reading=read_tokens(self.voice.model, rest, start.reading))
