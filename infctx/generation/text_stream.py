"""Tokens to text as they come: whole characters only, and nothing that may turn out to be the sign to stop."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from infctx.data.tokenizer import Tokenizer, encode_utf8
from infctx.errors import InfctxError


class TextStream:
    """The text of one row.

    A stop is looked for in the bytes: it may begin in one token and end in another, or lie within one.

    Args:
        stops: texts that end it; they are not part of it.
    Raises: InfctxError for an empty stop.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InfctxError("--stop: expected some text, got none. Leave it out.")
        self._tokenizer = tokenizer
        self._stops = [encode_utf8(stop) for stop in stops]
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Give the text that is certain now; may be empty. With a stop, all that came before it."""
        assert not self.is_stopped
        self._held += self._tokenizer.decode_bytes([token_id])
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            certain, self._held = self._held[: min(found)], b""
            return self._decoder.decode(certain, final=True)
        num_held = max((_begun(self._held, stop) for stop in self._stops), default=0)
        at = len(self._held) - num_held
        certain, self._held = self._held[:at], self._held[at:]
        return self._decoder.decode(certain)

    def finish(self) -> str:
        """Give what was held back, where no stop came; U+FFFD for an unfinished character."""
        rest, self._held = self._held, b""
        return self._decoder.decode(rest, final=True)


def _begun(data: bytes, stop: bytes) -> int:
    """How many bytes at the end of the data are the beginning of the stop."""
    longest = min(len(data), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if data.endswith(stop[:length])), 0)
